//! Matrix products by cuBLASLt, with a plan for each shape made once.
//!
//! cuBLASLt counts in columns: a row-major `[r, c]` is its `c x r`. A product is therefore written as
//! that of the transposes: `y = x . w` is `y' = w' . x'`, and a bias along a row of `y` lies along a
//! column of `y'`, where its epilogue adds it.
#![allow(unsafe_code, reason = "cuBLASLt is a C library")]

use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};

use crate::device::Device;
use crate::error::CudaError;
use crate::graph::Call;
use crate::library::{self, Library};
use crate::memory::{Bytes, Kind};

/// What cuBLASLt may use for itself: what its documentation advises for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Plans kept; a model has a few dozen shapes.
const PLANS_MAX: usize = 4096;

/// The call that finds no algorithm where there is none.
const HEURISTIC: &str = "cublasLtMatmulAlgoGetHeuristic";

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Factor {
    pub(crate) address: u64,
    pub(crate) transposed: bool,
    pub(crate) stride: usize,
}

/// What is done to a product before it is stored, beside a bias: with values `[m, n]` that lie as the
/// product does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Activation {
    /// The product goes there, and its GELU to `out`.
    Gelu(u64),
    /// The product is multiplied by the slope of GELU at the values there.
    Slope(u64),
}

impl Activation {
    fn address(self) -> u64 {
        match self {
            Self::Gelu(address) | Self::Slope(address) => address,
        }
    }
}

/// `out (m x n, columns m apart) = a (m x k) . b (k x n) (+ out) (+ bias along m)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) factors: Factors,
    pub(crate) a: Factor,
    pub(crate) b: Factor,
    pub(crate) out: u64,
    /// How `out` is kept, and the bias with it.
    pub(crate) kind: Kind,
    pub(crate) accumulate: bool,
    pub(crate) bias: Option<u64>,
    pub(crate) activation: Option<Activation>,
}

/// What a plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 5],
    factors: Factors,
    kind: Kind,
    transposed: [bool; 2],
    accumulate: bool,
    bias: bool,
    activation: Option<Behind>,
    alignments: [u32; 3],
}

impl Key {
    fn of(p: &Product) -> Self {
        Self {
            sizes: [p.m, p.n, p.k, p.a.stride, p.b.stride],
            factors: p.factors,
            kind: p.kind,
            transposed: [p.a.transposed, p.b.transposed],
            accumulate: p.accumulate,
            bias: p.bias.is_some(),
            activation: p.activation.map(|activation| match activation {
                Activation::Gelu(_) => Behind::Gelu,
                Activation::Slope(_) => Behind::Slope,
            }),
            alignments: [p.a.address, p.b.address, p.out].map(alignment),
        }
    }
}

/// Which [`Activation`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Behind {
    Gelu,
    Slope,
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
    /// Products with an activation that the library has no algorithm for.
    refused: HashSet<Key>,
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
        let (plans, refused) = (HashMap::new(), HashSet::new());
        Ok(Self { device: Arc::clone(device), handle, workspace, plans, refused })
    }

    /// Queues a product, or keeps it with other calls. Returns false, and does nothing, where the
    /// library has none with the activation that is asked for.
    pub(crate) fn multiply(&mut self, p: &Product) -> Result<bool, CudaError> {
        let key = Key::of(p);
        if !self.is_planned(key)? {
            return Ok(false);
        }
        if !self.device.keeps(|| Call::Product(*p)) {
            self.queue(&key, p)?;
        }
        Ok(true)
    }

    /// Queues a product that was kept. Many others may have come since it was planned.
    pub(crate) fn issue(&mut self, p: &Product) -> Result<(), CudaError> {
        let key = Key::of(p);
        if self.is_planned(key)? {
            return self.queue(&key, p);
        }
        let status = "there was an algorithm, and there is none any more".to_owned();
        Err(CudaError::CublasLt { call: HEURISTIC, status })
    }

    /// Makes a product's plan, unless it is made. Returns false where the library has none with the
    /// activation that is asked for.
    fn is_planned(&mut self, key: Key) -> Result<bool, CudaError> {
        if self.refused.contains(&key) {
            return Ok(false);
        }
        if self.plans.contains_key(&key) {
            return Ok(true);
        }
        if self.plans.len() >= PLANS_MAX {
            self.plans.clear();
        }
        match self.plan(&key) {
            Ok(plan) => {
                self.plans.insert(key, plan);
                Ok(true)
            }
            Err(CudaError::CublasLt { call: HEURISTIC, .. }) if key.activation.is_some() => {
                self.refused.insert(key);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Queues a product by its plan, which is made.
    fn queue(&self, key: &Key, p: &Product) -> Result<(), CudaError> {
        let plan = &self.plans[key];
        if let Some(bias) = p.bias {
            let which = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            set_description(plan.description, which, &bias)?;
        }
        if let Some(activation) = p.activation {
            let which =
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER;
            set_description(plan.description, which, &activation.address())?;
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
        checked("cublasLtMatmul", status).map(drop)
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
        let made = match key.kind {
            Kind::Wide => Type::CUDA_R_32F,
            Kind::Narrow => Type::CUDA_R_16BF,
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
        use sys::cublasLtEpilogue_t as Epilogue;
        let epilogue = match (key.activation, key.bias) {
            (None, false) => Epilogue::CUBLASLT_EPILOGUE_DEFAULT,
            (None, true) => Epilogue::CUBLASLT_EPILOGUE_BIAS,
            (Some(Behind::Gelu), false) => Epilogue::CUBLASLT_EPILOGUE_GELU_AUX,
            (Some(Behind::Gelu), true) => Epilogue::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
            (Some(Behind::Slope), _) => Epilogue::CUBLASLT_EPILOGUE_DGELU,
        } as u32;
        set_description(plan.description, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if key.bias {
            let which = Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE;
            set_description(plan.description, which, &(made as i32))?;
        }
        if key.activation.is_some() {
            let which = Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD;
            set_description(plan.description, which, &i64::try_from(m).unwrap_or(i64::MAX))?;
            let which = Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE;
            set_description(plan.description, which, &(made as i32))?;
        }
        let (a_rows, a_columns) = if a_transposed { (k, m) } else { (m, k) };
        let (b_rows, b_columns) = if b_transposed { (n, k) } else { (k, n) };
        let shapes = [
            (stored, a_rows, a_columns, a_stride),
            (stored, b_rows, b_columns, b_stride),
            (made, m, n, m),
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
        plan.algorithm = checked(HEURISTIC, found)?.algo;
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
