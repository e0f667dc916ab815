// The paged cache of keys and values: writing new rows, and their attention to their own sequences.
//
// A block holds BLOCK tokens: keys as [K, E, BLOCK], so that neighbouring threads read neighbouring
// tokens, values as [K, BLOCK, E]. A slot is a block's number times BLOCK plus the place in it.

#define BLOCK 16
// Tokens of the cache that one block of threads looks at: what a long sequence is split by, so that
// one row alone still fills the chip.
#define SPAN 256
// Query heads that share one pass over the keys.
#define GROUP 8

// Stores the keys and values of new rows. 16 bytes for each element of keys and values together.
// Grid: rows.
extern "C" __global__ void cache_write(const float* qkv, const u32* slots, float* keys, float* values, u32 heads,
                                       u32 kv_heads, u32 head_dim) {
    u32 e = head_dim, slot = slots[blockIdx.x], place = slot % BLOCK;
    const float* row = qkv + (u64)blockIdx.x * (heads + 2 * kv_heads) * e;
    u64 block = (u64)(slot / BLOCK) * kv_heads * e * BLOCK;
    for (u32 i = threadIdx.x; i < kv_heads * e; i += blockDim.x) {
        u32 head = i / e, c = i % e;
        u64 at = block + (u64)head * e * BLOCK;
        keys[at + c * BLOCK + place] = row[heads * e + i];
        values[at + place * e + c] = row[(heads + kv_heads) * e + i];
    }
}

// Attention of row blockIdx.x's query heads under key-value head blockIdx.y to tokens
// blockIdx.z SPAN .. + SPAN of its sequence. seen[r] tokens are visible to row r; its cache blocks are
// listed from blocks[starts[r]] on. Decode and chunked prefill are the same to it.
// With one span the result goes to out [rows, H E]; with more, unnormalised to partial
// [rows, H, spans, E + 2]: sums, then the maximum, then the sum of exponentials.
// Traffic: keys and values once for each row (for rows of one prompt from L2), 8 bytes an element.
// 128 threads. Shared: GROUP (E + SPAN) + 32 floats.
extern "C" __global__ void __launch_bounds__(128)
    cached_attention(const float* qkv, const float* keys, const float* values, const u32* seen, const u32* starts,
                     const u32* blocks, float* out, float* partial, u32 heads, u32 kv_heads, u32 head_dim,
                     float scale) {
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
        for (u32 t = threadIdx.x; t < count; t += blockDim.x) {
            const float* key = keys + ((u64)list[t / BLOCK] * kv_heads + kv) * e * BLOCK + t % BLOCK;
            float s[GROUP];
#pragma unroll
            for (int g = 0; g < GROUP; g++) s[g] = 0.0f;
            for (u32 c = 0; c < e; c++) {
                float x = key[c * BLOCK];
#pragma unroll
                for (int g = 0; g < GROUP; g++) s[g] += q[g * e + c] * x;
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) p[g * SPAN + t] = s[g];
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
                float x = values[(((u64)list[t / BLOCK] * kv_heads + kv) * BLOCK + t % BLOCK) * e + c];
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
