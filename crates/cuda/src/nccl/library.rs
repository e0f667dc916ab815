//! Finding NCCL and its functions.
#![allow(unsafe_code, reason = "functions of a C library are declared and loaded here")]

use std::ffi::{CStr, OsStr, OsString, c_char, c_int, c_void};
use std::sync::Arc;

/// Names a library file to use instead of the system's.
pub const PATH_VARIABLE: &str = "DRUMLINE_NCCL_LIBRARY";
/// What the loader is asked for, in order. Packages for running programs bring the first alone.
pub const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The oldest version whose communicators can be made without blocking and configured as here.
pub const VERSION_MIN: Version = Version { major: 2, minor: 18, patch: 0 };
/// The first version that lets several ranks share a GPU, when `NCCL_MULTI_RANK_GPU_ENABLE` is 1.
pub const VERSION_SHARED_GPU: Version = Version { major: 2, minor: 30, patch: 0 };

/// A version of NCCL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 2, for as long as anyone remembers.
    pub major: i32,
    /// The part that counts.
    pub minor: i32,
    /// Mends.
    pub patch: i32,
}

impl Version {
    /// Reads the library's number, whose form changed with 2.9.
    fn of(code: i32) -> Self {
        let thousands = if code < 10_000 { 1_000 } else { 10_000 };
        Self { major: code / thousands, minor: code % thousands / 100, patch: code % 100 }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Why NCCL cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NcclProblem {
    /// No such library.
    #[error("no NCCL: {tried}")]
    Missing {
        /// What was tried, and the loader's words.
        tried: String,
    },
    /// It lacks what is needed.
    #[error("{name} is too old or not NCCL: {why}")]
    TooOld {
        /// The library.
        name: String,
        /// Its version, or the function that it lacks.
        why: String,
    },
    /// It answered with an error.
    #[error("NCCL: {0}")]
    Refused(String),
}

impl NcclProblem {
    /// Returns what would help.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Missing { .. } => {
                "Install NCCL 2.18 or newer (package libnccl2, or the Python package \
                 nvidia-nccl-cu13) and put libnccl.so.2 in the loader's path."
            }
            Self::TooOld { .. } => "Install NCCL 2.18 or newer.",
            Self::Refused(_) => "Set NCCL_DEBUG=INFO and see what it says.",
        }
    }
}

/// What ranks must share to meet: made by one of them, told to the others by the rendezvous.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId(pub [u8; 128]);

impl std::fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Who knows it can join: it is not for logs.
        f.write_str("UniqueId")
    }
}

impl UniqueId {
    /// Reads an id that a peer sent.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self(bytes.try_into().ok()?))
    }
}

/// A communicator of the library.
pub(crate) type RawComm = *mut c_void;
/// A stream of the driver.
pub(crate) type RawStream = *mut c_void;

/// `ncclConfig_t` as of 2.18. The library reads as much of it as `size` says, whatever its own
/// version has beyond.
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Returns the configuration of a communicator whose calls do not block.
    pub(crate) fn non_blocking() -> Self {
        // NCCL_CONFIG_UNDEF_INT and the magic number of NCCL_CONFIG_INITIALIZER.
        const UNDEFINED: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_800,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

macro_rules! functions {
    ($($field:ident = $symbol:literal, ($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions that are used. Results are plain numbers: one that this program does not
        /// know must not become an enum.
        pub(crate) struct Functions {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            /// Finds every function.
            ///
            /// # Errors
            /// The name of one that is missing.
            fn load(library: &libloading::Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the type is that of the function in `nccl.h` since 2.18, and the
                        // library is kept open for as long as the pointer.
                        let found = unsafe {
                            library.get::<unsafe extern "C" fn($($argument),*) -> $result>(
                                $symbol.as_bytes(),
                            )
                        };
                        *found.map_err(|_| $symbol)?
                    },)*
                })
            }
        }
    };
}

