// The paged cache of keys and values: writing new rows, and their attention to their own sequences.
//
// A block holds BLOCK tokens: keys as [K, E, BLOCK], so that neighbouring threads read neighbouring
// tokens, values as [K, BLOCK, E]. A slot is a block's number times BLOCK plus the place in it. Both are
// f32, bf16 or f16, rounded once when they are written; scores, probabilities and sums are f32.

#define BLOCK 16
// Tokens of the cache that one block of threads looks at: what a long sequence is split by, so that
// one row alone still fills the chip.
#define SPAN 256
// Query heads that share one pass over the keys.
#define GROUP 8

// How an element of the cache is kept.
struct F32 {
    typedef float Kept;
    static __device__ inline float load(const float* p) { return *p; }
    // Buffers of f32 are aligned to 4 bytes, no more.
    static __device__ inline float2 load_two(const float* p) {
        float2 r;
        r.x = p[0], r.y = p[1];
        return r;
    }
    static __device__ inline float store(float x) { return x; }
};
struct Bf16 {
    typedef u16 Kept;
    static __device__ inline float load(const u16* p) { return from_bf16(*p); }
    static __device__ inline float2 load_two(const u16* p) {
        u32 two = *(const u32*)p;
        float2 r;
        r.x = __uint_as_float(two << 16), r.y = __uint_as_float(two & 0xffff0000u);
        return r;
    }
    static __device__ inline u16 store(float x) { return (u16)(pack_bf16(x, 0.0f) & 0xffff); }
};
struct F16 {
    typedef u16 Kept;
    static __device__ inline float load(const u16* p) { return from_f16(*p); }
    static __device__ inline float2 load_two(const u16* p) {
        u32 two = *(const u32*)p;
        float2 r;
        r.x = from_f16((u16)(two & 0xffff)), r.y = from_f16((u16)(two >> 16));
        return r;
    }
    // What is larger than any finite f16 becomes the greatest of them; NaN stays NaN.
    static __device__ inline u16 store(float x) {
        if (x > F16_MAX) x = F16_MAX;
        if (x < -F16_MAX) x = -F16_MAX;
        return to_f16(x);
    }
};

// Stores the keys and values of new rows: for each element of keys and values, 4 bytes read and 4 or 2
// written. Grid: rows.
template <class C>
__device__ void write_rows(const float* qkv, const u32* slots, typename C::Kept* keys, typename C::Kept* values,
                           u32 heads, u32 kv_heads, u32 head_dim) {
    u32 e = head_dim, slot = slots[blockIdx.x], place = slot % BLOCK;
    const float* row = qkv + (u64)blockIdx.x * (heads + 2 * kv_heads) * e;
    u64 block = (u64)(slot / BLOCK) * kv_heads * e * BLOCK;
    for (u32 i = threadIdx.x; i < kv_heads * e; i += blockDim.x) {
        u32 head = i / e, c = i % e;
        u64 at = block + (u64)head * e * BLOCK;
        keys[at + c * BLOCK + place] = C::store(row[heads * e + i]);
        values[at + place * e + c] = C::store(row[(heads + kv_heads) * e + i]);
    }
}

