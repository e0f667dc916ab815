//! Matrix products by cuBLASLt, with a plan for each shape made once.
//!
//! cuBLASLt counts in columns: a row-major `[r, c]` is its `c x r`. A product is therefore written as
//! that of the transposes: `y = x . w` is `y' = w' . x'`, and a bias along a row of `y` lies along a
//! column of `y'`, where its epilogue adds it.
#![allow(unsafe_code, reason = "cuBLASLt is a C library")]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};

use crate::device::Device;
use crate::error::CudaError;
use crate::library::{self, Library};
use crate::memory::Bytes;

/// What cuBLASLt may use for itself: what its documentation advises for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Plans kept; a model has a few dozen shapes.
const PLANS_MAX: usize = 4096;

/// How factors are stored and what products round them to. Sums are f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Factors {
    /// f32, nothing rounded.
    F32,
    /// f32, rounded to 10 bits of mantissa inside the tensor cores.
    Tf32,
    /// bf16.
    Bf16,
}

/// A factor: its address, whether cuBLASLt is to transpose it, and the distance of its columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Factor {
    pub(crate) address: u64,
    pub(crate) transposed: bool,
    pub(crate) stride: usize,
}

/// `out (m x n, columns m apart) = a (m x k) . b (k x n) (+ out) (+ bias along m)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) factors: Factors,
    pub(crate) a: Factor,
    pub(crate) b: Factor,
    pub(crate) out: u64,
    pub(crate) accumulate: bool,
    pub(crate) bias: Option<u64>,
}

/// What a plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 5],
    factors: Factors,
    transposed: [bool; 2],
    accumulate: bool,
    bias: bool,
    alignments: [u32; 3],
}

struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// cuBLASLt on one device. Used by one thread at a time.
pub(crate) struct Matmul {
    device: Arc<Device>,
    handle: sys::cublasLtHandle_t,
    workspace: Bytes,
    plans: HashMap<Key, Plan>,
}

// SAFETY: cuBLASLt's handle and descriptions may be used from any thread, one at a time.
unsafe impl Send for Matmul {}

fn checked<T>(call: &'static str, result: Result<T, result::CublasError>) -> Result<T, CudaError> {
    result.map_err(|error| CudaError::CublasLt { call, status: error.to_string() })
}

/// The alignment of an address, as far as a plan cares.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

