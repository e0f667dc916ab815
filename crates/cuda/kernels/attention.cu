// Causal attention with grouped queries in f32, forward and backward, in tiles (Dao et al. 2022): the
// scores never reach memory. Every head width up to 256. These are the exact ones, for f32 runs and as
// the measure of attention_bf16.cu; they use no tensor cores.
//
// qkv is [B T, (H + 2 K) E]: queries, keys, values. out is [B T, H E]; lse [B, H, T], the logarithm of
// each row's sum of exponentials.
// Operations: 2 B H T^2 E forward (half of the square, two products), 7 / 2 times that backward (the
// scores are made twice there, so that nothing needs atomics and every run gives the same bits).
// Traffic: qkv and out once; keys and values again for each tile of 32 queries, from L2.
// `narrow` is 1 where qkv, out and their gradients are kept as bf16.
// 128 threads: row = thread / 4, and each of the four has every fourth column.

#define TILE 32
#define SCORES (TILE + 1)

struct Place {
    u32 sequence, heads, kv_heads, head_dim, width, narrow;
    u64 first;  // Row of the sequence's first token.
};
__device__ inline Place place(u32 sequence, u32 heads, u32 kv_heads, u32 head_dim, u32 narrow) {
    Place p;
    p.sequence = sequence, p.heads = heads, p.kv_heads = kv_heads, p.head_dim = head_dim, p.narrow = narrow;
    p.width = (heads + 2 * kv_heads) * head_dim;
    p.first = (u64)blockIdx.z * sequence;
    return p;
}
// Copies rows first .. first + TILE of a head, zeros beyond the sequence, to shared rows of E + 1.
__device__ inline void load_tile(float* to, const void* from, const Place& p, u32 first, u32 row_width, u32 column) {
#pragma unroll 4
    for (u32 i = threadIdx.x; i < TILE * p.head_dim; i += blockDim.x) {
        u32 r = i / p.head_dim, c = i % p.head_dim;
        bool inside = first + r < p.sequence;
        to[r * (p.head_dim + 1) + c] =
            inside ? get(from, (p.first + first + r) * row_width + column + c, p.narrow) : 0.0f;
    }
}
__device__ inline float dot(const float* a, const float* b, u32 n) {
    float total = 0.0f;
#pragma unroll 4
    for (u32 i = 0; i < n; i++) total += a[i] * b[i];
    return total;
}
// acc += factor row, in this thread's columns.
template <int C>
__device__ inline void add_scaled(float (&acc)[C], float factor, const float* row, u32 part, u32 e) {
#pragma unroll
    for (int c = 0; c < C; c++) {
        u32 column = part + 4 * c;
        if (column < e) acc[c] += factor * row[column];
    }
}

// Forward. Grid: (T / TILE, H, B). C: columns of one thread, at least E / 4.
template <int C>
__device__ void forward(const void* qkv, void* out, float* lse, Place p, float scale) {
    u32 e = p.head_dim, h = blockIdx.y, kv = h / (p.heads / p.kv_heads), pitch = e + 1;
    float *q = (float*)dynamic_shared, *k = q + TILE * pitch, *v = k + TILE * pitch, *scores = v + TILE * pitch;
    u32 row = threadIdx.x / 4, part = threadIdx.x % 4, first = blockIdx.x * TILE, i = first + row;
    float acc[C], max = NEGATIVE_INFINITY, sum = 0.0f;
#pragma unroll
    for (int c = 0; c < C; c++) acc[c] = 0.0f;
    load_tile(q, qkv, p, first, p.width, h * e);
    for (u32 start = 0; start <= first; start += TILE) {
        __syncthreads();
        load_tile(k, qkv, p, start, p.width, (p.heads + kv) * e);
        load_tile(v, qkv, p, start, p.width, (p.heads + p.kv_heads + kv) * e);
        __syncthreads();
        float s[TILE / 4], top = max;
#pragma unroll 2
        for (int n = 0; n < TILE / 4; n++) {
            u32 j = part + 4 * n;
            s[n] = start + j <= i ? dot(q + row * pitch, k + j * pitch, e) * scale : NEGATIVE_INFINITY;
            top = fmaxf(top, s[n]);
        }
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
        float keep = expf(max - top), add = 0.0f;
#pragma unroll
        for (int n = 0; n < TILE / 4; n++) {
            float x = expf(s[n] - top);
            scores[row * SCORES + part + 4 * n] = x;
            add += x;
        }
        add += __shfl_xor_sync(FULL, add, 1);
        add += __shfl_xor_sync(FULL, add, 2);
        sum = sum * keep + add;
        max = top;
        __syncwarp();
#pragma unroll
        for (int c = 0; c < C; c++) acc[c] *= keep;
#pragma unroll 1
        for (u32 j = 0; j < TILE; j++) add_scaled<C>(acc, scores[row * SCORES + j], v + j * pitch, part, e);
    }
    if (i >= p.sequence) return;
    u64 to = (p.first + i) * p.heads * e + h * e;
#pragma unroll
    for (int c = 0; c < C; c++) {
        u32 column = part + 4 * c;
        if (column < e) put(out, to + column, p.narrow, acc[c] / sum);
    }
    if (part == 0) lse[((u64)blockIdx.z * p.heads + h) * p.sequence + i] = max + logf(sum);
}

