//! Between the port's words and etcd's: keys under a root, signed numbers, transactions.

use bytes::Bytes;
use etcd_client::{
    Compare as EtcdCompare, CompareOp, DeleteOptions, PutOptions, ResponseHeader, Txn as EtcdTxn,
    TxnOp, TxnOpResponse, TxnResponse,
};

use drumline_ports::store::{
    Compare, Event, EventKind, KeyValue, LeaseId, Op, OpResult, Revision, StoreError, Txn,
    TxnOutcome,
};

/// etcd counts in signed numbers that are never negative.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The other way round.
pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// Reads the store's revision off an answer.
pub(super) fn header(op: &str, header: Option<&ResponseHeader>) -> Result<Revision, StoreError> {
    let header = header.ok_or_else(|| StoreError::Corrupt {
        op: op.to_owned(),
        what: "an answer without a header".to_owned(),
    })?;
    Ok(Revision(unsigned(header.revision())))
}

/// The keys under one root.
#[derive(Debug, Clone)]
pub(super) struct Namespace {
    root: String,
}

impl Namespace {
    pub(super) fn new(root: &str) -> Self {
        Self { root: root.to_owned() }
    }

    /// The key as etcd has it.
    pub(super) fn key(&self, key: &str) -> Vec<u8> {
        let full = format!("{}{key}", self.root);
        if full.is_empty() {
            // Only the prefix of everything is empty, and etcd's least key stands for it.
            return vec![0];
        }
        full.into_bytes()
    }

    /// The first key under a prefix, and the first after it.
    pub(super) fn span(&self, prefix: &str) -> (Vec<u8>, Vec<u8>) {
        let start = self.key(prefix);
        (start.clone(), end_of(&start))
    }

    /// The key as the port has it.
    fn strip(&self, op: &str, full: &[u8]) -> Result<String, StoreError> {
        let text = std::str::from_utf8(full).ok();
        let key = text.and_then(|t| t.strip_prefix(self.root.as_str()));
        key.map(str::to_owned).ok_or_else(|| StoreError::Corrupt {
            op: op.to_owned(),
            what: format!(
                "key {:?} is no text under {:?}: another program writes there",
                String::from_utf8_lossy(full),
                self.root
            ),
        })
    }

    pub(super) fn key_value(
        &self,
        op: &str,
        kv: &etcd_client::KeyValue,
    ) -> Result<KeyValue, StoreError> {
        Ok(KeyValue {
            key: self.strip(op, kv.key())?,
            value: Bytes::copy_from_slice(kv.value()),
            create_revision: Revision(unsigned(kv.create_revision())),
            mod_revision: Revision(unsigned(kv.mod_revision())),
            version: unsigned(kv.version()),
            lease: (kv.lease() != 0).then(|| LeaseId(unsigned(kv.lease()))),
        })
    }

    pub(super) fn event(&self, op: &str, event: &etcd_client::Event) -> Result<Event, StoreError> {
        let kv = event.kv().ok_or_else(|| StoreError::Corrupt {
            op: op.to_owned(),
            what: "an event without a key".to_owned(),
        })?;
        let kind = match event.event_type() {
            etcd_client::EventType::Put => EventKind::Put(self.key_value(op, kv)?),
            etcd_client::EventType::Delete => EventKind::Delete(self.strip(op, kv.key())?),
        };
        Ok(Event { revision: Revision(unsigned(kv.mod_revision())), kind })
    }

    pub(super) fn txn(&self, txn: &Txn) -> EtcdTxn {
        let compares: Vec<_> = txn.compares.iter().map(|c| self.compare(c)).collect();
        let ops = |ops: &[Op]| -> Vec<TxnOp> { ops.iter().map(|op| self.op(op)).collect() };
        EtcdTxn::new().when(compares).and_then(ops(&txn.then_ops)).or_else(ops(&txn.else_ops))
    }

    fn compare(&self, compare: &Compare) -> EtcdCompare {
        let key = self.key(compare.key());
        let equal = CompareOp::Equal;
        match compare {
            // A key that does not exist has create revision 0.
            Compare::Absent { .. } => EtcdCompare::create_revision(key, equal, 0),
            Compare::Present { .. } => EtcdCompare::create_revision(key, CompareOp::NotEqual, 0),
            Compare::ModRevision { is, .. } => EtcdCompare::mod_revision(key, equal, signed(is.0)),
            Compare::CreateRevision { is, .. } => {
                EtcdCompare::create_revision(key, equal, signed(is.0))
            }
            Compare::Value { is, .. } => EtcdCompare::value(key, equal, is.to_vec()),
        }
    }

    fn op(&self, op: &Op) -> TxnOp {
        let key = self.key(op.key());
        match op {
            Op::Put { value, lease, .. } => {
                let lease = lease.map_or(0, |l| signed(l.0));
                let options = PutOptions::new().with_lease(lease);
                TxnOp::put(key, value.to_vec(), Some(options))
            }
            Op::Delete { .. } => TxnOp::delete(key, None),
            Op::DeletePrefix { .. } => {
                let options = DeleteOptions::new().with_range(end_of(&key));
                TxnOp::delete(key, Some(options))
            }
            Op::Get { .. } => TxnOp::get(key, None),
        }
    }

    pub(super) fn outcome(&self, op: &str, answer: &TxnResponse) -> Result<TxnOutcome, StoreError> {
        let revision = header(op, answer.header())?;
        let results = answer.op_responses().into_iter().map(|result| match result {
            TxnOpResponse::Put(_) => Ok(OpResult::Put),
            TxnOpResponse::Delete(deleted) => Ok(OpResult::Deleted(unsigned(deleted.deleted()))),
            TxnOpResponse::Get(mut found) => {
                let first = found.take_kvs().into_iter().next();
                let first = first.map(|kv| self.key_value(op, &kv)).transpose()?;
                Ok(OpResult::Got(first))
            }
            TxnOpResponse::Txn(_) => Err(StoreError::Corrupt {
                op: op.to_owned(),
                what: "the result of a nested transaction, which was not sent".to_owned(),
            }),
        });
        Ok(TxnOutcome {
            succeeded: answer.succeeded(),
            revision,
            results: results.collect::<Result<_, _>>()?,
        })
    }
}

/// The first key after all that start with `prefix`; a single 0 means "to the very end".
fn end_of(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if end == [0] {
        return vec![0];
    }
    while let Some(last) = end.last_mut() {
        if *last < u8::MAX {
            *last += 1;
            return end;
        }
        end.pop();
    }
    vec![0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix_is_the_first_key_after_it() {
        assert_eq!(end_of(b"a/"), b"a0");
        assert_eq!(end_of(&[b'a', 0xff, 0xff]), b"b");
        assert_eq!(end_of(&[0xff]), [0]);
        assert_eq!(end_of(&[0]), [0], "everything");
    }

    #[test]
    fn keys_live_under_the_root() {
        let names = Namespace::new("team/");
        assert_eq!(names.key("jobs/a"), b"team/jobs/a");
        assert_eq!(names.span(""), (b"team/".to_vec(), b"team0".to_vec()));
        assert_eq!(names.strip("get", b"team/jobs/a"), Ok("jobs/a".to_owned()));
        assert!(names.strip("get", b"other/jobs/a").is_err());
        assert!(names.strip("get", b"team/\xff").is_err());
        assert_eq!(Namespace::new("").span(""), (vec![0], vec![0]));
    }
}
