//! What goes wrong is told, with its remedy, and nothing panics: libraries that are missing or too old,
//! no device, no memory, kernels that fail, kernels on disk that are damaged.

mod support;

use drumline_cuda::compile::{Compiler, SOURCES};
use drumline_cuda::{Cuda, CudaError, CudaOptions, Device, Library};
use drumline_tensor::{Backend, TensorError};

fn opened() -> Result<Cuda, CudaError> {
    let device = support::device_options();
    Cuda::new(&CudaOptions { device, ..CudaOptions::default() })
}

#[test]
fn a_machine_without_the_driver_says_so() {
    if drumline_cuda::library::present(Library::Driver) {
        return eprintln!("skipped: this machine has a driver");
    }
    let error = opened().err().expect("there is nothing to open");
    assert_eq!(error, CudaError::Missing(Library::Driver));
    let text = error.to_string();
    assert!(text.contains("libcuda.so.1") && text.contains("drumline doctor"), "{text}");
}

#[test]
fn a_machine_without_a_device_says_so() {
    support::on_device_with("a_machine_without_a_device_says_so", Some("no-device"), |_| {
        let text = opened().err().expect("there is none").to_string();
        assert!(text.contains("CUDA_ERROR_NO_DEVICE"), "{text}");
    });
}

#[test]
fn an_old_driver_is_refused() {
    support::on_device_with("an_old_driver_is_refused", Some("old-driver"), |_| {
        let error = opened().err().expect("it is too old");
        let library = Library::Driver;
        assert_eq!(error, CudaError::TooOld { library, got: 12_020, needed: 13_000 });
    });
}

#[test]
fn a_device_that_is_not_there_is_named() {
    support::on_device("a_device_that_is_not_there_is_named", |_| {
        let mut options = support::device_options();
        options.ordinal = 77;
        let error = Device::open(&options).expect_err("there is no such device");
        assert!(error.to_string().starts_with("there is no GPU 77"), "{error}");
    });
}

#[test]
fn memory_that_runs_out_is_an_error_with_its_numbers() {
    let fault = Some("memory=50000000");
    support::on_device_with("memory_that_runs_out_is_an_error_with_its_numbers", fault, |_| {
        let cuda = opened().expect("the workspace fits");
        let error = cuda.alloc(10_000_000).expect_err("40 MB do not fit beside it");
        let text = error.to_string();
        assert!(text.contains("[10000000] f32") && text.contains("40000000 bytes"), "{text}");
        assert_eq!(cuda.status(), Ok(()), "the device goes on");
        assert!(cuda.alloc(1000).is_ok());
    });
}

#[test]
fn a_kernel_that_fails_is_told_once_and_ends_the_work() {
    let fault = Some("launch-fails=2");
    support::on_device_with("a_kernel_that_fails_is_told_once_and_ends_the_work", fault, |_| {
        let cuda = opened().expect("there is a device");
        let mut buffer = cuda.alloc(100).expect("it fits");
        cuda.fill(cuda.view_mut(&mut buffer, 0..100), 1.0);
        assert_eq!(cuda.status(), Ok(()));
        cuda.fill(cuda.view_mut(&mut buffer, 0..50), 2.0);
        let Err(TensorError::Device { operation, message }) = cuda.status() else {
            panic!("the failure was not seen");
        };
        assert_eq!(operation, "fill [50]");
        assert!(message.contains("CUDA_ERROR_LAUNCH_FAILED"), "{message}");
        // Later work is refused, quietly: the first failure is what is told.
        cuda.fill(cuda.view_mut(&mut buffer, 0..70), 3.0);
        assert_eq!(cuda.sum_squares(cuda.view(&buffer, 0..100)), 0.0);
        assert!(
            matches!(cuda.status(), Err(TensorError::Device { operation, .. }) if operation == "fill [50]")
        );
        assert!(cuda.alloc(1).is_err());
    });
}

#[test]
fn kernels_are_compiled_once_and_damaged_ones_again() {
    support::on_device("kernels_are_compiled_once_and_damaged_ones_again", |_| {
        let own = format!("drumline-kernels-{}", std::process::id());
        let folder = std::env::temp_dir().join(own);
        let source = *SOURCES.iter().find(|s| s.name == "optimizer.cu").expect("it is there");
        let compiler = Compiler::new((9, 0), Some(&folder));
        let (first, made) = compiler.code(source).expect("it compiles");
        assert!(made);
        let (second, made) = compiler.code(source).expect("it is there");
        assert!(!made && first == second);
        let entry = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
        let whole = std::fs::read(&entry).unwrap();
        std::fs::write(&entry, &whole[..whole.len() / 2]).unwrap();
        let (third, made) = compiler.code(source).expect("it compiles again");
        assert!(made && !third.is_empty());
        std::fs::remove_dir_all(folder).unwrap();
    });
}