// delta[b, h, t] = sum over the head's columns of dout out: 8 bytes for each element. One warp for
// each of n = B T H.
extern "C" __global__ void attention_delta(const void* out, const void* dout, float* delta, u64 n, u32 sequence,
                                           u32 heads, u32 head_dim, u32 narrow) {
    u64 at = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    bool inside = at < n;
    float total = 0.0f;
    if (inside)
        for (u32 c = threadIdx.x % 32; c < head_dim; c += 32)
            total += get(out, at * head_dim + c, narrow) * get(dout, at * head_dim + c, narrow);
    total = warp_sum(total);
    if (!inside || threadIdx.x % 32) return;
    u64 row = at / heads, head = at % heads;
    delta[(row / sequence * heads + head) * sequence + row % sequence] = total;
}

// One tile's probabilities and the gradients of its scores, both [TILE queries, TILE keys].
__device__ inline void score_gradients(const float* q, const float* k, const float* v, const float* dout, float* prob,
                                       float* grad, const float* lse, const float* delta, const Place& p, u32 query,
                                       u32 key, float scale) {
    u32 e = p.head_dim, pitch = e + 1;
#pragma unroll 1
    for (u32 n = threadIdx.x; n < TILE * TILE; n += blockDim.x) {
        u32 i = n / TILE, j = n % TILE;
        float x = 0.0f, d = 0.0f;
        if (query + i < p.sequence && key + j <= query + i) {
            x = expf(dot(q + i * pitch, k + j * pitch, e) * scale - lse[query + i]);
            d = x * (dot(dout + i * pitch, v + j * pitch, e) - delta[query + i]) * scale;
        }
        prob[i * SCORES + j] = x;
        grad[i * SCORES + j] = d;
    }
}

// Gradients of keys and values. Grid: (T / TILE, K, B).
template <int C>
__device__ void backward_keys(const void* qkv, const void* dout, const float* lse, const float* delta, void* dqkv,
                              Place p, float scale) {
    u32 e = p.head_dim, kv = blockIdx.y, group = p.heads / p.kv_heads, pitch = e + 1;
    float *q = (float*)dynamic_shared, *k = q + TILE * pitch, *v = k + TILE * pitch, *d = v + TILE * pitch;
    float *prob = d + TILE * pitch, *grad = prob + TILE * SCORES;
    u32 row = threadIdx.x / 4, part = threadIdx.x % 4, key = blockIdx.x * TILE;
    float dk[C], dv[C];
#pragma unroll
    for (int c = 0; c < C; c++) dk[c] = dv[c] = 0.0f;
    load_tile(k, qkv, p, key, p.width, (p.heads + kv) * e);
    load_tile(v, qkv, p, key, p.width, (p.heads + p.kv_heads + kv) * e);
    for (u32 h = kv * group; h < (kv + 1) * group; h++) {
        u64 at = ((u64)blockIdx.z * p.heads + h) * p.sequence;
        for (u32 query = key; query < p.sequence; query += TILE) {
            __syncthreads();
            load_tile(q, qkv, p, query, p.width, h * e);
            load_tile(d, dout, p, query, p.heads * e, h * e);
            __syncthreads();
            score_gradients(q, k, v, d, prob, grad, lse + at, delta + at, p, query, key, scale);
            __syncthreads();
#pragma unroll 1
            for (u32 i = 0; i < TILE; i++) {
                add_scaled<C>(dk, grad[i * SCORES + row], q + i * pitch, part, e);
                add_scaled<C>(dv, prob[i * SCORES + row], d + i * pitch, part, e);
            }
        }
    }
    if (key + row >= p.sequence) return;
    u64 to = (p.first + key + row) * p.width + (p.heads + kv) * e;
#pragma unroll
    for (int c = 0; c < C; c++) {
        u32 column = part + 4 * c;
        if (column < e) {
            put(dqkv, to + column, p.narrow, dk[c]);
            put(dqkv, to + p.kv_heads * e + column, p.narrow, dv[c]);
        }
    }
}

