// Choosing a token for each row of logits, by the rule of the tensor crate's `sampling`: sums of
// probabilities are whole numbers of 2^-32 of the likeliest token's, so that no order of additions shows.
//
// There is no sorting and nothing is added atomically. Every border (the last token that is kept, the one
// that the draw falls on) is the greatest number for which a sum that falls with it is still large
// enough, and is found three bits at a time: one pass over the row, in L2 by then, for each three.

#define DIGITS 7

// A logit's place in the order of logits: the greater, the likelier; -0 equals 0, no numbers come last.
__device__ inline u32 order_of(float x) {
    if (x != x) return 0;
    u32 bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// exp(x) for x up to 0 in units of 2^-32; 0 for what is no number.
__device__ inline u64 weight_of(float x) { return x > -23.0f ? (u64)(expf(x) * 4294967296.0f) : 0; }

// The sums over a block of N numbers of each thread, in scratch[0], [blockDim], [2 blockDim] ..
template <int N>
__device__ inline void block_sums(const u64 (&own)[N], u64* scratch) {
    __syncthreads();
    for (int d = 0; d < N; d++) scratch[d * blockDim.x + threadIdx.x] = own[d];
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half)
            for (int d = 0; d < N; d++)
                scratch[d * blockDim.x + threadIdx.x] += scratch[d * blockDim.x + threadIdx.x + half];
        __syncthreads();
    }
}

// The greatest number of `bits` bits that the amounts of all i with key(i) >= it still add up to `wanted`
// for; 0 where not even all do. The same in every thread.
template <class Key, class Amount>
__device__ u64 border(u32 n, int bits, u64 wanted, u64* scratch, Key key, Amount amount) {
    u64 found = 0;
    for (int shift = (bits - 1) / 3 * 3; shift >= 0; shift -= 3) {
        u64 sums[DIGITS] = {};
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
            u64 k = key(i);
            if (k < (found | (u64)1 << shift)) continue;
            u64 a = amount(i);
#pragma unroll
            for (int d = 0; d < DIGITS; d++)
                if (k >= (found | (u64)(d + 1) << shift)) sums[d] += a;
        }
        block_sums(sums, scratch);
        u64 digit = 0;
        for (int d = 0; d < DIGITS; d++)
            if (scratch[d * blockDim.x] >= wanted) digit = d + 1;
        found |= digit << shift;
    }
    return found;
}

// The sum over i of amount(i), the same in every thread.
template <class Amount>
__device__ u64 block_total(u32 n, u64* scratch, Amount amount) {
    u64 sums[1] = {};
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) sums[0] += amount(i);
    block_sums(sums, scratch);
    return scratch[0];
}

// What is likelier than a logit of the order `least`, and what is as likely, up to token `last`.
struct Kept {
    const float* row;
    u64 least;
    u32 last;
    __device__ inline bool has(u32 i) const {
        u64 order = order_of(row[i]);
        return order > least || (order == least && i <= last);
    }
};

// The likeliest of what is kept, no more than its amounts need to add up to `wanted`.
template <class Amount>
__device__ Kept cut(Kept old, u32 n, int index_bits, u64 wanted, u64* scratch, Amount amount) {
    const float* row = old.row;
    auto order = [=](u32 i) { return (u64)order_of(row[i]); };
    // From the end, so that what comes earlier is greater.
    auto from_end = [=](u32 i) { return (u64)(n - 1 - i); };
    auto of_kept = [=](u32 i) { return old.has(i) ? amount(i) : 0; };
    u64 least = border(n, 32, wanted, scratch, order, of_kept);
    u64 above = block_total(n, scratch, [=](u32 i) { return order(i) > least ? of_kept(i) : 0; });
    auto equal = [=](u32 i) { return order(i) == least ? of_kept(i) : 0; };
    u32 end = (u32)border(n, index_bits, wanted - above, scratch, from_end, equal);
    return {row, least, n - 1 - end};
}

// tokens[r] = the token drawn from row r of logits [rows, columns], among the first n. draws[r] holds the
// bits of the temperature, k, the bits of p, and the two halves of the point. Grid: rows. 256 threads.
// Shared: DIGITS x 256 u64. Traffic: the row once, and once from L2 for each three bits of a border
// (32 bits of a logit where k or p cut, and those of n).
extern "C" __global__ void __launch_bounds__(256)
    sample(const float* logits, const u32* draws, u32* tokens, u32 columns, u32 n) {
    const float* row = logits + (u64)blockIdx.x * columns;
    const u32* draw = draws + 5 * blockIdx.x;
    float temperature = __uint_as_float(draw[0]), p = __uint_as_float(draw[2]);
    u32 k = draw[1];
    u64* scratch = (u64*)dynamic_shared;
    // The likeliest token, the lowest of equals: its index is exact as f32.
    float max = NEGATIVE_INFINITY, first = -16777216.0f;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) max = fmaxf(max, row[i]);
    max = block_max(max, (float*)dynamic_shared);
    for (u32 i = threadIdx.x; i < n; i += blockDim.x)
        if (row[i] == max) {
            first = -(float)i;
            break;
        }
    first = block_max(first, (float*)dynamic_shared);
    u32 likeliest = first == -16777216.0f ? 0 : (u32)-first;
    if (temperature <= 0.0f || k == 1) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = likeliest;
        return;
    }
    float inverse = 1.0f / temperature;
    int index_bits = 1;
    while (index_bits < 24 && n >> index_bits) index_bits++;
    auto weight = [=](u32 i) { return weight_of((row[i] - max) * inverse); };
    auto one = [](u32) { return (u64)1; };
    Kept kept = {row, 0, n - 1};
    if (k > 0 && k < n) kept = cut(kept, n, index_bits, k, scratch, one);
    u64 total = block_total(n, scratch, [=](u32 i) { return kept.has(i) ? weight(i) : 0; });
    if (total > 0 && p < 1.0f) {
        u64 share = (u64)ceil((double)p * (double)total);
        kept = cut(kept, n, index_bits, share > 0 ? share : 1, scratch, weight);
        total = block_total(n, scratch, [=](u32 i) { return kept.has(i) ? weight(i) : 0; });
    }
    u32 token = likeliest;
    if (total > 0) {
        u64 point = __umul64hi(total, (u64)draw[4] << 32 | draw[3]);
        auto from_end = [=](u32 i) { return (u64)(n - 1 - i); };
        auto of_kept = [=](u32 i) { return kept.has(i) ? weight(i) : 0; };
        token = n - 1 - (u32)border(n, index_bits, point + 1, scratch, from_end, of_kept);
    }
    if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}
