// Operations on flat ranges: each element is read once and written once, so all of them are bound by
// memory.

// sum[i] = a[i] + b[i] (+ bias[i % width]). Reads 8 bytes and writes 4 for each element.
extern "C" __global__ void add(const float* a, const float* b, const float* bias, float* sum, u64 n, u32 width,
                               int vector) {
    FOR_FOURS(i, n) {
        Four x = load_four(a, i, n, vector), y = load_four(b, i, n, vector);
        for (int k = 0; k < 4; k++) {
            x.v[k] += y.v[k];
            if (bias && i + k < n) x.v[k] += bias[(i + k) % width];
        }
        store_four(sum, i, n, vector, x);
    }
}

// y += bias in every row of [n / width, width]: 8 bytes for each element.
extern "C" __global__ void add_bias(float* y, const float* bias, u64 n, u32 width, int vector) {
    FOR_FOURS(i, n) {
        Four x = load_four(y, i, n, vector);
        for (int k = 0; k < 4; k++)
            if (i + k < n) x.v[k] += bias[(i + k) % width];
        store_four(y, i, n, vector, x);
    }
}

// GELU in its tanh form: 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
#define GELU_ROOT 0.7978845608028654f
#define GELU_CUBE 0.044715f

// y[i] = gelu(x[i]): 8 bytes for each element.
extern "C" __global__ void gelu(const float* x, float* y, u64 n, int vector) {
    FOR_FOURS(i, n) {
        Four v = load_four(x, i, n, vector);
        for (int k = 0; k < 4; k++) {
            float a = v.v[k];
            v.v[k] = 0.5f * a * (1.0f + tanhf(GELU_ROOT * (a + GELU_CUBE * a * a * a)));
        }
        store_four(y, i, n, vector, v);
    }
}

// x[i] = gelu'(x[i]) dy[i]: 12 bytes for each element.
extern "C" __global__ void gelu_grad(float* x, const float* dy, u64 n, int vector) {
    FOR_FOURS(i, n) {
        Four v = load_four(x, i, n, vector), d = load_four(dy, i, n, vector);
        for (int k = 0; k < 4; k++) {
            float a = v.v[k], t = tanhf(GELU_ROOT * (a + GELU_CUBE * a * a * a));
            float slope = 0.5f * (1.0f + t) +
                          0.5f * a * (1.0f - t * t) * GELU_ROOT * (1.0f + 3.0f * GELU_CUBE * a * a);
            v.v[k] = slope * d.v[k];
        }
        store_four(x, i, n, vector, v);
    }
}

// y [rows, F] = silu(gate) up, from rows [gate F, up F]: 12 bytes for each element of y. n = rows F.
extern "C" __global__ void swiglu(const float* gate_up, float* y, u64 n, u32 width) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        u64 at = i / width * 2 * width + i % width;
        float g = gate_up[at], u = gate_up[at + width];
        y[i] = g / (1.0f + expf(-g)) * u;
    }
}

// Replaces [gate, up] by its gradient: 20 bytes for each element of dy. n = rows F.
extern "C" __global__ void swiglu_grad(float* gate_up, const float* dy, u64 n, u32 width) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        u64 at = i / width * 2 * width + i % width;
        float g = gate_up[at], u = gate_up[at + width], d = dy[i];
        float s = 1.0f / (1.0f + expf(-g));
        gate_up[at] = d * u * s * (1.0f + g * (1.0f - s));
        gate_up[at + width] = d * g * s;
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

// Sets n elements: 4 bytes each.
extern "C" __global__ void fill(float* y, float value, u64 n, int vector) {
    Four v;
    for (int k = 0; k < 4; k++) v.v[k] = value;
    FOR_FOURS(i, n) { store_four(y, i, n, vector, v); }
}
