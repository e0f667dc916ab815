//! Manifests handed in: checked by the one parser, then created as the objects that they are.

use std::collections::BTreeSet;

use drumline_spec::manifest::parse_all;
use drumline_spec::object::objects;
use drumline_wire::v1;
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams, ValidationDirective};
use serde_json::Value;
use tonic::Status;

use crate::front::{Front, refused};
use crate::job::resource_named;

/// Who an object's fields belong to; `kubectl apply` may take them over.
const MANAGER: &str = "drumline";
/// Annotation: the submission that made the object, so that one whose answer was lost can be repeated.
const SUBMISSION: &str = "drumline.dev/submission";

impl Front {
    /// Creates what a file describes. All objects are tried with the API server before the first is
    /// stored, since it stores them one by one.
    pub(crate) async fn hand_in(
        &self,
        request: &v1::SubmitRequest,
    ) -> Result<v1::SubmitResponse, Status> {
        let all = parse_all(&request.manifests, &request.source_name).map_err(|mistakes| {
            let told: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
            Status::invalid_argument(told.join("\n"))
        })?;
        if let Some(job) =
            all.jobs.iter().find(|job| job.split != drumline_spec::SplitChoice::Given)
        {
            return Err(Status::invalid_argument(format!(
                "{}: spec.parallelism: auto is not for Kubernetes; give the split, or let `drumline \
                 plan train --emit manifest` find it",
                job.name
            )));
        }
        let objects = objects(&request.manifests);
        let mut seen = BTreeSet::new();
        for object in &objects {
            let at = (text(object, "kind"), self.namespace_of(object), name(object));
            if !seen.insert(at) {
                return Err(Status::invalid_argument(format!(
                    "{} {} stands twice in {}",
                    text(object, "kind"),
                    name(object),
                    request.source_name
                )));
            }
        }
        for object in &objects {
            self.store(object, &request.idempotency_key, true).await?;
        }
        let mut answer = v1::SubmitResponse::default();
        let mut jobs = all.jobs.iter();
        for object in &objects {
            if !request.dry_run {
                self.store(object, &request.idempotency_key, false).await?;
            }
            let (kind, name) = (text(object, "kind"), name(object));
            if kind == "Queue" {
                answer.queues.push(name);
                continue;
            }
            let Some(job) = jobs.next() else { continue };
            answer.jobs.push(v1::SubmittedJob {
                id: format!("{}/{name}", kind.to_ascii_lowercase()),
                kind,
                name,
                ranks: job.gang().ranks,
                message: if request.dry_run {
                    "the API server would take it; where its ranks would go is known to the operator only"
                        .to_owned()
                } else {
                    String::new()
                },
                ..v1::SubmittedJob::default()
            });
        }
        Ok(answer)
    }

    fn namespace_of(&self, object: &Value) -> String {
        object["metadata"]["namespace"].as_str().unwrap_or(&self.namespace).to_owned()
    }

    /// Creates a job, or applies a queue: queues are changed by submitting them again.
    async fn store(&self, object: &Value, key: &str, is_trial: bool) -> Result<(), Status> {
        let (kind, name) = (text(object, "kind"), name(object));
        let resource = resource_named(&kind);
        let mut object: DynamicObject = serde_json::from_value(object.clone())
            .map_err(|error| Status::invalid_argument(format!("{kind} {name}: {error}")))?;
        let told = |error: &kube::Error| {
            let status = refused(error);
            Status::new(status.code(), format!("{kind} {name}: {}", status.message()))
        };
        if kind == "Queue" {
            let queues: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
            object.metadata.namespace = None;
            let params = PatchParams {
                dry_run: is_trial,
                force: true,
                field_manager: Some(MANAGER.to_owned()),
                field_validation: Some(ValidationDirective::Strict),
            };
            let applied = queues.patch(&name, &params, &Patch::Apply(&object)).await;
            return applied.map(drop).map_err(|error| told(&error));
        }
        let namespace =
            object.metadata.namespace.get_or_insert_with(|| self.namespace.clone()).clone();
        object
            .metadata
            .annotations
            .get_or_insert_default()
            .insert(SUBMISSION.to_owned(), key.to_owned());
        let jobs: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &namespace, &resource);
        let params = PostParams { dry_run: is_trial, field_manager: Some(MANAGER.to_owned()) };
        match jobs.create(&params, &object).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(answer)) if answer.code == 409 => {
                let there = jobs.get_opt(&name).await.map_err(|error| told(&error))?;
                let made_by = there.and_then(|one| one.metadata.annotations?.remove(SUBMISSION));
                if !key.is_empty() && made_by.as_deref() == Some(key) {
                    return Ok(());
                }
                Err(Status::already_exists(format!(
                    "{kind} {name} exists in namespace {namespace}; cancel it first, or choose another \
                     name (a name is unique on Kubernetes)"
                )))
            }
            Err(error) => Err(told(&error)),
        }
    }
}

fn text(object: &Value, field: &str) -> String {
    object[field].as_str().unwrap_or_default().to_owned()
}

fn name(object: &Value) -> String {
    text(&object["metadata"], "name")
}
