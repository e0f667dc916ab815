//! Every kernel compiles for every architecture that is promised, with NVIDIA's own compiler. It needs
//! no GPU: NVRTC comes from the machine, or from the Python package that `tests/gpu/nvrtc` puts into
//! the build folder.

use std::path::{Path, PathBuf};
use std::process::Command;

use drumline_cuda::compile::{Compiler, SOURCES};
use drumline_cuda::{Library, library};

/// A100, H100 and H200, B200.
const ARCHITECTURES: [(i32, i32); 3] = [(8, 0), (9, 0), (10, 0)];
/// Set in the child, which finds the libraries of the package.
const CHILD: &str = "DRUMLINE_TEST_NVRTC";
/// ELF's number for CUDA.
const EM_CUDA: [u8; 2] = 190u16.to_le_bytes();

/// The folder of the package's libraries.
fn package() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?;
    let folder = target.join("nvrtc/nvidia/cu13/lib");
    folder.join("libnvrtc.so.13").is_file().then_some(folder)
}

#[test]
fn every_kernel_compiles_for_every_architecture() {
    if std::env::var_os(CHILD).is_none() {
        let Some(folder) = package() else {
            if library::present(Library::Nvrtc) {
                return compile_all();
            }
            return eprintln!("skipped: no NVRTC here; tests/gpu/nvrtc fetches it");
        };
        let output = Command::new(std::env::current_exe().expect("a test knows its own file"))
            .args(["every_kernel_compiles_for_every_architecture", "--exact", "--nocapture"])
            .env(CHILD, "1")
            .env("LD_LIBRARY_PATH", folder)
            .output()
            .expect("a test can start itself");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}{text}", String::from_utf8_lossy(&output.stdout));
        eprint!("{text}");
        return;
    }
    compile_all();
}

fn compile_all() {
    // Kept: a kernel that has not changed is not compiled again by the next run of the tests.
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cubins");
    for architecture in ARCHITECTURES {
        let compiler = Compiler::new(architecture, Some(&cache));
        for source in SOURCES {
            let (code, made) = match compiler.code(*source) {
                Ok(code) => code,
                Err(error) => panic!("{error}"),
            };
            assert!(code.starts_with(b"\x7fELF") && code[18..20] == EM_CUDA, "{}", source.name);
            let kernels = kernels(&source.whole());
            assert!(!kernels.is_empty(), "{} has kernels", source.name);
            for kernel in &kernels {
                let has = code.windows(kernel.len()).any(|w| w == kernel.as_bytes());
                assert!(has, "{}: {kernel} is not in the code", source.name);
            }
            eprintln!(
                "{} for {architecture:?}: {} kernels, {} bytes{}",
                source.name,
                kernels.len(),
                code.len(),
                if made { "" } else { " (kept)" }
            );
        }
    }
}

/// The names of a source's kernels; of those that a macro makes, what comes before its argument.
fn kernels(text: &str) -> Vec<String> {
    text.split("extern \"C\" __global__ void")
        .skip(1)
        .filter_map(|rest| {
            let rest = rest.trim_start();
            let bounds = rest.strip_prefix("__launch_bounds__(").and_then(|r| r.split_once(')'));
            let rest = bounds.map_or(rest, |(_, rest)| rest).trim_start();
            let rest = rest.trim_start_matches(['\\', '\n', ' ']);
            let name: String =
                rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            (!name.is_empty()).then_some(name)
        })
        .collect()
}