functions! {
    error_string = "ncclGetErrorString", (c_int) -> *const c_char;
    last_error = "ncclGetLastError", (RawComm) -> *const c_char;
    get_unique_id = "ncclGetUniqueId", (*mut UniqueId) -> c_int;
    init = "ncclCommInitRankConfig", (*mut RawComm, c_int, UniqueId, c_int, *mut Config) -> c_int;
    async_error = "ncclCommGetAsyncError", (RawComm, *mut c_int) -> c_int;
    destroy = "ncclCommDestroy", (RawComm) -> c_int;
    all_reduce = "ncclAllReduce",
        (*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
    all_gather = "ncclAllGather",
        (*const c_void, *mut c_void, usize, c_int, RawComm, RawStream) -> c_int;
    reduce_scatter = "ncclReduceScatter",
        (*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
    broadcast = "ncclBroadcast",
        (*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
    send = "ncclSend", (*const c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
    recv = "ncclRecv", (*mut c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
    group_start = "ncclGroupStart", () -> c_int;
    group_end = "ncclGroupEnd", () -> c_int;
}

/// Codes of `ncclResult_t` that mean something here.
pub(crate) const SUCCESS: c_int = 0;
pub(crate) const IN_PROGRESS: c_int = 7;

/// An open NCCL.
pub struct Nccl {
    pub(crate) functions: Functions,
    version: Version,
    name: String,
    /// Unloading a library whose threads run is not safe: it stays.
    _library: std::mem::ManuallyDrop<libloading::Library>,
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NCCL {}", self.version)
    }
}

impl Nccl {
    /// Opens NCCL: `library` if given, else what [`PATH_VARIABLE`] names, else the system's.
    ///
    /// # Errors
    /// [`NcclProblem`].
    pub fn open(library: Option<&OsStr>) -> Result<Arc<Self>, NcclProblem> {
        let named: Option<OsString> =
            library.map(OsStr::to_owned).or_else(|| std::env::var_os(PATH_VARIABLE));
        let candidates = match named {
            Some(one) => vec![one],
            None => NAMES.iter().map(OsString::from).collect(),
        };
        let mut tried = Vec::new();
        for candidate in candidates {
            let name = candidate.to_string_lossy().into_owned();
            // SAFETY: NCCL's initialisers have no conditions.
            match unsafe { libloading::Library::new(&candidate) } {
                Ok(library) => return Self::take(library, name).map(Arc::new),
                Err(error) => tried.push(crate::found::words(&name, &error)),
            }
        }
        Err(NcclProblem::Missing { tried: tried.join("; ") })
    }

    fn take(library: libloading::Library, name: String) -> Result<Self, NcclProblem> {
        // The version first: it says more than the name of a function that came later.
        // SAFETY: the type is that of the function in every version of `nccl.h`.
        let ask =
            unsafe { library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"ncclGetVersion") };
        let Ok(ask) = ask else {
            return Err(NcclProblem::TooOld { name, why: "it lacks ncclGetVersion".to_owned() });
        };
        let mut code = 0;
        // SAFETY: the argument is a valid place for the number.
        let answer = unsafe { ask(&raw mut code) };
        if answer != SUCCESS {
            return Err(NcclProblem::Refused(format!("error {answer} when asked for its version")));
        }
        let version = Version::of(code);
        if version < VERSION_MIN {
            let why = format!("it is {version}; {VERSION_MIN} is needed");
            return Err(NcclProblem::TooOld { name, why });
        }
        match Functions::load(&library) {
            Ok(functions) => {
                let _library = std::mem::ManuallyDrop::new(library);
                Ok(Self { functions, version, name, _library })
            }
            Err(missing) => {
                let why = format!("it is {version} and lacks {missing}");
                Err(NcclProblem::TooOld { name, why })
            }
        }
    }

    /// Returns its version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Returns the name under which it was found.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes an id for one communicator.
    ///
    /// # Errors
    /// [`NcclProblem::Refused`].
    pub fn unique_id(&self) -> Result<UniqueId, NcclProblem> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the argument is a valid place for 128 bytes.
        let answer = unsafe { (self.functions.get_unique_id)(&raw mut id) };
        if answer == SUCCESS { Ok(id) } else { Err(NcclProblem::Refused(self.words(answer))) }
    }

    /// Returns the library's words for a code.
    pub(crate) fn words(&self, code: c_int) -> String {
        // SAFETY: every code has a text, which lives for ever.
        let text = unsafe { (self.functions.error_string)(code) };
        if text.is_null() {
            return format!("error {code}");
        }
        // SAFETY: it is not null and ends with a zero.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_in_both_forms() {
        let table = [(23_004, (2, 30, 4)), (21_800, (2, 18, 0)), (2_708, (2, 7, 8))];
        for (code, (major, minor, patch)) in table {
            assert_eq!(Version::of(code), Version { major, minor, patch });
        }
        assert!(Version::of(2_708) < VERSION_MIN && Version::of(23_004) >= VERSION_SHARED_GPU);
    }

    #[test]
    fn an_id_does_not_show_itself() {
        assert_eq!(format!("{:?}", UniqueId([7; 128])), "UniqueId");
        assert_eq!(UniqueId::from_bytes(&[1; 127]), None);
    }
}
