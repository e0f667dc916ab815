//! `drumline clear`: somebody has dealt with an unhealthy GPU.

use clap::Args;
use drumline_wire::v1;
use serde_json::{Value, json};

use crate::client::Access;
use crate::commands::queues::user;
use crate::failure::Failure;
use crate::output::{self, Format};

/// Say that somebody has dealt with unhealthy GPUs, so that they are offered again.
///
/// What was seen of them is forgotten. A GPU to which the driver still objects stays unhealthy.
#[derive(Debug, Args)]
pub struct ClearArgs {
    /// Devices as `drumline nodes --devices` shows them: NODE/NUMBER.
    #[arg(required = true, value_name = "NODE/NUMBER")]
    pub devices: Vec<String>,
}

/// Runs the command. Every device is tried, even if an earlier one is refused.
///
/// # Errors
/// The first failure: the user's mistake for what is no GPU; unreachable.
pub async fn run(args: &ClearArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let wanted = args.devices.iter().map(|text| parse(text)).collect::<Result<Vec<_>, _>>()?;
    let client = access.connect().await?;
    let mut first: Option<Failure> = None;
    let mut done = Vec::new();
    for (device, (node, index)) in args.devices.iter().zip(wanted) {
        let request = v1::ClearDeviceRequest { node, index, user: user() };
        match client.call(|mut c| async move { c.clear_device(request).await }).await {
            Ok(_) => done.push(device.clone()),
            Err(failure) => {
                if first.is_some() {
                    failure.report();
                }
                first.get_or_insert(failure);
            }
        }
    }
    let value = Value::Array(done.iter().map(|device| json!({ "device": device })).collect());
    output::value(format, &value, || {
        done.iter().map(|device| format!("{device} cleared\n")).collect()
    })?;
    first.map_or(Ok(()), Err)
}

fn parse(text: &str) -> Result<(String, u32), Failure> {
    let parts = text.rsplit_once('/');
    parts
        .and_then(|(node, index)| Some((node.to_owned(), index.parse().ok()?)))
        .filter(|(node, _)| !node.is_empty())
        .ok_or_else(|| {
            Failure::user(format!("{text:?} is no device; one is named NODE/NUMBER"))
                .hint("`drumline nodes --devices` lists them")
        })
}
