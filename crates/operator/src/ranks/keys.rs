//! What the operators of a cluster share and keep to themselves: the certificate that ranks trust,
//! and the seed of the attempts' secrets.

use std::collections::BTreeMap;

use drumline_wire::auth::Token;
use drumline_wire::line::CERTIFICATE_NAME;
use hmac::{Hmac, Mac};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, PostParams};
use sha2::Sha256;

/// The secret's name, in the operator's namespace.
pub const NAME: &str = "drumline-operator-keys";
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const SEED: &str = "seed";
/// Bytes of the seed.
const SEED_BYTES: usize = 32;

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The API server refused, or was not reached.
    #[error("the secret {NAME}: {0}")]
    Api(#[from] kube::Error),
    /// No certificate could be made.
    #[error("no certificate could be made: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The system has no random numbers.
    #[error("no random numbers: {0}")]
    Random(#[from] getrandom::Error),
    /// The secret is not one that an operator wrote.
    #[error("the secret {NAME} has no {0}; delete it, and it is made anew")]
    Lacks(&'static str),
}

/// The keys. `Debug` shows none of them.
#[derive(Clone)]
pub struct Keys {
    /// The certificate, in PEM: no secret.
    pub certificate: String,
    /// Its private key, in PEM.
    key: String,
    seed: Vec<u8>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(..)")
    }
}

impl Keys {
    /// Makes new ones.
    ///
    /// # Errors
    /// [`KeysError::Certificate`], [`KeysError::Random`].
    pub fn new() -> Result<Self, KeysError> {
        let made = rcgen::generate_simple_self_signed([CERTIFICATE_NAME.to_owned()])?;
        let mut seed = vec![0; SEED_BYTES];
        getrandom::fill(&mut seed)?;
        Ok(Self { certificate: made.cert.pem(), key: made.signing_key.serialize_pem(), seed })
    }

    /// Returns the cluster's keys: those that the first operator made.
    ///
    /// # Errors
    /// [`KeysError`].
    pub async fn ensure(secrets: &Api<Secret>) -> Result<Self, KeysError> {
        if let Some(there) = secrets.get_opt(NAME).await? {
            return Self::read(&there);
        }
        let new = Self::new()?;
        match secrets.create(&PostParams::default(), &new.written()).await {
            Ok(_) => Ok(new),
            // Another operator was faster.
            Err(kube::Error::Api(status)) if status.code == 409 => {
                Self::read(&secrets.get(NAME).await?)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn read(secret: &Secret) -> Result<Self, KeysError> {
        let entry = |name: &'static str| {
            let found = secret.data.as_ref().and_then(|all| all.get(name));
            found.map(|bytes| bytes.0.clone()).ok_or(KeysError::Lacks(name))
        };
        let text = |name| String::from_utf8(entry(name)?).map_err(|_| KeysError::Lacks(name));
        let seed = entry(SEED)?;
        if seed.len() < SEED_BYTES {
            return Err(KeysError::Lacks(SEED));
        }
        Ok(Self { certificate: text(CERTIFICATE)?, key: text(KEY)?, seed })
    }

    fn written(&self) -> Secret {
        let mut secret = Secret::default();
        secret.metadata.name = Some(NAME.to_owned());
        secret.type_ = Some("kubernetes.io/tls".to_owned());
        secret.data = Some(BTreeMap::from([
            (CERTIFICATE.to_owned(), ByteString(self.certificate.clone().into_bytes())),
            (KEY.to_owned(), ByteString(self.key.clone().into_bytes())),
            (SEED.to_owned(), ByteString(self.seed.clone())),
        ]));
        secret
    }

    /// Returns what the server of TLS shows.
    #[must_use]
    pub fn identity(&self) -> tonic::transport::Identity {
        tonic::transport::Identity::from_pem(&self.certificate, &self.key)
    }

    /// Returns the secret of an attempt: the same from every operator, guessed by nobody else.
    #[must_use]
    pub fn secret(&self, job_uid: &str, attempt: u32) -> Token {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.seed)
            .unwrap_or_else(|_| unreachable!("HMAC takes a key of any length"));
        mac.update(format!("{job_uid}/{attempt}").as_bytes());
        let text: String =
            mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        Token::new(&text).unwrap_or_else(|_| unreachable!("64 hexadecimal digits are a token"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operator_derives_the_same_secret_and_each_attempt_has_its_own() {
        let keys = Keys::new().unwrap();
        let other = Keys::read(&keys.written()).unwrap();
        let secret = |keys: &Keys, attempt| keys.secret("u", attempt).expose().to_owned();
        assert_eq!(secret(&keys, 1), secret(&other, 1));
        assert_ne!(secret(&keys, 1), secret(&keys, 2));
        assert_ne!(secret(&keys, 1), secret(&Keys::new().unwrap(), 1));
        assert_eq!(format!("{keys:?}"), "Keys(..)");
    }
}
