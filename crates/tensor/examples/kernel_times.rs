//! Runs one kernel a number of times, for counting instructions, and prints the instruction set in
//! use: `kernel_times NAME TIMES`. Without arguments, prints the names. `tests/peers/count_instructions.py` compares the counts with stored
//! ones.

use drumline_tensor::reference::Random;
use drumline_tensor::{
    AdamW, Attention, Backend, CachedAttention, CachedSegment, Cpu, DType, KV_BLOCK, Linear,
    NormKind, Normalise, Rounding, WeightLayout,
};

const NAMES: [&str; 14] = [
    "attention",
    "attention-gradient",
    "cached-attention",
    "linear",
    "linear-gradients",
    "linear-thin",
    "norm",
    "swiglu",
    "adamw",
    "stored-f16",
    "stored-bf16",
    "stored-int8",
    "stored-f16-one",
    "stored-bf16-many",
];

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (Some(name), Some(times)) = (arguments.next(), arguments.next()) else {
        println!("{}", NAMES.join("\n"));
        return;
    };
    let times: usize = times.parse().expect("TIMES is a whole number");
    println!("{}", Cpu::instructions());
    let cpu = Cpu::new(1).expect("one thread needs nothing");
    let mut r = Random::new(1);
    let a = Attention { batch: 1, sequence: 128, heads: 2, kv_heads: 2, head_dim: 64 };
    let c = CachedAttention { heads: 2, kv_heads: 2, head_dim: 64, stored: DType::F32 };
    let (qkv, mut dqkv) = (r.values(128 * a.qkv_width()), vec![0.0; 128 * a.qkv_width()]);
    let (mut out, mut lse) = (vec![0.0; 128 * 128], vec![0.0; 128 * 2]);
    let blocks: Vec<u32> = (0..8).collect();
    let (keys, values) = (r.values(8 * c.block_elements()), r.values(8 * c.block_elements()));
    let s = Linear { rows: 4, input: 256, output: 96, layout: WeightLayout::OutIn };
    let (x, w, mut y) = (r.values(4 * 256), r.values(96 * 256), vec![0.0; 4 * 96]);
    let stored = |dtype| {
        let mut matrix = cpu.alloc_matrix(dtype, s).expect("24 Ki weights fit");
        cpu.write_matrix(&w, &mut matrix);
        matrix
    };
    let (half, bf16, byte) = (stored(DType::F16), stored(DType::Bf16), stored(DType::I8));
    let mut many = vec![0.0; 64 * 96];
    let layer = Linear { rows: 64, ..s };
    let (mut dx, mut dw) = (vec![0.0; 64 * 256], vec![0.0; 96 * 256]);
    let n = Normalise { rows: 64, width: 256, kind: NormKind::Rms, epsilon: 1e-5 };
    let (rows, gain, mut normal) = (r.values(64 * 256), r.values(256), vec![0.0; 64 * 256]);
    let mut stats = vec![0.0; 128];
    let step = AdamW {
        rounding: Rounding::Nearest,
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        correction1: 0.1,
        correction2: 0.05,
        gradient_scale: 1.0,
    };
    let (mut p, mut m, mut v) = (vec![0.5; 8192], vec![0.1; 8192], vec![0.1; 8192]);
    cpu.attention(a, &qkv, &mut out, &mut lse);
    let forward = out.clone();
    for _ in 0..times {
        match name.as_str() {
            "attention" => cpu.attention(a, &qkv, &mut out, &mut lse),
            "attention-gradient" => {
                cpu.attention_grad(a, &qkv, &forward, &lse, &rows[..128 * 128], &mut dqkv);
            }
            "cached-attention" => {
                let segment =
                    CachedSegment { row: 0, rows: 1, position: 8 * KV_BLOCK - 1, blocks: &blocks };
                let qkv = &qkv[..a.qkv_width()];
                cpu.cached_attention(c, &[segment], qkv, &keys, &values, &mut out[..128]);
            }
            "linear" => cpu.linear(layer, &rows, &w, None, &mut many),
            "linear-gradients" => {
                cpu.linear_grad_input(layer, &rows[..64 * 96], &w, &mut dx);
                cpu.linear_grad_weight(layer, &rows, &rows[..64 * 96], &mut dw, true);
            }
            "linear-thin" => cpu.linear(s, &x, &w, None, &mut y),
            "norm" => cpu.norm(n, &rows, &gain, None, &mut normal, &mut stats),
            "swiglu" => cpu.swiglu(128, &rows, &mut normal[..64 * 128]),
            "adamw" => cpu.adamw(step, &mut p, None, &rows[..8192], &mut m, &mut v),
            "stored-f16" => cpu.linear_stored(4, &x, &half, None, &mut y),
            "stored-bf16" => cpu.linear_stored(4, &x, &bf16, None, &mut y),
            "stored-f16-one" => cpu.linear_stored(1, &x[..256], &half, None, &mut y[..96]),
            "stored-bf16-many" => cpu.linear_stored(64, &rows, &bf16, None, &mut many),
            "stored-int8" => cpu.linear_stored(4, &x, &byte, None, &mut y),
            other => panic!("{other} is none of {}", NAMES.join(", ")),
        }
    }
}
