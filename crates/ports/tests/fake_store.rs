//! The fake store passes the conformance suite, and misbehaves only as the contract allows.

use std::sync::Arc;

use async_trait::async_trait;
use drumline_ports::conformance::store::{Loss, Subject};
use drumline_ports::store::Store;
use drumline_ports::store::fake::{Doom, FakeStore};

struct Fake(FakeStore);

#[async_trait]
impl Subject for Fake {
    fn direct(&self) -> Arc<dyn Store> {
        Arc::new(self.0.clone())
    }

    fn disturbed(&self) -> Arc<dyn Store> {
        Arc::new(self.0.clone())
    }

    fn lose_next(&self, what: Loss) {
        self.0.doom_next_write(match what {
            Loss::Ack => Doom::LoseAck,
            Loss::Request => Doom::LoseRequest,
        });
    }

    async fn cut(&self) {
        self.0.cut_watches();
    }

    async fn restore(&self) {}
}

async fn fake() -> Option<Fake> {
    Some(Fake(FakeStore::new()))
}

drumline_ports::store_conformance!(fake());
