// Causal attention with grouped queries on the tensor cores, forward and backward, for heads of 64 and
// 128: factors are rounded to bf16 on their way into shared memory, or are kept so, sums and softmax are
// f32. Layouts and meaning are those of attention.cu, which is its reference. T is what qkv, out and their
// gradients are kept as: float, or u16 for bf16.
//
// Operations: 2 B H T^2 E forward, 7 / 2 times that backward (scores are made twice there, so that
// there are no atomics and every run gives the same bits). Traffic: as attention.cu, with tiles of 64.
// 4 warps; each owns 16 rows of the tile (queries, or keys for the gradients of keys and values), and
// keeps its scores and sums in registers (Dao 2023).

#define ROWS 64        // Rows of a block: 16 for each warp.
#define PAD 8          // Keeps the rows of a matrix load in different banks.
#define LOG2E 1.4426950408889634f

struct Place {
    u32 sequence, heads, kv_heads, width;
    u64 first;  // Row of the sequence's first token.
};
__device__ inline Place place(u32 sequence, u32 heads, u32 kv_heads, u32 head_dim) {
    Place p;
    p.sequence = sequence, p.heads = heads, p.kv_heads = kv_heads;
    p.width = (heads + 2 * kv_heads) * head_dim;
    p.first = (u64)blockIdx.z * sequence;
    return p;
}

// Rounds `rows` rows of a head, from row `first` on, to shared rows of E + PAD; zeros beyond the
// sequence.
template <int E>
__device__ inline void load_rows(u16* to, const float* from, const Place& p, u32 first, u32 rows, u32 row_width,
                                 u32 column) {
    for (u32 i = threadIdx.x; i < rows * (E / 2); i += blockDim.x) {
        u32 r = i / (E / 2), c = i % (E / 2) * 2;
        float a = 0.0f, b = 0.0f;
        if (first + r < p.sequence) {
            const float* at = from + (p.first + first + r) * row_width + column + c;
            a = at[0], b = at[1];
        }
        *(u32*)(to + r * (E + PAD) + c) = pack_bf16(a, b);
    }
}
// The same from rows of bf16, which are aligned to 16 bytes: eight elements at a time.
template <int E>
__device__ inline void load_rows(u16* to, const u16* from, const Place& p, u32 first, u32 rows, u32 row_width,
                                 u32 column) {
    for (u32 i = threadIdx.x; i < rows * (E / 8); i += blockDim.x) {
        u32 r = i / (E / 8), c = i % (E / 8) * 8;
        uint4 v;
        v.x = v.y = v.z = v.w = 0;
        if (first + r < p.sequence) v = *(const uint4*)(from + (p.first + first + r) * row_width + column + c);
        *(uint4*)(to + r * (E + PAD) + c) = v;
    }
}

// acc (16 x 8 N) = A (16 rows of E) . B' (8 N rows of E), both in shared memory.
template <int E, int N>
__device__ inline void multiply_rows(float (&acc)[N][4], const u16* a, const u16* b) {
    u32 lane = threadIdx.x % 32;
    const u16* row_a = a + (lane % 16) * (E + PAD) + lane / 16 * 8;
    const u16* row_b = b + (lane % 8 + lane / 16 * 8) * (E + PAD) + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[n][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < E / 16; k++) {
        u32 fa[4], fb[4];
        load_matrices(fa, row_a + k * 16);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            load_matrices(fb, row_b + n * 8 * (E + PAD) + k * 16);
            mma_bf16(acc[n], fa, fb[0], fb[1]);
            mma_bf16(acc[n + 1], fa, fb[2], fb[3]);
        }
    }
}

// acc (16 x E) += P (16 x 8 N, in registers as multiply_rows leaves it, rounded here) . B (8 N rows of
// E, in shared memory).
template <int E, int N>
__device__ inline void add_product(float (&acc)[E / 8][4], const float (&p)[N][4], const u16* b) {
    u32 lane = threadIdx.x % 32;
    const u16* row_b = b + (lane % 16) * (E + PAD) + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        u32 fa[4] = {pack_bf16(p[2 * k][0], p[2 * k][1]), pack_bf16(p[2 * k][2], p[2 * k][3]),
                     pack_bf16(p[2 * k + 1][0], p[2 * k + 1][1]), pack_bf16(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < E / 8; n += 2) {
            u32 fb[4];
            load_matrices_transposed(fb, row_b + k * 16 * (E + PAD) + n * 8);
            mma_bf16(acc[n], fa, fb[0], fb[1]);
            mma_bf16(acc[n + 1], fa, fb[2], fb[3]);
        }
    }
}

// Writes a warp's 16 x E sums, times a factor for each half of its rows, to rows first .. of `to`.
__device__ inline void store_pair(float* at, float a, float b) { at[0] = a, at[1] = b; }
__device__ inline void store_pair(u16* at, float a, float b) { *(u32*)at = pack_bf16(a, b); }
template <int E, typename T>
__device__ inline void store_rows(T* to, const float (&acc)[E / 8][4], const Place& p, u32 first, u32 row_width,
                                  u32 column, float low, float high) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 row = first + lane / 4 + 8 * half;
        if (row >= p.sequence) continue;
        float factor = half ? high : low;
        T* at = to + (p.first + row) * row_width + column + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < E / 8; n++)
            store_pair(at + n * 8, acc[n][2 * half] * factor, acc[n][2 * half + 1] * factor);
    }
}

