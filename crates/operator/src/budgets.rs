//! Pod disruption budgets: a gang leaves whole or not at all, so it is left alone while a budget
//! does not allow all its pods to go at once.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::gang::UID;

/// Returns the uids of the jobs whose gangs a budget guards.
pub fn guarded<'a>(
    budgets: &'a [impl AsRef<PodDisruptionBudget>],
    pods: impl IntoIterator<Item = &'a Pod>,
) -> BTreeSet<String> {
    if budgets.is_empty() {
        return BTreeSet::new();
    }
    let mut counts: BTreeMap<(usize, &str), i64> = BTreeMap::new();
    for pod in pods {
        let Some(labels) = &pod.metadata.labels else { continue };
        let Some(job) = labels.get(UID) else { continue };
        for (index, budget) in budgets.iter().enumerate() {
            let budget = budget.as_ref();
            let selector = budget.spec.as_ref().and_then(|spec| spec.selector.as_ref());
            if budget.metadata.namespace == pod.metadata.namespace
                && selector.is_some_and(|selector| selects(selector, labels))
            {
                *counts.entry((index, job)).or_default() += 1;
            }
        }
    }
    let is_short = |index: usize, count: i64| {
        let status = budgets[index].as_ref().status.as_ref();
        // A budget that nobody has counted yet allows nothing.
        count > status.map_or(0, |status| i64::from(status.disruptions_allowed))
    };
    let short = counts.into_iter().filter(|((index, _), count)| is_short(*index, *count));
    short.map(|((_, job), _)| job.to_owned()).collect()
}

/// Returns whether a selector selects these labels; an empty one selects all.
fn selects(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let exact = selector.match_labels.iter().flatten();
    let mut rules = selector.match_expressions.iter().flatten();
    exact.into_iter().all(|(key, value)| labels.get(key) == Some(value))
        && rules.all(|rule| {
            let value = labels.get(&rule.key);
            let is_listed =
                value.is_some_and(|value| rule.values.iter().flatten().any(|v| v == value));
            match rule.operator.as_str() {
                "In" => is_listed,
                "NotIn" => !is_listed,
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::sync::Arc;

    #[test]
    fn a_gang_is_guarded_while_not_all_its_pods_may_go() {
        let pods: Vec<Pod> = (0..3)
            .map(|rank| {
                serde_json::from_value(json!({ "metadata": {
                    "name": format!("p{rank}"), "namespace": "n",
                    "labels": { UID: "u", "app": "x", "rank": rank.to_string() },
                }}))
                .unwrap()
            })
            .collect();
        let guarded_by = |namespace: &str, selector: serde_json::Value, allowed: i32| {
            let budget: PodDisruptionBudget = serde_json::from_value(json!({
                "metadata": { "name": "b", "namespace": namespace },
                "spec": { "selector": selector },
                "status": { "disruptionsAllowed": allowed, "currentHealthy": 3,
                            "desiredHealthy": 2, "expectedPods": 3 },
            }))
            .unwrap();
            guarded(&[Arc::new(budget)], &pods).contains("u")
        };
        let app = json!({ "matchLabels": { "app": "x" } });
        assert!(guarded_by("n", app.clone(), 2));
        assert!(!guarded_by("n", app.clone(), 3));
        assert!(!guarded_by("other", app, 0));
        let some = |operator, values| json!({ "matchExpressions": [{ "key": "rank", "operator": operator, "values": values }] });
        assert!(!guarded_by("n", some("In", json!(["0"])), 1));
        assert!(guarded_by("n", some("NotIn", json!(["0"])), 1));
        assert!(guarded_by("n", json!({}), 2), "an empty selector selects all");
    }
}
