//! Runs a test with every level of instructions that the processor has.

use std::sync::{Mutex, PoisonError};

use drumline_tensor::cpu::simd::{self, Level};

/// The limit on instructions is the process's: one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs `test` with each level, alone among the tests of this process that come through here.
pub(crate) fn each(test: impl Fn(Level)) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let has = simd::level();
    for level in [Level::Plain, Level::Avx2, Level::Avx512, Level::Avx512Bf16] {
        if level > has {
            eprintln!("not tested: {level:?} is not on this processor");
            continue;
        }
        simd::limit(level);
        assert_eq!(simd::level(), level);
        test(level);
    }
    simd::limit(Level::Avx512Bf16);
}
