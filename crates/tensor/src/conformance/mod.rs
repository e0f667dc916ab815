//! What every backend must compute: each operation against its plain reference, on random shapes.
//!
//! One body runs on every backend. Values reach it through [`Slices`], which puts each operand at a
//! place of its own inside a larger allocation full of NaN, and looks afterwards whether anything
//! around it was touched. Outputs begin as NaN where an operation is to write them all.
//!
//! Tolerances are relative to the greatest wanted value: a sum of k products in f32 is off by about
//! sqrt(k) roundings of its greatest term.

mod attention;
mod linear;
mod narrow;
mod rows;
mod slices;

pub use attention::{
    attention_and_its_gradient, attention_to_the_cache_equals_attention_to_the_sequence,
    bf16_attention_and_its_gradient,
};
pub use linear::{
    bf16_linear_layers_round_their_factors_and_nothing_else, linear_layers_and_their_gradients,
    stored_matrices_multiply_as_what_they_were_rounded_to,
};
pub use narrow::{narrow_attention, narrow_epilogues, narrow_linear_layers, narrow_rows};
pub use rows::{
    activations_and_their_gradients, adamw_steps, cross_entropy_whole_and_in_slices,
    embeddings_look_up_and_add_up, moves_between_host_and_device,
    norms_with_residual_and_their_gradients, rotary_positions_turn_and_turn_back,
    sums_of_columns_and_of_squares_and_additions, tokens_are_drawn_from_logits,
};
pub use slices::Slices;

/// What outputs hold before an operation writes them.
const POISON: f32 = f32::NAN;

/// Asserts that values agree within `tolerance`, relative to the greatest of the wanted ones: a
/// sum of k products in f32 is off by about sqrt(k) roundings of its greatest term.
fn assert_close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(0.05f32, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * scale, "{what}, element {i}: got {g}, want {w}");
    }
}
