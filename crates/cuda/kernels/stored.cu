// Matrices that are only multiplied by: f32, bf16, f16 or int8 with a scale for each output. They lie
// as [output, stride], stride = input rounded up to 16 elements, the rest zeros.
//
// f32 and f16 are multiplied by f32; with bf16 and int8 the other factor is rounded to bf16. Sums are
// f32.

// How eight neighbouring weights are read and what x is rounded to.
struct F32 {
    static const bool rounds = false;
    static __device__ inline void load(const void* w, u64 i, float (&v)[8]) {
        const float4* p = (const float4*)((const float*)w + i);
        float4 a = p[0], b = p[1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    }
};
struct Bf16 {
    static const bool rounds = true;
    static __device__ inline void load(const void* w, u64 i, float (&v)[8]) {
        uint4 a = *(const uint4*)((const u16*)w + i);
        u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            v[2 * k] = __uint_as_float(words[k] << 16);
            v[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
        }
    }
};
struct F16 {
    static const bool rounds = false;
    static __device__ inline void load(const void* w, u64 i, float (&v)[8]) {
        uint4 a = *(const uint4*)((const u16*)w + i);
        u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            v[2 * k] = from_f16((u16)(words[k] & 0xffff));
            v[2 * k + 1] = from_f16((u16)(words[k] >> 16));
        }
    }
};
struct I8 {
    static const bool rounds = true;
    static __device__ inline void load(const void* w, u64 i, float (&v)[8]) {
        uint2 a = *(const uint2*)((const signed char*)w + i);
        u32 words[2] = {a.x, a.y};
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = (float)(signed char)(words[k / 4] >> (8 * (k % 4)) & 0xff);
    }
};

// Outputs of one warp, and rows of one pass over them.
#define OUTPUTS 4
#define ROWS 8

// y [rows, output] = x [rows, input] . w (+ bias), for few rows: each weight is read once for every
// ROWS rows. Bound by the weights' bytes. A warp has OUTPUTS outputs; its lanes share the input.
// What is added to what depends on the input's width alone, so a row gives the same in any batch.
template <class W>
__device__ void multiply(const float* x, const void* w, const float* scales, const float* bias, float* y, u32 rows,
                         u32 input, u32 output, u32 stride) {
    u32 lane = threadIdx.x % 32, o0 = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * OUTPUTS;
    if (o0 >= output) return;
    for (u32 r0 = 0; r0 < rows; r0 += ROWS) {
        float acc[OUTPUTS][ROWS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) acc[o][r] = 0.0f;
        for (u32 i = lane * 8; i < input; i += 256) {
            float v[OUTPUTS][8];
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++) {
                u32 row = o0 + o < output ? o0 + o : output - 1;
                W::load(w, (u64)row * stride + i, v[o]);
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (r0 + r < rows) {
                    const float* from = x + (u64)(r0 + r) * input + i;
#pragma unroll
                    for (int k = 0; k < 8; k++) {
                        float a = i + k < input ? from[k] : 0.0f;
                        if (W::rounds) a = round_bf16(a);
#pragma unroll
                        for (int o = 0; o < OUTPUTS; o++) acc[o][r] += v[o][k] * a;
                    }
                }
            }
        }
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (r0 + r < rows) {
                    float total = warp_sum(acc[o][r]);
                    if (lane == 0 && o0 + o < output) {
                        if (scales) total *= scales[o0 + o];
                        if (bias) total += bias[o0 + o];
                        y[(u64)(r0 + r) * output + o0 + o] = total;
                    }
                }
            }
    }
}

// out[i] = the weights of output indices[i] - offset, or zeros outside the matrix. Grid: indices.
template <class W>
__device__ void look_up(const void* w, const float* scales, const u32* indices, float* out, u32 offset, u32 input,
                        u32 output, u32 stride) {
    u32 row = indices[blockIdx.x] - offset;
    float* to = out + (u64)blockIdx.x * input;
    for (u32 i = threadIdx.x * 8; i < input; i += blockDim.x * 8) {
        float v[8];
        if (row < output) W::load(w, (u64)row * stride + i, v);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            float a = row < output ? (scales ? v[k] * scales[row] : v[k]) : 0.0f;
            if (i + k < input) to[i + k] = a;
        }
    }
}

#define STORED(NAME, W)                                                                                            \
    extern "C" __global__ void __launch_bounds__(128)                                                              \
        multiply_##NAME(const float* x, const void* w, const float* scales, const float* bias, float* y, u32 rows, \
                        u32 input, u32 output, u32 stride) {                                                       \
        multiply<W>(x, w, scales, bias, y, rows, input, output, stride);                                           \
    }                                                                                                              \
    extern "C" __global__ void look_up_##NAME(const void* w, const float* scales, const u32* indices, float* out,  \
                                              u32 offset, u32 input, u32 output, u32 stride) {                     \
        look_up<W>(w, scales, indices, out, offset, input, output, stride);                                        \
    }
STORED(f32, F32)
STORED(bf16, Bf16)
STORED(f16, F16)
STORED(i8, I8)

// For products of many rows, which cuBLASLt makes: f16 as f32, int8 as bf16 (exactly: 7 bits fit).
// n = elements / 8, stride and all. 6 or 3 bytes for each.
extern "C" __global__ void widen_f16(const u16* w, float* to, u64 n) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        float v[8];
        F16::load(w, i * 8, v);
        for (int k = 0; k < 8; k++) to[i * 8 + k] = v[k];
    }
}
extern "C" __global__ void widen_i8(const signed char* w, u32* to, u64 n) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        float v[8];
        I8::load(w, i * 8, v);
        for (int k = 0; k < 4; k++) to[i * 4 + k] = pack_bf16(v[2 * k], v[2 * k + 1]);
    }
}

// y = y scales (+ bias), by column, after a product with widened int8: 8 bytes for each element.
extern "C" __global__ void scale_columns(float* y, const float* scales, const float* bias, u64 n, u32 columns) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        u32 c = (u32)(i % columns);
        y[i] = y[i] * scales[c] + (bias ? bias[c] : 0.0f);
    }
}
