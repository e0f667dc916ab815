//! The device suite: every operation of [`Cuda`] against its reference, by the bodies that the CPU
//! backend passes too (`drumline_tensor::conformance`), on random inputs.

mod support;

use drumline_cuda::{Cuda, CudaOptions};
use drumline_tensor::reference::Random;
use drumline_tensor::{Backend, MatmulPrecision, conformance};

/// Runs one body for some seeds on the device that is there.
fn check(test: &str, seeds: u64, options: CudaOptions, body: impl Fn(&Cuda, &mut Random, &str)) {
    support::on_device(test, |device| {
        let cuda = support::open(options);
        support::for_seeds(device, seeds, |r, what| {
            body(&cuda, r, what);
            assert_eq!(cuda.status(), Ok(()), "{what}");
        });
    });
}

macro_rules! suite {
    ($($name:ident: $seeds:literal),* $(,)?) => {
        $(#[test]
        fn $name() {
            check(stringify!($name), $seeds, CudaOptions::default(), conformance::$name);
        })*
    };
}

suite! {
    activations_and_their_gradients: 6,
    adamw_steps: 4,
    attention_and_its_gradient: 8,
    attention_to_the_cache_equals_attention_to_the_sequence: 8,
    cross_entropy_whole_and_in_slices: 10,
    embeddings_look_up_and_add_up: 10,
    linear_layers_and_their_gradients: 12,
    moves_between_host_and_device: 6,
    norms_with_residual_and_their_gradients: 10,
    rotary_positions_turn_and_turn_back: 8,
    stored_matrices_multiply_as_what_they_were_rounded_to: 8,
    sums_of_columns_and_of_squares_and_additions: 8,
    tokens_are_drawn_from_logits: 24,
}

macro_rules! bf16_suite {
    ($($name:ident: $seeds:literal),* $(,)?) => {
        $(#[test]
        fn $name() {
            let options = CudaOptions { matmul: MatmulPrecision::Bf16, ..CudaOptions::default() };
            check(stringify!($name), $seeds, options, conformance::$name);
        })*
    };
}

bf16_suite! {
    bf16_attention_and_its_gradient: 5,
    bf16_linear_layers_round_their_factors_and_nothing_else: 10,
    narrow_attention: 6,
    narrow_linear_layers: 10,
    narrow_rows: 10,
}

const BF16: MatmulPrecision = MatmulPrecision::Bf16;

#[test]
fn products_with_gelu_behind_them_are_what_one_by_one_gives() {
    let options = CudaOptions { matmul: BF16, ..CudaOptions::default() };
    let test = "products_with_gelu_behind_them_are_what_one_by_one_gives";
    check(test, 10, options, |b, r, what| conformance::narrow_epilogues(b, r, true, what));
}

#[test]
fn a_library_without_gelu_is_told_apart_and_does_no_harm() {
    let test = "a_library_without_gelu_is_told_apart_and_does_no_harm";
    support::on_device_with(test, Some("no-epilogues"), |device| {
        let cuda = support::open(CudaOptions { matmul: BF16, ..CudaOptions::default() });
        support::for_seeds(device, 4, |r, what| {
            conformance::narrow_epilogues(&cuda, r, false, what);
            conformance::narrow_linear_layers(&cuda, r, what);
            assert_eq!(cuda.status(), Ok(()), "{what}");
        });
    });
}
