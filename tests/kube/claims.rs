//! Devices that a driver publishes in ResourceSlices: each rank claims the one of its plan, claims of
//! others are respected, taints keep gangs away or end them, and no claim outlives its pod.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use drumline_operator::{Driver, front};
use drumline_spec::JobKind;
use drumline_wire::v1;
use drumline_wire::v1::control_client::ControlClient;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceSlice};
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::cluster::{ADMIN, Admin, OPERATOR, Setup, own, skipped};
use crate::devices::{command, is_running};
use crate::kubelet::{Kubelets, finish};
use crate::operator::{Operator, options};

const C: JobKind = JobKind::CommandJob;
const DRIVER: &str = "gpu.nvidia.com";

fn gpu(name: &str, taint: Option<&str>) -> Value {
    let mut device = json!({
        "name": name,
        "attributes": { "type": { "string": "gpu" }, "productName": { "string": "H100" } },
        "capacity": { "memory": { "value": "80Gi" } },
    });
    if let Some(effect) = taint {
        device["taints"] = json!([{ "key": "example.org/hot", "effect": effect }]);
    }
    device
}

fn instance(name: &str) -> Value {
    json!({
        "name": name,
        "attributes": { "type": { "string": "mig" }, "productName": { "string": "H100" },
                        "profile": { "string": "1g.10gb" } },
        "capacity": { "memory": { "value": "10Gi" } },
    })
}

/// Publishes a node's devices, as its driver does.
async fn publish(admin: &Admin, node: &str, generation: u32, devices: Value) {
    let slices: Api<ResourceSlice> = Api::all(admin.client.clone());
    let slice = json!({
        "apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice",
        "metadata": { "name": format!("{node}-gpus") },
        "spec": { "driver": DRIVER, "nodeName": node, "devices": devices,
                  "pool": { "name": node, "generation": generation, "resourceSliceCount": 1 } },
    });
    let params = PatchParams::apply("driver").force();
    slices.patch(&format!("{node}-gpus"), &params, &Patch::Apply(&slice)).await.unwrap();
}

fn given(claim: &ResourceClaim) -> Vec<String> {
    let status = claim.status.iter();
    let allocated = status.filter_map(|status| status.allocation.as_ref()?.devices.as_ref());
    let results = allocated.filter_map(|devices| devices.results.as_ref()).flatten();
    results.map(|one| format!("{}/{}", one.pool, one.device)).collect()
}