template <int E>
__device__ inline void clear(float (&acc)[E / 8][4]) {
#pragma unroll
    for (int n = 0; n < E / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[n][i] = 0.0f;
}

// Forward. Grid: (T / ROWS, H, B). Shared: 3 ROWS rows of E + PAD.
template <int E, typename T>
__device__ void forward(const T* qkv, T* out, float* lse, Place p, float scale) {
    u32 h = blockIdx.y, kv = h / (p.heads / p.kv_heads), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // The longest rows first: what is left at the end is short.
    u32 first = (gridDim.x - 1 - blockIdx.x) * ROWS, row = first + warp * 16 + lane / 4;
    u16 *q = (u16*)dynamic_shared, *k = q + ROWS * (E + PAD), *v = k + ROWS * (E + PAD);
    float acc[E / 8][4], max[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.0f, 0.0f};
    clear<E>(acc);
    load_rows<E>(q, qkv, p, first, ROWS, p.width, h * E);
    for (u32 start = 0; start <= first; start += ROWS) {
        __syncthreads();
        load_rows<E>(k, qkv, p, start, ROWS, p.width, (p.heads + kv) * E);
        load_rows<E>(v, qkv, p, start, ROWS, p.width, (p.heads + p.kv_heads + kv) * E);
        __syncthreads();
        float s[ROWS / 8][4];
        multiply_rows<E, ROWS / 8>(s, q + warp * 16 * (E + PAD), k);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 i = row + 8 * half;
            float top = max[half];
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float& x = s[n][2 * half + c];
                    u32 j = start + n * 8 + lane % 4 * 2 + c;
                    x = j <= i ? x * (scale * LOG2E) : NEGATIVE_INFINITY;
                    top = fmaxf(top, x);
                }
            top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
            float keep = exp2f(max[half] - top), add = 0.0f;
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float& x = s[n][2 * half + c];
                    x = exp2f(x - top);
                    add += x;
                }
            max[half] = top;
            sum[half] = sum[half] * keep + add;
#pragma unroll
            for (int n = 0; n < E / 8; n++) {
                acc[n][2 * half] *= keep;
                acc[n][2 * half + 1] *= keep;
            }
        }
        add_product<E, ROWS / 8>(acc, s, v);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] += __shfl_xor_sync(FULL, sum[half], 1);
        sum[half] += __shfl_xor_sync(FULL, sum[half], 2);
        u32 i = row + 8 * half;
        if (i < p.sequence && lane % 4 == 0)
            lse[((u64)blockIdx.z * p.heads + h) * p.sequence + i] = max[half] / LOG2E + logf(sum[half]);
    }
    store_rows<E>(out, acc, p, first + warp * 16, p.heads * E, h * E, 1.0f / sum[0], 1.0f / sum[1]);
}

// Queries, or keys, that the gradients look at in one turn: fewer than ROWS, for the registers' sake.
#define TURN 32

// Gradients of keys and values. Grid: (T / ROWS, K, B). Shared: 2 ROWS + 2 TURN rows of E + PAD, and
// 2 TURN floats.
template <int E, typename T>
__device__ void backward_keys(const T* qkv, const T* dout, const float* lse, const float* delta, T* dqkv,
                              Place p, float scale) {
    u32 kv = blockIdx.y, group = p.heads / p.kv_heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 first = blockIdx.x * ROWS, key = first + warp * 16 + lane / 4;
    u16 *k = (u16*)dynamic_shared, *v = k + ROWS * (E + PAD), *q = v + ROWS * (E + PAD), *d = q + TURN * (E + PAD);
    float *row_lse = (float*)(d + TURN * (E + PAD)), *row_delta = row_lse + TURN;
    float dk[E / 8][4], dv[E / 8][4];
    clear<E>(dk);
    clear<E>(dv);
    load_rows<E>(k, qkv, p, first, ROWS, p.width, (p.heads + kv) * E);
    load_rows<E>(v, qkv, p, first, ROWS, p.width, (p.heads + p.kv_heads + kv) * E);
    for (u32 h = kv * group; h < (kv + 1) * group; h++) {
        u64 at = ((u64)blockIdx.z * p.heads + h) * p.sequence;
        for (u32 query = first; query < p.sequence; query += TURN) {
            __syncthreads();
            load_rows<E>(q, qkv, p, query, TURN, p.width, h * E);
            load_rows<E>(d, dout, p, query, TURN, p.heads * E, h * E);
            if (threadIdx.x < TURN) {
                bool inside = query + threadIdx.x < p.sequence;
                row_lse[threadIdx.x] = inside ? lse[at + query + threadIdx.x] * LOG2E : 0.0f;
                row_delta[threadIdx.x] = inside ? delta[at + query + threadIdx.x] : 0.0f;
            }
            __syncthreads();
            // Scores and their gradients, keys down and queries across.
            float s[TURN / 8][4], g[TURN / 8][4];
            multiply_rows<E, TURN / 8>(s, k + warp * 16 * (E + PAD), q);
            multiply_rows<E, TURN / 8>(g, v + warp * 16 * (E + PAD), d);
#pragma unroll
            for (int n = 0; n < TURN / 8; n++)
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    u32 column = n * 8 + lane % 4 * 2 + x % 2, i = query + column, j = key + 8 * (x / 2);
                    bool seen = i < p.sequence && j <= i;
                    s[n][x] = seen ? exp2f(s[n][x] * (scale * LOG2E) - row_lse[column]) : 0.0f;
                    g[n][x] = s[n][x] * (g[n][x] - row_delta[column]);
                }
            add_product<E, TURN / 8>(dv, s, d);
            add_product<E, TURN / 8>(dk, g, q);
        }
    }
    store_rows<E>(dqkv, dk, p, first + warp * 16, p.width, (p.heads + kv) * E, scale, scale);
    store_rows<E>(dqkv, dv, p, first + warp * 16, p.width, (p.heads + p.kv_heads + kv) * E, 1.0f, 1.0f);
}