// Attention of row blockIdx.x's query heads under key-value head blockIdx.y to tokens
// blockIdx.z SPAN .. + SPAN of its sequence. seen[r] tokens are visible to row r; its cache blocks are
// listed from blocks[starts[r]] on. Decode and chunked prefill are the same to it.
// With one span the result goes to out [rows, H E]; with more, unnormalised to partial
// [rows, H, spans, E + 2]: sums, then the maximum, then the sum of exponentials.
// Traffic: keys and values once for each row (for rows of one prompt from L2).
// 128 threads, each with two neighbouring tokens at a time. Shared: GROUP (E + SPAN) + 32 floats.
template <class C>
__device__ void attend(const float* qkv, const typename C::Kept* keys, const typename C::Kept* values,
                       const u32* seen, const u32* starts, const u32* blocks, float* out, float* partial, u32 heads,
                       u32 kv_heads, u32 head_dim, float scale) {
    u32 e = head_dim, row = blockIdx.x, kv = blockIdx.y, span = blockIdx.z, group = heads / kv_heads;
    u32 visible = seen[row], first = span * SPAN;
    if (first >= visible) return;
    u32 count = visible - first < SPAN ? visible - first : SPAN;
    const u32* list = blocks + starts[row] + first / BLOCK;
    float *q = (float*)dynamic_shared, *p = q + GROUP * e, *scratch = p + GROUP * SPAN;
    for (u32 g0 = 0; g0 < group; g0 += GROUP) {
        u32 g1 = group - g0 < GROUP ? group - g0 : GROUP, h0 = kv * group + g0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < GROUP * e; i += blockDim.x)
            q[i] = i < g1 * e ? qkv[(u64)row * (heads + 2 * kv_heads) * e + h0 * e + i] * scale : 0.0f;
        __syncthreads();
        // The second token of the last pair may be one that nobody sees: its score is not looked at.
        for (u32 t = 2 * threadIdx.x; t < count; t += 2 * blockDim.x) {
            const typename C::Kept* key = keys + ((u64)list[t / BLOCK] * kv_heads + kv) * e * BLOCK + t % BLOCK;
            float s[GROUP][2];
#pragma unroll
            for (int g = 0; g < GROUP; g++) s[g][0] = s[g][1] = 0.0f;
            for (u32 c = 0; c < e; c++) {
                float2 x = C::load_two(key + c * BLOCK);
#pragma unroll
                for (int g = 0; g < GROUP; g++) {
                    s[g][0] += q[g * e + c] * x.x;
                    s[g][1] += q[g * e + c] * x.y;
                }
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) p[g * SPAN + t] = s[g][0], p[g * SPAN + t + 1] = s[g][1];
        }
        __syncthreads();
        float max[GROUP], sum[GROUP];
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            max[g] = NEGATIVE_INFINITY;
            sum[g] = 0.0f;
            if (g < g1) {
                for (u32 t = threadIdx.x; t < count; t += blockDim.x) max[g] = fmaxf(max[g], p[g * SPAN + t]);
                max[g] = block_max(max[g], scratch);
                for (u32 t = threadIdx.x; t < count; t += blockDim.x) {
                    float x = expf(p[g * SPAN + t] - max[g]);
                    p[g * SPAN + t] = x;
                    sum[g] += x;
                }
                sum[g] = block_sum(sum[g], scratch);
            }
        }
        for (u32 c = threadIdx.x; c < e; c += blockDim.x) {
            float acc[GROUP];
#pragma unroll
            for (int g = 0; g < GROUP; g++) acc[g] = 0.0f;
            for (u32 t = 0; t < count; t++) {
                float x = C::load(values + (((u64)list[t / BLOCK] * kv_heads + kv) * BLOCK + t % BLOCK) * e + c);
#pragma unroll
                for (int g = 0; g < GROUP; g++)
                    if (g < g1) acc[g] += p[g * SPAN + t] * x;
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                if (g < g1) {
                    u64 head = (u64)row * heads + h0 + g;
                    if (gridDim.z == 1) {
                        out[head * e + c] = acc[g] / sum[g];
                    } else {
                        float* to = partial + (head * gridDim.z + span) * (e + 2);
                        to[c] = acc[g];
                        if (c == 0) to[e] = max[g], to[e + 1] = sum[g];
                    }
                }
            }
        }
    }
}

#define CACHED(NAME, C)                                                                                             \
    extern "C" __global__ void cache_write_##NAME(const float* qkv, const u32* slots, C::Kept* keys,                \
                                                  C::Kept* values, u32 heads, u32 kv_heads, u32 head_dim) {         \
        write_rows<C>(qkv, slots, keys, values, heads, kv_heads, head_dim);                                         \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(128)                                                               \
        cached_attention_##NAME(const float* qkv, const C::Kept* keys, const C::Kept* values, const u32* seen,      \
                                const u32* starts, const u32* blocks, float* out, float* partial, u32 heads,        \
                                u32 kv_heads, u32 head_dim, float scale) {                                          \
        attend<C>(qkv, keys, values, seen, starts, blocks, out, partial, heads, kv_heads, head_dim, scale);         \
    }
CACHED(f32, F32)
CACHED(bf16, Bf16)
CACHED(f16, F16)

// Joins the spans of a row's head, in order. Grid: (rows, H).
extern "C" __global__ void cached_attention_join(const float* partial, const u32* seen, float* out, u32 spans,
                                                 u32 head_dim) {
    u64 head = (u64)blockIdx.x * gridDim.y + blockIdx.y;
    const float* from = partial + head * spans * (head_dim + 2);
    u32 used = (seen[blockIdx.x] + SPAN - 1) / SPAN;
    if (used == 0) return;
    float max = NEGATIVE_INFINITY, sum = 0.0f;
    for (u32 s = 0; s < used; s++) max = fmaxf(max, from[s * (head_dim + 2) + head_dim]);
    for (u32 s = 0; s < used; s++) {
        const float* part = from + s * (head_dim + 2) + head_dim;
        sum += part[1] * expf(part[0] - max);
    }
    for (u32 c = threadIdx.x; c < head_dim; c += blockDim.x) {
        float total = 0.0f;
        for (u32 s = 0; s < used; s++) {
            const float* part = from + s * (head_dim + 2);
            total += part[c] * expf(part[head_dim] - max);
        }
        out[head * head_dim + c] = total / sum;
    }
}

// out[i] = from[indices[i]], rows of `width`: 8 bytes for each element. Grid: number of indices.
extern "C" __global__ void gather_rows(const float* from, const u32* indices, float* out, u32 width) {
    const float* row = from + (u64)indices[blockIdx.x] * width;
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) out[(u64)blockIdx.x * width + c] = row[c];
}
