//! Asks the parts of an embedded cluster whether they are ready.

use drumline_wire::v1;

use crate::client::Access;
use crate::cluster::{Addresses, ClusterOptions, Pids};

/// Returns where everything is, or what is missing.
///
/// An address counts only when the very process that runs now has written it.
///
/// # Errors
/// What is missing, in one line.
pub(crate) async fn probe(
    access: &Access,
    options: &ClusterOptions,
    pids: &Pids,
) -> Result<Addresses, String> {
    let pid = |name: &str| pids.lock().ok().and_then(|pids| pids.get(name).copied());
    let state = &options.state;
    let endpoint =
        state.endpoint().map_err(|_| "the control plane does not listen yet".to_owned())?;
    if pid("control") != Some(endpoint.pid) {
        return Err("the control plane is starting again".to_owned());
    }
    let gateway = state.gateway().map_err(|_| "the gateway does not listen yet".to_owned())?;
    if pid("gateway") != Some(gateway.pid) {
        return Err("the gateway is starting again".to_owned());
    }
    let client = access.connect().await.map_err(|failure| failure.to_string())?;
    let nodes = client
        .call(|mut c| async move { c.list_nodes(v1::ListNodesRequest {}).await })
        .await
        .map_err(|failure| failure.to_string())?
        .nodes;
    let expected: Vec<String> = (0..options.nodes).map(|index| format!("node-{index}")).collect();
    let ready: Vec<&v1::NodeView> = nodes
        .iter()
        .filter(|node| node.phase == "ready" && expected.contains(&node.name))
        .collect();
    if ready.len() < expected.len() {
        let absent = expected
            .iter()
            .filter(|name| !ready.iter().any(|node| node.name == **name))
            .cloned()
            .collect::<Vec<_>>()
            .join(", ");
        return Err(format!("{} of {} nodes are ready; not {absent}", ready.len(), expected.len()));
    }
    let devices: usize = ready.iter().map(|node| node.devices.len()).sum();
    Ok(Addresses {
        control: endpoint.control,
        remote: endpoint.remote,
        dashboard: state.dashboard_link(&endpoint.dashboard),
        metrics: endpoint.metrics,
        gateway: gateway.gateway,
        nodes: options.nodes,
        devices: u32::try_from(devices).unwrap_or(u32::MAX),
    })
}
