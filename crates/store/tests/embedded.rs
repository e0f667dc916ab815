//! The embedded store passes the conformance suite.

use std::sync::Arc;

use async_trait::async_trait;
use drumline_ports::conformance::store::{Loss, Subject};
use drumline_ports::store::Store;
use drumline_store::embedded::{EmbeddedOptions, EmbeddedStore, Fault};

struct Embedded {
    store: Arc<EmbeddedStore>,
    _folder: tempfile::TempDir,
}

#[async_trait]
impl Subject for Embedded {
    fn direct(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store) as Arc<dyn Store>
    }

    fn disturbed(&self) -> Arc<dyn Store> {
        self.direct()
    }

    fn lose_next(&self, what: Loss) {
        self.store.inject(match what {
            Loss::Ack => Fault::LoseAck,
            Loss::Request => Fault::LoseRequest,
        });
    }

    // There is no connection to cut: the watcher falls behind instead.
    async fn cut(&self) {}

    async fn restore(&self) {}
}

async fn embedded() -> Option<Embedded> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("state/store.redb");
    let store = EmbeddedStore::open(&path, &EmbeddedOptions::default()).expect("opens");
    Some(Embedded { store: Arc::new(store), _folder: folder })
}

drumline_ports::store_conformance!(embedded());
