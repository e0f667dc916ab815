//! The etcd store passes the conformance suite on a real server, and outlives that server.
#![cfg(feature = "etcd")]

mod proxy;
mod server;
mod tls;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use drumline_ports::conformance::store::{Loss, Subject};
use drumline_ports::store::{Change, Op, Store, StoreError, Txn, Watcher};
use drumline_store::etcd::{EtcdOptions, EtcdStore};
use proxy::Proxy;
use server::EtcdServer;

struct Etcd {
    direct: Arc<EtcdStore>,
    disturbed: Arc<EtcdStore>,
    proxy: Proxy,
    _server: EtcdServer,
}

#[async_trait]
impl Subject for Etcd {
    fn direct(&self) -> Arc<dyn Store> {
        Arc::clone(&self.direct) as Arc<dyn Store>
    }

    fn disturbed(&self) -> Arc<dyn Store> {
        Arc::clone(&self.disturbed) as Arc<dyn Store>
    }

    fn lose_next(&self, what: Loss) {
        self.proxy.lose_next(what);
    }

    async fn cut(&self) {
        self.proxy.cut();
    }

    async fn restore(&self) {
        self.proxy.restore();
    }
}

async fn etcd() -> Option<Etcd> {
    let server = EtcdServer::start().await?;
    let proxy = Proxy::start(server.port()).await;
    let connect = async |member: String| {
        let connected = EtcdStore::connect(&[member], &EtcdOptions::default()).await;
        Arc::new(connected.expect("connects"))
    };
    Some(Etcd {
        direct: connect(server.member()).await,
        disturbed: connect(proxy.member()).await,
        proxy,
        _server: server,
    })
}

drumline_ports::store_conformance!(etcd());

fn put(key: &str, value: &str) -> Txn {
    Txn::new().then(Op::put(key, value.to_owned()))
}

#[tokio::test]
async fn the_proxy_really_loses_requests() {
    let Some(etcd) = etcd().await else { return };
    for loss in [Loss::Ack, Loss::Request] {
        etcd.lose_next(loss);
        let error = etcd.disturbed.txn(put("k", "1")).await.expect_err("lost");
        assert!(error.is_unknown(), "{error}");
    }
    assert_eq!(etcd.proxy.fired(), 2);
}

#[tokio::test]
async fn a_store_and_its_watchers_outlive_the_server() {
    let Some(mut server) = EtcdServer::start().await else {
        return;
    };
    let options = EtcdOptions { deadline: Duration::from_secs(3), ..EtcdOptions::default() };
    let store = EtcdStore::connect(&[server.member()], &options).await.expect("connects");
    let store: Arc<dyn Store> = Arc::new(store);
    let before = store.txn(put("k", "1")).await.expect("put").revision;
    let mut watcher = Watcher::new(Arc::clone(&store), "");
    assert!(matches!(watcher.next().await, Ok(Change::Reset(_))));

    server.kill();
    let started = Instant::now();
    let error = store.get("k").await.expect_err("nobody is there");
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
    store.txn(put("k", "lost")).await.expect_err("nobody is there");
    // Two calls, and as much again for a machine that does other things too.
    assert!(started.elapsed() < options.deadline * 4, "a deadline was missed");

    server.restart().await;
    let after = store.txn(put("k", "2")).await.expect("reconnects").revision;
    assert!(after > before, "acknowledged revisions survive a kill");
    let seen = tokio::time::timeout(Duration::from_secs(60), watcher.next()).await;
    let Ok(Ok(Change::Events(events))) = seen else {
        panic!("the watcher did not go on: {seen:?}");
    };
    assert_eq!(events.last().map(|e| e.revision), Some(after));
    assert_eq!(watcher.listings(), 1);
}

#[tokio::test]
async fn an_address_without_a_server_says_what_to_check() {
    let options = EtcdOptions { deadline: Duration::from_secs(1), ..EtcdOptions::default() };
    let member = format!("127.0.0.1:{}", server::free_port());
    let connected = EtcdStore::connect(std::slice::from_ref(&member), &options).await;
    let error = connected.err().expect("nobody is there").to_string();
    assert!(error.contains(&member) && error.contains("refused"), "{error}");
    assert!(error.contains("check that it runs"), "{error}");
}

#[tokio::test]
async fn roots_keep_two_fleets_on_one_cluster_apart() {
    let Some(server) = EtcdServer::start().await else {
        return;
    };
    let under = async |root: &str| {
        let options = EtcdOptions { root: root.to_owned(), ..EtcdOptions::default() };
        EtcdStore::connect(&[server.member()], &options).await.expect("connects")
    };
    let (one, two, all) = (under("one/").await, under("two/").await, under("").await);
    one.txn(put("k", "1")).await.expect("put");
    two.txn(put("k", "2")).await.expect("put");
    assert_eq!(one.range("").await.expect("range").items.len(), 1);
    assert_eq!(two.get("k").await.expect("get").expect("there").value, "2");
    let keys: Vec<String> =
        all.range("").await.expect("range").items.into_iter().map(|kv| kv.key).collect();
    assert_eq!(keys, ["one/k", "two/k"]);
    one.txn(Txn::new().then(Op::delete_prefix("k"))).await.expect("delete");
    assert_eq!(all.range("").await.expect("range").items.len(), 1);
}
