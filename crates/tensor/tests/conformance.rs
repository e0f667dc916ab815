//! The suite that every backend passes, on the CPU: with every level of instructions that the
//! processor has, with one thread and with three. A failure prints the seed that makes it again.

mod levels;

use drumline_tensor::reference::Random;
use drumline_tensor::{Cpu, CpuOptions, MatmulPrecision, conformance};

fn on_cpu(matmul: MatmulPrecision, test: impl Fn(&Cpu, &mut Random, &str)) {
    levels::each(|level| {
        for threads in [1, 3] {
            let options = CpuOptions { threads, matmul, ..CpuOptions::default() };
            let cpu = Cpu::with_options(options).unwrap();
            for seed in 0..40 {
                let what = format!("{level:?}, {threads} threads, seed {seed}");
                test(&cpu, &mut Random::new(seed), &what);
            }
        }
    });
}

macro_rules! suite {
    ($precision:ident: $($name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            on_cpu(MatmulPrecision::$precision, conformance::$name);
        })*
    };
}

suite!(
    F32: activations_and_their_gradients,
    adamw_steps,
    attention_and_its_gradient,
    attention_to_the_cache_equals_attention_to_the_sequence,
    cross_entropy_whole_and_in_slices,
    embeddings_look_up_and_add_up,
    linear_layers_and_their_gradients,
    moves_between_host_and_device,
    norms_with_residual_and_their_gradients,
    rotary_positions_turn_and_turn_back,
    stored_matrices_multiply_as_what_they_were_rounded_to,
    sums_of_columns_and_of_squares_and_additions,
    tokens_are_drawn_from_logits,
);

suite!(
    Bf16: bf16_attention_and_its_gradient,
    bf16_linear_layers_round_their_factors_and_nothing_else,
);
