//! `drumline version`.

use clap::Args;
use drumline_wire::v1;
use serde_json::json;

use crate::client::Access;
use crate::failure::Failure;
use crate::output::{self, Format};

/// Show this program's version.
#[derive(Debug, Args)]
pub struct VersionArgs {
    /// Also ask the cluster.
    #[arg(long)]
    pub cluster: bool,
}

/// This program's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Runs the command.
///
/// # Errors
/// With `--cluster`: unreachable.
pub async fn run(args: &VersionArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let os = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
    let mut value = json!({
        "version": VERSION,
        "platform": os,
        "manifests": drumline_spec::table::API_VERSION,
    });
    let mut text =
        format!("drumline {VERSION} ({os}, manifests {})\n", drumline_spec::table::API_VERSION);
    if args.cluster {
        let client = access.connect().await?;
        let cluster =
            client.call(|mut c| async move { c.version(v1::VersionRequest {}).await }).await?;
        let dashboard = access.state.dashboard_link(&cluster.dashboard_url);
        value["cluster"] = json!({
            "version": cluster.version,
            "control": client.address,
            "dashboard": dashboard,
            "metrics": cluster.metrics_url,
            "gateway": cluster.gateway_url,
        });
        text.push_str(&format!("cluster {} at {}\n", cluster.version, client.address));
        for (name, url) in [
            ("dashboard", &dashboard),
            ("metrics", &cluster.metrics_url),
            ("gateway", &cluster.gateway_url),
        ] {
            if !url.is_empty() {
                text.push_str(&format!("  {name:<10}{url}\n"));
            }
        }
    }
    output::value(format, &value, || text)
}