/// Follows all claims, and remembers when a device was given to two of them.
fn witness(client: Client) -> Arc<Mutex<Vec<String>>> {
    let faults = Arc::new(Mutex::new(Vec::new()));
    let found = faults.clone();
    // It ends with the test's runtime.
    tokio::spawn(async move {
        let claims: Api<ResourceClaim> = Api::all(client);
        loop {
            if let Ok(all) = claims.list(&ListParams::default()).await {
                let mut taken = BTreeMap::new();
                for claim in all {
                    let name = claim.metadata.name.clone().unwrap_or_default();
                    for device in given(&claim) {
                        if let Some(other) = taken.insert(device.clone(), name.clone()) {
                            let fault = format!("{device} is given to {other} and to {name}");
                            found.lock().unwrap().push(fault);
                        }
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    faults
}

/// Every pod of an attempt claims one device, its claim gives it just that, and it asks for no other.
/// Returns the devices, in rank order.
async fn claimed(admin: &Admin, job: &str, attempt: u32, ranks: u32, class: &str) -> Vec<String> {
    let claims: Api<ResourceClaim> = Api::namespaced(admin.client.clone(), &admin.namespace);
    let mut devices = Vec::new();
    for rank in 0..ranks {
        let name = format!("{job}-c{attempt}-{rank}");
        let pod: Pod = admin.pods().get(&name).await.unwrap();
        let spec = pod.spec.unwrap();
        let resources = spec.containers[0].resources.clone().unwrap();
        assert!(resources.limits.unwrap_or_default().is_empty(), "{name}");
        let named = &spec.resource_claims.unwrap()[0];
        assert_eq!(named.resource_claim_name.as_deref(), Some(name.as_str()));
        assert_eq!(resources.claims.unwrap()[0].name, named.name);
        let claim = claims.get(&name).await.unwrap();
        let request = &claim.spec.devices.as_ref().unwrap().requests.as_ref().unwrap()[0];
        assert_eq!(request.exactly.as_ref().unwrap().device_class_name, class);
        let status = claim.status.as_ref().unwrap();
        let reserved = status.reserved_for.as_ref().unwrap();
        assert_eq!((reserved.len(), Some(&reserved[0].uid)), (1, pod.metadata.uid.as_ref()));
        let planned = &pod.metadata.annotations.unwrap()["drumline.dev/planned-resource"];
        let [device] = &given(&claim)[..] else { panic!("{name} has {:?}", given(&claim)) };
        assert_eq!(*planned, format!("{DRIVER}:{device}"));
        assert_eq!(spec.node_name.as_deref(), device.split('/').next());
        devices.push(device.clone());
    }
    devices
}

/// Gives a device to a claim, as another scheduler does.
async fn take(admin: &Admin, name: &str, device: (&str, &str)) -> Api<ResourceClaim> {
    let claims: Api<ResourceClaim> = Api::namespaced(admin.client.clone(), &admin.namespace);
    let claim = serde_json::from_value(json!({
        "metadata": { "name": name },
        "spec": { "devices": { "requests": [{ "name": "x", "exactly": {
            "deviceClassName": DRIVER } }] } },
    }))
    .unwrap();
    claims.create(&PostParams::default(), &claim).await.unwrap();
    let status = json!({ "status": { "allocation": { "devices": { "results": [{
        "request": "x", "driver": DRIVER, "pool": device.0, "device": device.1 }] } } } });
    claims.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    claims
}

async fn until_left(claims: &Api<ResourceClaim>, count: usize) {
    let mut left = Vec::new();
    for _ in 0..1200 {
        let all = claims.list(&ListParams::default()).await.unwrap();
        left = all.into_iter().filter_map(|claim| claim.metadata.name).collect();
        if left.len() == count {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not {count} claims are left: {left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_claim_the_devices_of_their_plan_and_leave_no_claim_behind() {
    // Without the gate, which is off in this version, the API server drops the taints of devices.
    let flags = vec!["--feature-gates=DRADeviceTaints=true".to_owned()];
    let cluster = match own(Setup { flags, ..Setup::default() }) {
        Ok(cluster) => cluster,
        Err(why) => return skipped(&why),
    };
    let admin = Admin::start(&cluster, "claims").await;
    for node in ["a", "b"] {
        admin.add_node(node, 0, "8").await;
    }
    publish(&admin, "a", 1, json!([gpu("gpu-0", None), gpu("gpu-1", None), instance("mig-0")]))
        .await;
    publish(&admin, "b", 1, json!([gpu("gpu-0", None), gpu("gpu-1", None)])).await;
    let claims = take(&admin, "theirs", ("b", "gpu-1")).await;
    // What an operator left that was killed: the pod was deleted, its claim was not.
    let left = serde_json::from_value(json!({
        "metadata": { "name": "gone-c1-0", "labels": { "drumline.dev/job-uid": "gone" },
            "finalizers": ["resource.kubernetes.io/delete-protection"],
            "ownerReferences": [{ "apiVersion": "v1", "kind": "Pod", "name": "gone-c1-0",
                                  "uid": "gone" }] },
        "spec": {},
    }))
    .unwrap();
    claims.create(&PostParams::default(), &left).await.unwrap();
    let faults = witness(admin.client.clone());
    let _kubelets = Kubelets::start(admin.client.clone());
    assert_eq!(claims.list(&ListParams::default()).await.unwrap().items.len(), 2);
    let mut options = options(cluster.config(OPERATOR).await, "claims");
    options.fleet.devices.drivers = vec![Driver::parse(DRIVER).unwrap()];
    let operator = Operator::run(options.clone());
    until_left(&claims, 1).await;

    admin.apply(C, "demo", command(3, &[])).await.unwrap();
    admin.wait(C, "demo", "running", is_running).await;
    let mut devices = claimed(&admin, "demo", 1, 3, DRIVER).await;
    devices.sort();
    assert_eq!(devices, ["a/gpu-0", "a/gpu-1", "b/gpu-0"]);
    admin.apply(C, "slice", command(1, &["1g.10gb"])).await.unwrap();
    admin.wait(C, "slice", "running", is_running).await;
    assert_eq!(claimed(&admin, "slice", 1, 1, "mig.nvidia.com").await, ["a/mig-0"]);

    // People see them all, and who has them.
    let channel = front::over(cluster.config(ADMIN).await, "claims".to_owned()).await.unwrap();
    let answer = ControlClient::new(channel).list_nodes(v1::ListNodesRequest {}).await.unwrap();
    let mut shown: Vec<String> = Vec::new();
    for node in answer.into_inner().nodes {
        for device in node.devices.iter().filter(|device| device.kind == "gpu") {
            shown.push(format!("{} {} {}", node.name, device.model, device.job));
        }
    }
    let theirs = "b H100 (another scheduler's pod)";
    assert_eq!(
        shown,
        ["a H100 demo", "a H100 demo", "a H100-MIG-1g.10gb slice", "b H100 demo", theirs]
    );

    // What another scheduler has given away is free once its claim is gone. The operator is replaced
    // meanwhile, and the next one knows who has what.
    admin.apply(C, "second", command(1, &["h100"])).await.unwrap();
    let waits = |status: &Value| status["reason"] == "WaitingForDevices";
    admin.wait(C, "second", "waiting", waits).await;
    operator.stop().await;
    let operator = Operator::run(options);
    claims.delete("theirs", &DeleteParams::default()).await.unwrap();
    admin.wait(C, "second", "running", is_running).await;
    assert_eq!(claimed(&admin, "second", 1, 1, DRIVER).await, ["b/gpu-1"]);
    assert_eq!(admin.status(C, "demo").await["attempt"], 1);

    // A device is tainted so that nothing new comes, then so that the gang leaves it; that is no fault of
    // the job, and of what is published then it gets what is not tainted.
    let tainted =
        |effect| json!([gpu("gpu-0", Some(effect)), gpu("gpu-1", None), instance("mig-0")]);
    publish(&admin, "a", 2, tainted("NoSchedule")).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(is_running(&admin.status(C, "demo").await));
    publish(&admin, "a", 3, tainted("NoExecute")).await;
    let status = admin.wait(C, "demo", "waiting again", waits).await;
    assert_eq!((&status["restarts"], &status["fruitless"]), (&json!(0), &json!(0)), "{status}");
    admin.add_node("c", 0, "8").await;
    publish(&admin, "c", 1, json!([gpu("gpu-0", Some("NoSchedule")), gpu("gpu-1", None)])).await;
    admin.wait(C, "demo", "running again", is_running).await;
    let mut devices = claimed(&admin, "demo", 2, 3, DRIVER).await;
    devices.sort();
    assert_eq!(devices, ["a/gpu-1", "b/gpu-0", "c/gpu-1"]);

    // A rank that has finished has no claim any more, though its pod is kept.
    until_left(&claims, 5).await;
    finish(&admin.pods(), "second-c1-0", 0).await;
    admin.wait(C, "second", "done", |status| status["phase"] == "succeeded").await;
    until_left(&claims, 4).await;
    admin.pods().get("second-c1-0").await.unwrap();
    for job in ["demo", "slice", "second"] {
        admin.jobs(C).delete(job, &DeleteParams::default()).await.unwrap();
    }
    until_left(&claims, 0).await;
    operator.stop().await;
    assert_eq!(*faults.lock().unwrap(), Vec::<String>::new());
}
