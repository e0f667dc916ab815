//! Typed values as JSON in the store.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::StoreError;
use super::model::KeyValue;

/// Encodes a value for [`Op::put`](super::Op::put).
///
/// # Errors
/// [`StoreError::Invalid`] when the type cannot be JSON (a map with keys that are not text).
pub fn encode<T: Serialize>(key: &str, value: &T) -> Result<Bytes, StoreError> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|e| StoreError::Invalid { op: format!("value for {key:?}"), what: e.to_string() })
}

/// Decodes a value as read.
///
/// # Errors
/// [`StoreError::Corrupt`] naming the key, its revision and the place in the JSON.
pub fn decode<T: DeserializeOwned>(kv: &KeyValue) -> Result<T, StoreError> {
    serde_json::from_slice(&kv.value).map_err(|e| StoreError::Corrupt {
        op: format!("decoding {:?} at revision {}", kv.key, kv.mod_revision),
        what: e.to_string(),
    })
}
