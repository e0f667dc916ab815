//! Initial weights, each element a function of seed, tensor name and place alone, so that every
//! split starts from the same model.

use drumline_mesh::ShardSpec;
use drumline_spec::ModelConfig;

/// How a tensor starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// All ones: gains.
    One,
    /// All zeros: biases, moments.
    Zero,
    /// Normal with this standard deviation.
    Normal(f32),
}

/// Standard deviation of embeddings and matrices (Radford et al. 2019).
const DEVIATION: f32 = 0.02;

/// Returns the deviation of ordinary matrices and embeddings.
#[must_use]
pub fn matrix() -> Init {
    Init::Normal(DEVIATION)
}

/// Returns the deviation of projections back into the residual stream: smaller by the root of
/// their number, 2 L (Radford et al. 2019, section 2.3).
#[must_use]
pub fn residual(model: &ModelConfig) -> Init {
    Init::Normal(DEVIATION / (2.0 * model.layers as f32).sqrt())
}

/// Mixes 64 bits (the finaliser of splitmix64).
fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Returns a tensor's key: FNV-1a of its name, mixed with the seed.
fn key(seed: u64, name: &str) -> u64 {
    let hash = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3));
    mix(hash ^ mix(seed))
}

/// Returns one standard normal value: two uniform halves of one counter through Box and Muller's
/// transformation.
fn normal(key: u64, index: u64) -> f32 {
    let bits = mix(key ^ index.wrapping_mul(0xD134_2543_DE82_EF95));
    // In (0, 1], so that the logarithm is finite.
    let radius = ((bits >> 40) as f32 + 1.0) / (1u64 << 24) as f32;
    let angle = ((bits & 0xFF_FFFF) as f32) / (1u64 << 24) as f32;
    (-2.0 * radius.ln()).sqrt() * (std::f32::consts::TAU * angle).cos()
}

/// Fills a part of a tensor, row by row.
pub fn fill(seed: u64, init: Init, shard: &ShardSpec, values: &mut [f32]) {
    let deviation = match init {
        Init::One => return values.fill(1.0),
        Init::Zero => return values.fill(0.0),
        Init::Normal(deviation) => deviation,
    };
    let key = key(seed, &shard.name);
    let (rows_from, columns_from, columns, global_columns) = match shard.shape.as_slice() {
        [_, columns] => (shard.offset[0], shard.offset[1], *columns, shard.global_shape[1]),
        _ => (0, shard.offset[0], shard.shape[0], 0),
    };
    for (r, row) in values.chunks_mut(columns.max(1)).enumerate() {
        let first = (rows_from + r) * global_columns + columns_from;
        for (c, value) in row.iter_mut().enumerate() {
            *value = deviation * normal(key, (first + c) as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_tensor_are_parts_of_the_whole() {
        let whole = ShardSpec {
            name: "w".into(),
            global_shape: vec![6, 10],
            offset: vec![0, 0],
            shape: vec![6, 10],
        };
        let part = ShardSpec { offset: vec![2, 5], shape: vec![3, 4], ..whole.clone() };
        let (mut a, mut b) = (vec![0.0; 60], vec![0.0; 12]);
        fill(3, matrix(), &whole, &mut a);
        fill(3, matrix(), &part, &mut b);
        for r in 0..3 {
            assert_eq!(b[r * 4..r * 4 + 4], a[(r + 2) * 10 + 5..(r + 2) * 10 + 9]);
        }
    }

    #[test]
    fn values_are_normal_and_differ_between_names_and_seeds() {
        let spec = |name: &str| ShardSpec {
            name: name.into(),
            global_shape: vec![100_000],
            offset: vec![0],
            shape: vec![100_000],
        };
        let draw = |seed, name| {
            let mut v = vec![0.0; 100_000];
            fill(seed, Init::Normal(1.0), &spec(name), &mut v);
            v
        };
        let v = draw(1, "a");
        let moment = |k: i32| v.iter().map(|x| f64::from(*x).powi(k)).sum::<f64>() / 1e5;
        assert!(moment(1).abs() < 0.02, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.02, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.15, "fourth moment {}", moment(4));
        for other in [draw(2, "a"), draw(1, "b")] {
            let dot: f64 = v.iter().zip(&other).map(|(a, b)| f64::from(a * b)).sum::<f64>() / 1e5;
            assert!(dot.abs() < 0.02, "correlation {dot}");
        }
    }
}
