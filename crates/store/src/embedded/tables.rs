//! How the embedded store lies on disk: five tables of one redb file.

use bytes::Bytes;
use redb::{ReadableTable, TableDefinition};

use drumline_ports::store::{Event, EventKind, KeyValue, LeaseId, Revision};

/// The layout's version, under [`FORMAT`]. Raised by every change that older code cannot read.
pub(super) const FORMAT_VERSION: u64 = 1;

/// Counters by name.
pub(super) const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Name of the layout version in [`META`].
pub(super) const FORMAT: &str = "format";
/// Name of the present revision in [`META`].
pub(super) const REVISION: &str = "revision";
/// Name of the newest compacted revision in [`META`].
pub(super) const COMPACTED: &str = "compacted";
/// Name of the bytes that history takes in [`META`], for the automatic bound.
pub(super) const HISTORY_BYTES: &str = "history_bytes";
/// Name of the id that the next lease gets in [`META`].
pub(super) const NEXT_LEASE: &str = "next_lease";

/// Created at, modified at, version, lease (0 for none), value.
pub(super) type Record = (u64, u64, u64, u64, &'static [u8]);

/// The present keys.
pub(super) const CURRENT: TableDefinition<&str, Record> = TableDefinition::new("current");

/// Revision, and the place within it.
pub(super) type Place = (u64, u32);

/// Key, whether it was put (else deleted), created at, version, lease, value.
pub(super) type Change = (&'static str, bool, u64, u64, u64, &'static [u8]);

/// Every change since the last compaction.
pub(super) const HISTORY: TableDefinition<Place, Change> = TableDefinition::new("history");

/// Time to live in milliseconds by lease.
pub(super) const LEASES: TableDefinition<u64, u64> = TableDefinition::new("leases");

/// The keys of each lease.
pub(super) const LEASE_KEYS: TableDefinition<(u64, &str), ()> = TableDefinition::new("lease_keys");

/// What a change takes in history beside key and value, about.
const CHANGE_OVERHEAD_BYTES: u64 = 64;

/// Returns about how many bytes a change takes in history.
pub(super) fn change_bytes(key: &str, value: &[u8]) -> u64 {
    (key.len() + value.len()) as u64 + CHANGE_OVERHEAD_BYTES
}

/// Turns a stored lease number into an id.
pub(super) fn lease_id(stored: u64) -> Option<LeaseId> {
    (stored != 0).then_some(LeaseId(stored))
}

/// Builds a key with its record.
pub(super) fn key_value(key: &str, record: (u64, u64, u64, u64, &[u8])) -> KeyValue {
    let (create, modified, version, lease, value) = record;
    KeyValue {
        key: key.to_owned(),
        value: Bytes::copy_from_slice(value),
        create_revision: Revision(create),
        mod_revision: Revision(modified),
        version,
        lease: lease_id(lease),
    }
}

/// Builds the event of a stored change.
pub(super) fn event(revision: u64, change: (&str, bool, u64, u64, u64, &[u8])) -> Event {
    let (key, put, create, version, lease, value) = change;
    let kind = if put {
        EventKind::Put(key_value(key, (create, revision, version, lease, value)))
    } else {
        EventKind::Delete(key.to_owned())
    };
    Event { revision: Revision(revision), kind }
}

/// Reads one key.
pub(super) fn read(
    current: &impl ReadableTable<&'static str, Record>,
    key: &str,
) -> Result<Option<KeyValue>, redb::StorageError> {
    Ok(current.get(key)?.map(|found| key_value(key, found.value())))
}

/// Reads every key under a prefix.
pub(super) fn read_prefix(
    current: &impl ReadableTable<&'static str, Record>,
    prefix: &str,
) -> Result<Vec<KeyValue>, redb::StorageError> {
    let mut items = Vec::new();
    for entry in current.range(prefix..)? {
        let (key, record) = entry?;
        if !key.value().starts_with(prefix) {
            break;
        }
        items.push(key_value(key.value(), record.value()));
    }
    Ok(items)
}