// Gradients of queries. Grid: (T / TILE, H, B).
template <int C>
__device__ void backward_queries(const void* qkv, const void* dout, const float* lse, const float* delta,
                                 void* dqkv, Place p, float scale) {
    u32 e = p.head_dim, h = blockIdx.y, kv = h / (p.heads / p.kv_heads), pitch = e + 1;
    float *q = (float*)dynamic_shared, *k = q + TILE * pitch, *v = k + TILE * pitch, *d = v + TILE * pitch;
    float *prob = d + TILE * pitch, *grad = prob + TILE * SCORES;
    u32 row = threadIdx.x / 4, part = threadIdx.x % 4, query = blockIdx.x * TILE;
    u64 at = ((u64)blockIdx.z * p.heads + h) * p.sequence;
    float dq[C];
#pragma unroll
    for (int c = 0; c < C; c++) dq[c] = 0.0f;
    load_tile(q, qkv, p, query, p.width, h * e);
    load_tile(d, dout, p, query, p.heads * e, h * e);
    for (u32 key = 0; key <= query; key += TILE) {
        __syncthreads();
        load_tile(k, qkv, p, key, p.width, (p.heads + kv) * e);
        load_tile(v, qkv, p, key, p.width, (p.heads + p.kv_heads + kv) * e);
        __syncthreads();
        score_gradients(q, k, v, d, prob, grad, lse + at, delta + at, p, query, key, scale);
        __syncthreads();
#pragma unroll 1
        for (u32 j = 0; j < TILE; j++) add_scaled<C>(dq, grad[row * SCORES + j], k + j * pitch, part, e);
    }
    if (query + row >= p.sequence) return;
    u64 to = (p.first + query + row) * p.width + h * e;
#pragma unroll
    for (int c = 0; c < C; c++) {
        u32 column = part + 4 * c;
        if (column < e) put(dqkv, to + column, p.narrow, dq[c]);
    }
}

// One entry for each count of columns: E up to 32, 64, 128, 256.
#define ATTENTION(C)                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) attention_##C(const void* qkv, void* out, float* lse,  \
                                                                    u32 t, u32 h, u32 k, u32 e, float scale, \
                                                                    u32 narrow) {                            \
        forward<C>(qkv, out, lse, place(t, h, k, e, narrow), scale);                                         \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(128)                                                        \
        attention_keys_##C(const void* qkv, const void* dout, const float* lse, const float* delta,          \
                           void* dqkv, u32 t, u32 h, u32 k, u32 e, float scale, u32 narrow) {                \
        backward_keys<C>(qkv, dout, lse, delta, dqkv, place(t, h, k, e, narrow), scale);                     \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(128)                                                        \
        attention_queries_##C(const void* qkv, const void* dout, const float* lse, const float* delta,       \
                              void* dqkv, u32 t, u32 h, u32 k, u32 e, float scale, u32 narrow) {             \
        backward_queries<C>(qkv, dout, lse, delta, dqkv, place(t, h, k, e, narrow), scale);                  \
    }
ATTENTION(8)
ATTENTION(16)
ATTENTION(32)
ATTENTION(64)
