//! Who calls: the API server says whose token it is, and what its owner may do.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::Client;
use kube::api::{Api, PostParams};
use sha2::{Digest, Sha256};
use tonic::Status;

use crate::crd::GROUP;
use crate::ranks::AUDIENCE;

/// For how long an answer about a token is believed.
const BELIEVED: Duration = Duration::from_secs(120);
/// Answers that are remembered.
const REMEMBERED_MAX: usize = 20_000;
/// Longest time that the API server may take.
const REVIEW_DEADLINE: Duration = Duration::from_secs(8);

/// A pod whose token was shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// Asks the API server about callers. Cloning shares what it remembers.
#[derive(Clone)]
pub struct Callers {
    client: Client,
    known: Arc<Mutex<Known>>,
}

/// Who showed a token, by its digest, and when that was found out.
type Known = HashMap<[u8; 32], (UserInfo, Instant)>;

impl Callers {
    /// Asks through `client`.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { client, known: Arc::default() }
    }

    /// Returns the pod that a token was made for.
    ///
    /// # Errors
    /// Unauthenticated when there is none; unavailable when the API server cannot be asked.
    pub async fn pod(&self, token: &str) -> Result<PodRef, Status> {
        let user = self.user(token).await?;
        let extra = |name: &str| {
            let all: &BTreeMap<String, Vec<String>> = user.extra.as_ref()?;
            all.get(&format!("authentication.kubernetes.io/{name}"))?.first().cloned()
        };
        let account = user.username.as_deref().unwrap_or_default();
        let namespace = account
            .strip_prefix("system:serviceaccount:")
            .and_then(|rest| rest.split_once(':'))
            .map(|(namespace, _)| namespace.to_owned());
        match (namespace, extra("pod-name"), extra("pod-uid")) {
            (Some(namespace), Some(name), Some(uid)) => Ok(PodRef { namespace, name, uid }),
            _ => Err(Status::unauthenticated("the token belongs to no pod")),
        }
    }

    /// Checks that the owner of a token may do `verb` to all of `resource` of our group, such as
    /// `get` to `modelservices/endpoint`.
    ///
    /// # Errors
    /// Permission denied with what is missing; as [`Self::pod`] otherwise.
    pub async fn may(&self, token: &str, verb: &str, resource: &str) -> Result<(), Status> {
        let user = self.user(token).await?;
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: user.username.clone(),
                uid: user.uid.clone(),
                groups: user.groups.clone(),
                extra: user.extra.clone(),
                resource_attributes: Some(ResourceAttributes {
                    group: Some(GROUP.to_owned()),
                    resource: Some(resource.to_owned()),
                    subresource: Some(subresource.to_owned()).filter(|name| !name.is_empty()),
                    verb: Some(verb.to_owned()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let reviews: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let params = PostParams::default();
        let asked = reviews.create(&params, &review);
        let answer = tokio::time::timeout(REVIEW_DEADLINE, asked)
            .await
            .map_err(|_| away(&"no answer in time"))?
            .map_err(|error| away(&error))?;
        if answer.status.is_some_and(|status| status.allowed) {
            return Ok(());
        }
        let who = user.username.unwrap_or_default();
        Err(Status::permission_denied(format!(
            "{who} may not {verb} {resource}/{subresource} of {GROUP}; bind the cluster role \
             drumline-gateway to it"
        )))
    }

    async fn user(&self, token: &str) -> Result<UserInfo, Status> {
        // The token itself is not kept.
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(user) = self.remembered(&hash) {
            return Ok(user);
        }
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![AUDIENCE.to_owned()]),
            },
            ..TokenReview::default()
        };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let params = PostParams::default();
        let asked = reviews.create(&params, &review);
        let answer = tokio::time::timeout(REVIEW_DEADLINE, asked)
            .await
            .map_err(|_| away(&"no answer in time"))?
            .map_err(|error| away(&error))?;
        let status = answer.status.unwrap_or_default();
        // An API server that knows no audiences would take a token that was made for others.
        let is_ours = status.audiences.iter().flatten().any(|one| one == AUDIENCE);
        match status.user {
            Some(user) if status.authenticated == Some(true) && is_ours => {
                self.remember(hash, user.clone());
                Ok(user)
            }
            _ => Err(Status::unauthenticated("the token is not valid for the operator")),
        }
    }

    fn remembered(&self, hash: &[u8; 32]) -> Option<UserInfo> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (user, at) = known.get(hash)?;
        (at.elapsed() < BELIEVED).then(|| user.clone())
    }

    fn remember(&self, hash: [u8; 32], user: UserInfo) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED_MAX {
            known.retain(|_, (_, at)| at.elapsed() < BELIEVED);
        }
        if known.len() < REMEMBERED_MAX {
            known.insert(hash, (user, Instant::now()));
        }
    }
}

fn away(error: &dyn std::fmt::Display) -> Status {
    Status::unavailable(format!("the API server cannot be asked who calls: {error}"))
}
