// Softmax with cross-entropy over a vocabulary, whole or in slices. One block for a row of
// [rows, columns], of which the first `used` columns stand for tokens. Shared: 32 floats. With `vector`,
// columns is a multiple of 4. Traffic is given for logits of f32; bf16 moves half. narrow: logits.

// The greatest of a row's used logits and, relative to it, the sum of their exponentials: one pass, and
// the sum is rescaled when the maximum grows.
struct Peak {
    float max, sum;
};
__device__ inline Peak row_peak(const void* row, u32 used, int vector, u32 narrow, float* scratch) {
    float max = NEGATIVE_INFINITY, sum = 0.0f;
    for (u32 c = 4 * threadIdx.x; c < used; c += 4 * blockDim.x) {
        Four v = load_four(row, c, used, vector, narrow & 1);
        for (int k = 0; k < 4; k++) {
            if (c + k >= used) continue;
            if (v.v[k] > max) {
                sum = sum * expf(max - v.v[k]) + 1.0f;
                max = v.v[k];
            } else {
                sum += expf(v.v[k] - max);
            }
        }
    }
    Peak p;
    p.max = block_max(max, scratch);
    p.sum = block_sum(sum > 0.0f ? sum * expf(max - p.max) : 0.0f, scratch);
    return p;
}

// Replaces a row's logits by factor exp(logit - max), less `scale` at the target; 0 in the padding.
__device__ inline void row_gradient(void* row, u32 columns, u32 used, u32 target, float max, float factor,
                                    float scale, int vector, u32 narrow) {
    for (u32 c = 4 * threadIdx.x; c < columns; c += 4 * blockDim.x) {
        Four v = load_four(row, c, columns, vector, narrow & 1);
        for (int k = 0; k < 4; k++) {
            bool stands = c + k < used;
            v.v[k] = stands ? expf(v.v[k] - max) * factor : 0.0f;
            if (stands && c + k == target) v.v[k] -= scale;
        }
        store_four(row, c, columns, vector, v, narrow & 1);
    }
}

// losses[r] = ln(sum exp(logit - max)) - (target's logit - max); with a scale that is not 0, the logits
// become scale (softmax - one at the target), 0 in the padding.
// Reads 4 bytes for each logit once for the loss; again, and writes 4, for the gradient.
extern "C" __global__ void cross_entropy(void* logits, const u32* targets, float* losses, u32 columns, u32 used,
                                         u32 offset, float scale, int vector, u32 narrow) {
    void* row = after(logits, (u64)blockIdx.x * columns, narrow & 1);
    Peak p = row_peak(row, used, vector, narrow, (float*)dynamic_shared);
    u32 target = targets[blockIdx.x] - offset;
    float score = target < used ? get(row, target, narrow & 1) - p.max : 0.0f;
    __syncthreads();
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(p.sum) - score;
    if (scale == 0.0f) return;
    row_gradient(row, columns, used, target, p.max, scale / p.sum, scale, vector, narrow);
}

// max[r] = greatest of the used logits. 4 bytes for each logit.
extern "C" __global__ void row_max(const void* logits, float* max, u32 columns, u32 used, int vector, u32 narrow) {
    const void* row = after(logits, (u64)blockIdx.x * columns, narrow & 1);
    float best = NEGATIVE_INFINITY;
    for (u32 c = 4 * threadIdx.x; c < used; c += 4 * blockDim.x) {
        Four v = load_four(row, c, used, vector, narrow & 1);
        for (int k = 0; k < 4; k++)
            if (c + k < used) best = fmaxf(best, v.v[k]);
    }
    best = block_max(best, (float*)dynamic_shared);
    if (threadIdx.x == 0) max[blockIdx.x] = best;
}

// sums = [2, rows]: sum of exp(logit - max), then the target's logit - max, 0 outside this slice.
// 4 bytes for each logit.
extern "C" __global__ void partial_cross_entropy(const void* logits, const u32* targets, const float* max,
                                                 float* sums, u32 rows, u32 columns, u32 used, u32 offset,
                                                 int vector, u32 narrow) {
    const void* row = after(logits, (u64)blockIdx.x * columns, narrow & 1);
    float top = max[blockIdx.x], sum = 0.0f;
    for (u32 c = 4 * threadIdx.x; c < used; c += 4 * blockDim.x) {
        Four v = load_four(row, c, used, vector, narrow & 1);
        for (int k = 0; k < 4; k++)
            if (c + k < used) sum += expf(v.v[k] - top);
    }
    sum = block_sum(sum, (float*)dynamic_shared);
    if (threadIdx.x == 0) {
        u32 target = targets[blockIdx.x] - offset;
        sums[blockIdx.x] = sum;
        sums[rows + blockIdx.x] = target < used ? get(row, target, narrow & 1) - top : 0.0f;
    }
}

// Replaces a slice's logits by scale times their gradient, 0 in the padding. 8 bytes for each logit.
extern "C" __global__ void partial_cross_entropy_grad(void* logits, const u32* targets, const float* max,
                                                      const float* sums, u32 columns, u32 used, u32 offset,
                                                      float scale, int vector, u32 narrow) {
    void* row = after(logits, (u64)blockIdx.x * columns, narrow & 1);
    u32 target = targets[blockIdx.x] - offset;
    row_gradient(row, columns, used, target, max[blockIdx.x], scale / sums[blockIdx.x], scale, vector, narrow);
}