impl Matmul {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        if !library::present(Library::CublasLt) {
            return Err(CudaError::Missing(Library::CublasLt));
        }
        device.bind()?;
        let handle = checked("cublasLtCreate", result::create_handle())?;
        let workspace = Bytes::zeros(device, WORKSPACE)?;
        Ok(Self { device: Arc::clone(device), handle, workspace, plans: HashMap::new() })
    }

    /// Queues a product.
    pub(crate) fn multiply(&mut self, p: &Product) -> Result<(), CudaError> {
        let key = Key {
            sizes: [p.m, p.n, p.k, p.a.stride, p.b.stride],
            factors: p.factors,
            transposed: [p.a.transposed, p.b.transposed],
            accumulate: p.accumulate,
            bias: p.bias.is_some(),
            alignments: [p.a.address, p.b.address, p.out].map(alignment),
        };
        if !self.plans.contains_key(&key) {
            if self.plans.len() >= PLANS_MAX {
                self.plans.clear();
            }
            let plan = self.plan(&key)?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        if let Some(bias) = p.bias {
            let which = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            set_description(plan.description, which, &bias)?;
        }
        let (one, beta) = (1.0f32, if p.accumulate { 1.0f32 } else { 0.0 });
        let [a, b, out] = plan.layouts;
        let pointer = |address: u64| address as *const c_void;
        // SAFETY: the plan's layouts are of the product's sizes, the caller has checked that the
        // buffers hold them, and the workspace lives as long as the handle.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.handle,
                plan.description,
                (&raw const one).cast(),
                pointer(p.a.address),
                a,
                pointer(p.b.address),
                b,
                (&raw const beta).cast(),
                pointer(p.out),
                out,
                p.out as *mut c_void,
                out,
                &raw const plan.algorithm,
                self.workspace.address() as *mut c_void,
                WORKSPACE,
                self.device.stream().cast(),
            )
            .result()
        };
        checked("cublasLtMatmul", status)
    }

    fn plan(&self, key: &Key) -> Result<Plan, CudaError> {
        use sys::cublasComputeType_t as Compute;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preferred;
        use sys::cudaDataType as Type;
        let compute = match key.factors {
            Factors::Tf32 => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
            Factors::F32 | Factors::Bf16 => Compute::CUBLAS_COMPUTE_32F,
        };
        let stored = match key.factors {
            Factors::Bf16 => Type::CUDA_R_16BF,
            Factors::F32 | Factors::Tf32 => Type::CUDA_R_32F,
        };
        let [m, n, k, a_stride, b_stride] = key.sizes;
        let description = result::create_matmul_desc(compute, Type::CUDA_R_32F);
        // Dropped, with what it holds, if a later call fails.
        let mut plan = Plan {
            description: checked("cublasLtMatmulDescCreate", description)?,
            layouts: [std::ptr::null_mut(); 3],
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        let [a_transposed, b_transposed] = key.transposed;
        set_description(
            plan.description,
            Attribute::CUBLASLT_MATMUL_DESC_TRANSA,
            &i32::from(a_transposed),
        )?;
        set_description(
            plan.description,
            Attribute::CUBLASLT_MATMUL_DESC_TRANSB,
            &i32::from(b_transposed),
        )?;
        if key.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            set_description(plan.description, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
        let (a_rows, a_columns) = if a_transposed { (k, m) } else { (m, k) };
        let (b_rows, b_columns) = if b_transposed { (n, k) } else { (k, n) };
        let shapes = [
            (stored, a_rows, a_columns, a_stride),
            (stored, b_rows, b_columns, b_stride),
            (Type::CUDA_R_32F, m, n, m),
        ];
        for (layout, (dtype, rows, columns, stride)) in plan.layouts.iter_mut().zip(shapes) {
            let made = result::create_matrix_layout(
                dtype,
                rows as u64,
                columns as u64,
                i64::try_from(stride).unwrap_or(i64::MAX),
            );
            *layout = checked("cublasLtMatrixLayoutCreate", made)?;
        }
        let preference =
            Preference(checked("cublasLtMatmulPreferenceCreate", result::create_matmul_pref())?);
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE as u64))?;
        let [a, b, out] = key.alignments;
        for (which, bytes) in [
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a),
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b),
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out),
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
        ] {
            preference.set(which, &bytes)?;
        }
        let [a, b, out] = plan.layouts;
        // SAFETY: everything was made above and is live.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle,
                plan.description,
                a,
                b,
                out,
                out,
                preference.0,
            )
        };
        plan.algorithm = checked("cublasLtMatmulAlgoGetHeuristic", found)?.algo;
        Ok(plan)
    }
}

fn set_description<T>(
    description: sys::cublasLtMatmulDesc_t,
    which: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<(), CudaError> {
    // SAFETY: the description is live; the attribute is of the size of `T`, which cuBLASLt checks.
    let set = unsafe {
        result::set_matmul_desc_attribute(
            description,
            which,
            std::ptr::from_ref(value).cast(),
            size_of::<T>(),
        )
    };
    checked("cublasLtMatmulDescSetAttribute", set)
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn set<T>(
        &self,
        which: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<(), CudaError> {
        // SAFETY: as for descriptions.
        let set = unsafe {
            result::set_matmul_pref_attribute(
                self.0,
                which,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        };
        checked("cublasLtMatmulPreferenceSetAttribute", set)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: nobody else has it.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: nobody else has them; those that were not made are null.
        unsafe {
            let _ = result::destroy_matmul_desc(self.description);
            for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

impl Drop for Matmul {
    fn drop(&mut self) {
        // Work under way may use the workspace.
        let _ = self.device.synchronise();
        self.plans.clear();
        // SAFETY: nobody else has it.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
