//! The etcd store over TLS with client certificates, on a real server.

use std::path::{Path, PathBuf};
use std::time::Duration;

use drumline_ports::store::{Op, Store, Txn};
use drumline_store::etcd::{EtcdOpenError, EtcdOptions, EtcdStore, TlsError, TlsFiles};

use crate::server::EtcdServer;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

/// An authority with one certificate for the server and the client.
struct Pki {
    folder: tempfile::TempDir,
}

impl Pki {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut ca = CertificateParams::new(Vec::new()).expect("no names");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate().expect("a key");
        let ca_cert = ca.self_signed(&ca_key).expect("signed");
        let authority = Issuer::new(ca, ca_key);
        let mut leaf = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("an address");
        leaf.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf_key = KeyPair::generate().expect("a key");
        let leaf_cert = leaf.signed_by(&leaf_key, &authority).expect("signed");
        let pki = Self { folder };
        for (name, pem) in [
            ("ca.pem", ca_cert.pem()),
            ("leaf.pem", leaf_cert.pem()),
            ("leaf.key", leaf_key.serialize_pem()),
        ] {
            std::fs::write(pki.path(name), pem).expect("written");
        }
        pki
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn files(&self) -> TlsFiles {
        TlsFiles {
            ca: Some(self.path("ca.pem")),
            cert: Some(self.path("leaf.pem")),
            key: Some(self.path("leaf.key")),
            server_name: None,
        }
    }

    fn server_arguments(&self) -> Vec<String> {
        let text = |name: &str| self.path(name).display().to_string();
        vec![
            "--client-cert-auth".to_owned(),
            format!("--trusted-ca-file={}", text("ca.pem")),
            format!("--cert-file={}", text("leaf.pem")),
            format!("--key-file={}", text("leaf.key")),
        ]
    }
}

fn options(tls: Option<TlsFiles>) -> EtcdOptions {
    EtcdOptions { deadline: Duration::from_millis(800), tls, ..EtcdOptions::default() }
}

#[tokio::test]
async fn only_the_right_certificates_get_through() {
    let pki = Pki::new();
    let Some(server) = EtcdServer::launch("https", &pki.server_arguments()) else {
        return;
    };
    let store = server.wait(&options(Some(pki.files()))).await;
    store.txn(Txn::new().then(Op::put("k", "1"))).await.expect("put");
    assert!(store.get("k").await.expect("get").is_some());

    let strangers = Pki::new();
    let without_cert = TlsFiles { ca: pki.files().ca, ..TlsFiles::default() };
    for (what, tls) in [
        ("plain text", None),
        ("no client certificate", Some(without_cert)),
        ("another authority", Some(strangers.files())),
    ] {
        let connected = EtcdStore::connect(&[server.member()], &options(tls)).await;
        let error = connected.err().unwrap_or_else(|| panic!("{what} got through"));
        assert!(matches!(error, EtcdOpenError::Unreachable { .. }), "{what}: {error}");
        assert!(error.to_string().contains(&server.member()), "{what}: {error}");
    }
}

async fn refused(tls: TlsFiles) -> TlsError {
    match EtcdStore::connect(&["127.0.0.1:1".to_owned()], &options(Some(tls))).await {
        Err(EtcdOpenError::Tls(error)) => error,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("connected to nobody"),
    }
}

#[tokio::test]
async fn a_wrong_file_is_named() {
    let pki = Pki::new();
    let missing =
        TlsFiles { ca: Some(Path::new("/nowhere/ca.pem").to_owned()), ..TlsFiles::default() };
    let error = refused(missing).await.to_string();
    assert!(error.contains("certificate authority /nowhere/ca.pem"), "{error}");
    let swapped = TlsFiles { cert: Some(pki.path("leaf.key")), ..pki.files() };
    let error = refused(swapped).await.to_string();
    assert!(error.contains("leaf.key") && error.contains("BEGIN CERTIFICATE"), "{error}");
    let half = TlsFiles { key: None, ..pki.files() };
    assert!(matches!(refused(half).await, TlsError::Half { given: "certificate" }));
}
