//! Generates the gRPC code from `proto/` without a protoc on the machine.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Asked for when it runs: a built script may be run for a copy of the tree.
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    let files =
        ["control", "agent", "inference"].map(|name| format!("drumline/v1alpha1/{name}.proto"));
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(&files, [&root])?;
    // Without transport constructors: `AgentLink` has a call named `connect` of its own, and which
    // features the code generator has depends on who else is in the build.
    tonic_prost_build::configure().build_transport(false).compile_fds(descriptors)?;
    Ok(())
}