// Gradients of queries. Grid: (T / ROWS, H, B). Shared: 2 ROWS + 2 TURN rows of E + PAD.
template <int E, typename T>
__device__ void backward_queries(const T* qkv, const T* dout, const float* lse, const float* delta, T* dqkv,
                                 Place p, float scale) {
    u32 h = blockIdx.y, kv = h / (p.heads / p.kv_heads), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 first = (gridDim.x - 1 - blockIdx.x) * ROWS, row = first + warp * 16 + lane / 4;
    u16 *q = (u16*)dynamic_shared, *d = q + ROWS * (E + PAD), *k = d + ROWS * (E + PAD), *v = k + TURN * (E + PAD);
    u64 at = ((u64)blockIdx.z * p.heads + h) * p.sequence;
    float dq[E / 8][4], row_lse[2], row_delta[2];
    clear<E>(dq);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 i = row + 8 * half;
        row_lse[half] = i < p.sequence ? lse[at + i] * LOG2E : 0.0f;
        row_delta[half] = i < p.sequence ? delta[at + i] : 0.0f;
    }
    load_rows<E>(q, qkv, p, first, ROWS, p.width, h * E);
    load_rows<E>(d, dout, p, first, ROWS, p.heads * E, h * E);
    for (u32 start = 0; start < first + ROWS && start < p.sequence; start += TURN) {
        __syncthreads();
        load_rows<E>(k, qkv, p, start, TURN, p.width, (p.heads + kv) * E);
        load_rows<E>(v, qkv, p, start, TURN, p.width, (p.heads + p.kv_heads + kv) * E);
        __syncthreads();
        float s[TURN / 8][4], g[TURN / 8][4];
        multiply_rows<E, TURN / 8>(s, q + warp * 16 * (E + PAD), k);
        multiply_rows<E, TURN / 8>(g, d + warp * 16 * (E + PAD), v);
#pragma unroll
        for (int n = 0; n < TURN / 8; n++)
#pragma unroll
            for (int x = 0; x < 4; x++) {
                u32 i = row + 8 * (x / 2), j = start + n * 8 + lane % 4 * 2 + x % 2;
                bool seen = i < p.sequence && j <= i;
                float prob = seen ? exp2f(s[n][x] * (scale * LOG2E) - row_lse[x / 2]) : 0.0f;
                g[n][x] = prob * (g[n][x] - row_delta[x / 2]);
            }
        add_product<E, TURN / 8>(dq, g, k);
    }
    store_rows<E>(dqkv, dq, p, first + warp * 16, p.width, h * E, scale, scale);
}

#define ATTENTION(NAME, E, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(128) attention_##NAME##_##E(                               \
        const T* qkv, T* out, float* lse, u32 t, u32 h, u32 k, u32, float scale, u32) {                     \
        forward<E>(qkv, out, lse, place(t, h, k, E), scale);                                                \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(128)                                                       \
        attention_##NAME##_keys_##E(const T* qkv, const T* dout, const float* lse, const float* delta,      \
                                    T* dqkv, u32 t, u32 h, u32 k, u32, float scale, u32) {                  \
        backward_keys<E>(qkv, dout, lse, delta, dqkv, place(t, h, k, E), scale);                            \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(128)                                                       \
        attention_##NAME##_queries_##E(const T* qkv, const T* dout, const float* lse, const float* delta,   \
                                       T* dqkv, u32 t, u32 h, u32 k, u32, float scale, u32) {               \
        backward_queries<E>(qkv, dout, lse, delta, dqkv, place(t, h, k, E), scale);                         \
    }
ATTENTION(bf16, 64, float)
ATTENTION(bf16, 128, float)
ATTENTION(narrow, 64, u16)
ATTENTION(narrow, 128, u16)
