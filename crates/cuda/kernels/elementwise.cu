// Operations on flat ranges: each element is read once and written once, so all of them are bound by
// memory. Traffic is given for operands of f32; those that are kept as bf16 move half of it.

// sum[i] = a[i] + b[i] (+ bias[i % width]). Reads 8 bytes and writes 4 for each element.
// narrow: a, b, sum.
extern "C" __global__ void add(const void* a, const void* b, const float* bias, void* sum, u64 n, u32 width,
                               int vector, u32 narrow) {
    FOR_FOURS(i, n) {
        Four x = load_four(a, i, n, vector, narrow & 1), y = load_four(b, i, n, vector, narrow & 2);
        for (int k = 0; k < 4; k++) {
            x.v[k] += y.v[k];
            if (bias && i + k < n) x.v[k] += bias[(i + k) % width];
        }
        store_four(sum, i, n, vector, x, narrow & 4);
    }
}

// GELU in its tanh form: 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
#define GELU_ROOT 0.7978845608028654f
#define GELU_CUBE 0.044715f

// y[i] = gelu(x[i]): 8 bytes for each element. narrow: x, y.
extern "C" __global__ void gelu(const void* x, void* y, u64 n, int vector, u32 narrow) {
    FOR_FOURS(i, n) {
        Four v = load_four(x, i, n, vector, narrow & 1);
        for (int k = 0; k < 4; k++) {
            float a = v.v[k];
            v.v[k] = 0.5f * a * (1.0f + tanhf(GELU_ROOT * (a + GELU_CUBE * a * a * a)));
        }
        store_four(y, i, n, vector, v, narrow & 2);
    }
}

// dy[i] = gelu'(x[i]) dy[i]: 12 bytes for each element. narrow: x, dy.
extern "C" __global__ void gelu_grad(const void* x, void* dy, u64 n, int vector, u32 narrow) {
    FOR_FOURS(i, n) {
        Four v = load_four(x, i, n, vector, narrow & 1), d = load_four(dy, i, n, vector, narrow & 2);
        for (int k = 0; k < 4; k++) {
            float a = v.v[k], t = tanhf(GELU_ROOT * (a + GELU_CUBE * a * a * a));
            float slope = 0.5f * (1.0f + t) +
                          0.5f * a * (1.0f - t * t) * GELU_ROOT * (1.0f + 3.0f * GELU_CUBE * a * a);
            d.v[k] *= slope;
        }
        store_four(dy, i, n, vector, d, narrow & 2);
    }
}

// Where the gate of element i of [rows, F] lies in rows [gate F, up F]; its up lies F further.
__device__ inline u64 gate_at(u64 i, u32 width) { return i / width * 2 * width + i % width; }

// Reads the gates and ups of elements i .. i + 4 of n, zeros beyond. With `vector`, F is a multiple of 4.
__device__ inline void load_gate_up(const void* gate_up, u64 i, u64 n, u32 width, int vector, u32 narrow, Four& g, Four& u) {
    if (vector) {
        u64 at = gate_at(i, width);
        g = load_four(gate_up, at, at + 4, vector, narrow);
        u = load_four(gate_up, at + width, at + width + 4, vector, narrow);
        return;
    }
    for (int k = 0; k < 4; k++) {
        u64 at = gate_at(i + k, width);
        g.v[k] = i + k < n ? get(gate_up, at, narrow) : 0.0f;
        u.v[k] = i + k < n ? get(gate_up, at + width, narrow) : 0.0f;
    }
}

// y [rows, F] = silu(gate) up, from rows [gate F, up F]: 12 bytes for each element of y. n = rows F.
// With `vector`, F is a multiple of 4. narrow: gate_up, y.
extern "C" __global__ void swiglu(const void* gate_up, void* y, u64 n, u32 width, int vector, u32 narrow) {
    FOR_FOURS(i, n) {
        Four g, u, r;
        load_gate_up(gate_up, i, n, width, vector, narrow & 1, g, u);
        for (int k = 0; k < 4; k++) r.v[k] = g.v[k] / (1.0f + expf(-g.v[k])) * u.v[k];
        store_four(y, i, n, vector, r, narrow & 2);
    }
}

// Replaces [gate, up] by its gradient: 20 bytes for each element of dy. n = rows F. With `vector`, F is a
// multiple of 4. narrow: gate_up, dy.
extern "C" __global__ void swiglu_grad(void* gate_up, const void* dy, u64 n, u32 width, int vector, u32 narrow) {
    FOR_FOURS(i, n) {
        Four d = load_four(dy, i, n, vector, narrow & 2), g, u;
        load_gate_up(gate_up, i, n, width, vector, narrow & 1, g, u);
        for (int k = 0; k < 4; k++) {
            float s = 1.0f / (1.0f + expf(-g.v[k])), silu = g.v[k] * s;
            g.v[k] = d.v[k] * u.v[k] * s * (1.0f + g.v[k] * (1.0f - s));
            u.v[k] = d.v[k] * silu;
        }
        if (vector) {
            u64 at = gate_at(i, width);
            store_four(gate_up, at, at + 4, vector, g, narrow & 1);
            store_four(gate_up, at + width, at + width + 4, vector, u, narrow & 1);
        } else {
            for (int k = 0; k < 4 && i + k < n; k++) {
                u64 at = gate_at(i + k, width);
                put(gate_up, at, narrow & 1, g.v[k]);
                put(gate_up, at + width, narrow & 1, u.v[k]);
            }
        }
    }
}

// Rounds [rows, columns] of f32 to bf16, in rows of `stride` elements (a multiple of 8, the rest
// zeros), so that the tensor cores' loads are aligned: 6 bytes for each element. n = rows stride / 2.
extern "C" __global__ void to_bf16(const float* x, u32* y, u64 n, u32 columns, u32 stride) {
    u32 pairs = stride / 2;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        u64 row = i / pairs;
        u32 c = (u32)(i % pairs) * 2;
        const float* from = x + row * columns;
        y[i] = pack_bf16(c < columns ? from[c] : 0.0f, c + 1 < columns ? from[c + 1] : 0.0f);
    }
}

// Copies n elements from f32 to bf16 or back: 6 bytes for each element. narrow: x, y.
extern "C" __global__ void convert(const void* x, void* y, u64 n, int vector, u32 narrow) {
    FOR_FOURS(i, n) { store_four(y, i, n, vector, load_four(x, i, n, vector, narrow & 1), narrow & 2); }
}

// Sets n elements: 4 bytes each. narrow: y.
extern "C" __global__ void fill(void* y, float value, u64 n, int vector, u32 narrow) {
    Four v;
    for (int k = 0; k < 4; k++) v.v[k] = value;
    FOR_FOURS(i, n) { store_four(y, i, n, vector, v, narrow & 1); }
}
