// AdamW over flat ranges, rounding by chance, and sums of squares in a fixed order.

// Rounds to bf16 up in magnitude as often as the 16 bits that are cut off say. The chance is a hash of the
// number, its place and a seed (splitmix64), as reference.rs of the tensor crate has it.
__device__ inline float round_by_chance(float x, u64 place, u64 seed) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return x;
    u64 z = (seed ^ (place << 32 | bits) ^ place >> 32) + 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    return __uint_as_float((bits + (u32)(z >> 48)) & 0xffff0000u);
}
// The same of four neighbours.
__device__ inline Four round_four(const Four& a, u64 place, u64 seed) {
    Four r;
    for (int k = 0; k < 4; k++) r.v[k] = round_by_chance(a.v[k], place + k, seed);
    return r;
}

// to = from, rounded by chance: 6 bytes for each of n elements, the first of which is in place `first`.
extern "C" __global__ void copy_by_chance(const float* from, u16* to, u64 n, u64 seed, u64 first, int vector) {
    FOR_FOURS(i, n) {
        store_four(to, i, n, vector, round_four(load_four(from, i, n, vector), first + i, seed), 1);
    }
}

// One step of AdamW (Loshchilov and Hutter 2019) on n parameters and their moments, all f32: reads 16
// bytes and writes 12 for each; where there is a copy of the parameters in bf16, what products read, 2 more.
// The copy is rounded to the nearest or, where by_chance is not 0, by chance.
// keep = 1 - rate decay; rate = learning rate / correction1; root = 1 / sqrt(correction2).
extern "C" __global__ void adamw(float* p, u16* copy, const float* g, float* m, float* v, u64 n, float beta1,
                                 float beta2, float epsilon, float keep, float rate, float root,
                                 float gradient_scale, u64 seed, u64 first, int by_chance, int vector) {
    FOR_FOURS(i, n) {
        Four a = load_four(p, i, n, vector), b = load_four(g, i, n, vector);
        Four c = load_four(m, i, n, vector), d = load_four(v, i, n, vector);
        for (int k = 0; k < 4; k++) {
            float x = b.v[k] * gradient_scale;
            c.v[k] = beta1 * c.v[k] + (1.0f - beta1) * x;
            d.v[k] = beta2 * d.v[k] + (1.0f - beta2) * x * x;
            a.v[k] = a.v[k] * keep - rate * c.v[k] / (sqrtf(d.v[k]) * root + epsilon);
        }
        store_four(p, i, n, vector, a);
        if (copy) store_four(copy, i, n, vector, by_chance ? round_four(a, first + i, seed) : a, 1);
        store_four(m, i, n, vector, c);
        store_four(v, i, n, vector, d);
    }
}

__device__ inline double block_sum_f64(double x, double* scratch) {
    scratch[threadIdx.x] = x;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
        __syncthreads();
    }
    return scratch[0];
}

// partial[b] = sum of squares of elements b chunk .. (b + 1) chunk, in f64; 4 bytes for each element.
// Which thread adds what depends on n alone. Grid: n / chunk, rounded up; blockDim a power of 2.
// Shared: blockDim doubles.
extern "C" __global__ void sum_squares(const float* x, double* partial, u64 n, u64 chunk) {
    u64 first = blockIdx.x * chunk, last = first + chunk < n ? first + chunk : n;
    double total = 0.0;
    for (u64 i = first + threadIdx.x; i < last; i += blockDim.x) total += (double)x[i] * x[i];
    total = block_sum_f64(total, (double*)dynamic_shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// total[0] = sum of n doubles; one block.
extern "C" __global__ void sum_doubles(const double* x, double* total, u64 n) {
    double sum = 0.0;
    for (u64 i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
    sum = block_sum_f64(sum, (double*)dynamic_shared);
    if (threadIdx.x == 0) total[0] = sum;
}
