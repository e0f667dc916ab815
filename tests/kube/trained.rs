//! Tier 3: a training run as real pods. One pod is deleted on the way, the gang goes on from its
//! last checkpoint, and the model is served through the gateway's service.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use drumline_operator::deploy;
use drumline_operator::job::resource;
use drumline_spec::JobKind;
use k8s_openapi::api::core::v1::{Secret, Service};
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};

use crate::native::{dataset, training, until_checkpoint};
use crate::real::{SPACE, Stage};

const T: JobKind = JobKind::TrainingJob;
const S: JobKind = JobKind::ModelService;
const STEPS: u64 = 400;

/// Makes the folder that all ranks share, which any user may write: ranks are not root.
pub(crate) fn shared_folder(folder: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(folder).unwrap();
    dataset(folder);
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777)).unwrap();
}

impl Stage {
    async fn apply_in(&self, kind: JobKind, name: &str, folder: &Path, spec: Value) {
        let mut object = DynamicObject::new(name, &resource(kind));
        let annotation = ("drumline.dev/host-path".to_owned(), folder.display().to_string());
        object.metadata.annotations = Some([annotation].into());
        object.data = json!({ "spec": spec });
        let params = PatchParams::apply("test");
        self.jobs(kind).patch(name, &params, &Patch::Apply(&object)).await.unwrap();
    }
}

/// Trains, loses a pod, resumes, serves.
pub(crate) async fn a_run_is_trained_and_served(stage: &Stage, folder: &Path) {
    let slowly = stage.real.slowly();
    stage.apply_in(T, "demo", folder, training(STEPS)).await;
    stage.phase(T, "demo", "running").await;
    until_checkpoint(&folder.join("run")).await;
    stage.pods().delete("demo-t1-1", &DeleteParams::default()).await.unwrap();
    // It is asked to end and has a while for it: until the next attempt there is none to be faster than.
    stage.attempt(T, "demo", 2).await;
    drop(slowly);
    let done = stage.phase(T, "demo", "succeeded").await;
    assert_eq!((&done["attempt"], &done["restarts"]), (&json!(2), &json!(1)), "{done}");
    let log = stage.log("demo-t2-0").await;
    assert!(log.contains("continues from step"), "{log}");
    let loss: f64 = done["loss"].as_str().unwrap().parse().unwrap();
    assert!(loss > 0.0 && loss < 5.0, "an untrained model's is ln 300 = 5.7: {loss}");
    println!("trained by pods, through the loss of one, to a loss of {loss}");

    let service = json!({
        "model": "run", "servedName": "demo", "parallelism": { "tensor": 2 },
        "maxContext": 64, "maxBatch": 2,
    });
    stage.apply_in(S, "demo", folder, service).await;
    stage.phase(S, "demo", "running").await;
    let services: Api<Service> = Api::namespaced(stage.client.clone(), SPACE);
    let address = services.get(deploy::GATEWAY).await.unwrap().spec.unwrap().cluster_ip.unwrap();
    stage.real.lead_to(&address);
    let address: SocketAddr = format!("{address}:80").parse().unwrap();
    let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), SPACE);
    let tokens = secrets.get("drumline-tokens").await.unwrap().data.unwrap();
    let key = String::from_utf8(tokens["gateway"].0.clone()).unwrap();
    let asked = || async {
        let answer = complete(address, &key).await?;
        let tokens = answer["usage"]["completion_tokens"].as_u64();
        if tokens == Some(8) { Ok(()) } else { Err(answer.to_string()) }
    };
    let took = stage.until("answered through the gateway", asked).await;
    println!("served through the gateway after {took:.1?}");
    let refused = complete(address, "another-key-that-nobody-gave").await.unwrap();
    assert!(refused["choices"].is_null(), "{refused}");
    for (kind, name) in [(T, "demo"), (S, "demo")] {
        stage.jobs(kind).delete(name, &DeleteParams::default()).await.unwrap();
    }
}

/// Asks for eight tokens.
async fn complete(gateway: SocketAddr, key: &str) -> Result<Value, String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let body = json!({ "model": "demo", "prompt": "line 1", "max_tokens": 8, "temperature": 0,
                       "ignore_eos": true })
    .to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: models.example.org\r\nAuthorization: Bearer {key}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let talk = async {
        let mut stream = tokio::net::TcpStream::connect(gateway).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    let text = tokio::time::timeout(Duration::from_secs(30), talk)
        .await
        .map_err(|_| "no answer in 30 s".to_owned())?
        .map_err(|error| error.to_string())?;
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok(serde_json::from_str(body).unwrap_or_else(|_| json!({ "raw": text })))
}
