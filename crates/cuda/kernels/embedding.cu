// Rows of tables: looking up, adding to, gathering; rotary positions. Bound by memory.

// out[i] = table[indices[i] - offset], or zeros where that is outside the table; added with
// `accumulate`. Moves 8 bytes for each element, 12 when it adds. Grid: number of indices. narrow: out.
extern "C" __global__ void embed(const float* table, const u32* indices, void* out, u32 offset, u32 table_rows,
                                 u32 width, int accumulate, u32 narrow) {
    u32 row = indices[blockIdx.x] - offset;  // Wraps round below the offset: then it is too large.
    bool inside = row < table_rows;
    if (!inside && accumulate) return;
    u64 at = (u64)blockIdx.x * width;
    const float* from = table + (u64)row * width;
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
        float v = inside ? from[c] : 0.0f;
        put(out, at + c, narrow & 1, accumulate ? get(out, at + c, narrow & 1) + v : v);
    }
}

// dtable[rows[g]] += dy[members[j]] for j in starts[g] .. starts[g + 1], in this order: one block for
// each row that anything is added to, so that there are no atomics and every run gives the same.
// Reads 4 bytes for each element of dy. Grid: groups. narrow: dy.
extern "C" __global__ void embed_grad(const void* dy, const u32* rows, const u32* starts, const u32* members,
                                      float* dtable, u32 width, u32 narrow) {
    u32 first = starts[blockIdx.x], last = starts[blockIdx.x + 1];
    float* to = dtable + (u64)rows[blockIdx.x] * width;
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
        float total = to[c];
        for (u32 j = first; j < last; j++) total += get(dy, (u64)members[j] * width + c, narrow & 1);
        to[c] = total;
    }
}

// Rotates the first `heads` heads of every row of [rows, width] in place: pairs (i, i + E / 2), by
// table [positions, E] = E / 2 cosines, then E / 2 sines. 8 bytes for each element of those heads,
// and the table from L2. One thread a pair; n = rows heads E / 2. narrow: x.
extern "C" __global__ void rotary(void* x, const float* table, const u32* positions, u64 n, u32 width, u32 heads,
                                  u32 head_dim, float sign, u32 narrow) {
    u32 half = head_dim / 2;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        u32 pair = (u32)(i % half), head = (u32)(i / half % heads);
        u64 row = i / half / heads;
        const float* turn = table + (u64)positions[row] * head_dim;
        float c = turn[pair], s = turn[half + pair] * sign;
        u64 at = row * width + head * head_dim + pair;
        float a = get(x, at, narrow & 1), b = get(x, at + half, narrow & 1);
        put(x, at, narrow & 1, a * c - b * s);
        put(x, at + half, narrow & 1, b * c + a * s);
    }
}
