// Softmax with cross-entropy over a vocabulary, whole or in slices. One block for a row of
// [rows, columns], of which the first `used` columns stand for tokens. Shared: 32 floats.

// losses[r] = ln(sum exp(logit - max)) - (target's logit - max); with a scale that is not 0, the logits
// become scale (softmax - one at the target), 0 in the padding.
// Reads 4 bytes for each logit once for the loss; again, and writes 4, for the gradient.
extern "C" __global__ void cross_entropy(float* logits, const u32* targets, float* losses, u32 columns, u32 used,
                                         u32 offset, float scale) {
    float* scratch = (float*)dynamic_shared;
    float* row = logits + (u64)blockIdx.x * columns;
    // Maximum and sum in one pass: a sum is rescaled when its maximum grows.
    float max = NEGATIVE_INFINITY, sum = 0.0f;
    for (u32 c = threadIdx.x; c < used; c += blockDim.x) {
        float v = row[c];
        if (v > max) {
            sum = sum * expf(max - v) + 1.0f;
            max = v;
        } else {
            sum += expf(v - max);
        }
    }
    float all = block_max(max, scratch);
    sum = block_sum(sum > 0.0f ? sum * expf(max - all) : 0.0f, scratch);
    u32 target = targets[blockIdx.x] - offset;
    float score = target < used ? row[target] - all : 0.0f;
    __syncthreads();
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) - score;
    if (scale == 0.0f) return;
    float factor = scale / sum;
    for (u32 c = threadIdx.x; c < columns; c += blockDim.x) {
        float v = c < used ? expf(row[c] - all) * factor : 0.0f;
        row[c] = c == target && c < used ? v - scale : v;
    }
}

// max[r] = greatest of the used logits. 4 bytes for each logit.
extern "C" __global__ void row_max(const float* logits, float* max, u32 columns, u32 used) {
    const float* row = logits + (u64)blockIdx.x * columns;
    float best = NEGATIVE_INFINITY;
    for (u32 c = threadIdx.x; c < used; c += blockDim.x) best = fmaxf(best, row[c]);
    best = block_max(best, (float*)dynamic_shared);
    if (threadIdx.x == 0) max[blockIdx.x] = best;
}

// sums = [2, rows]: sum of exp(logit - max), then the target's logit - max, 0 outside this slice.
// 4 bytes for each logit.
extern "C" __global__ void partial_cross_entropy(const float* logits, const u32* targets, const float* max,
                                                 float* sums, u32 rows, u32 columns, u32 used, u32 offset) {
    const float* row = logits + (u64)blockIdx.x * columns;
    float top = max[blockIdx.x], sum = 0.0f;
    for (u32 c = threadIdx.x; c < used; c += blockDim.x) sum += expf(row[c] - top);
    sum = block_sum(sum, (float*)dynamic_shared);
    if (threadIdx.x == 0) {
        u32 target = targets[blockIdx.x] - offset;
        sums[blockIdx.x] = sum;
        sums[rows + blockIdx.x] = target < used ? row[target] - top : 0.0f;
    }
}

// Replaces a slice's logits by scale times their gradient, 0 in the padding. 8 bytes for each logit.
extern "C" __global__ void partial_cross_entropy_grad(float* logits, const u32* targets, const float* max,
                                                      const float* sums, u32 columns, u32 used, u32 offset,
                                                      float scale) {
    float* row = logits + (u64)blockIdx.x * columns;
    float top = max[blockIdx.x], factor = scale / sums[blockIdx.x];
    u32 target = targets[blockIdx.x] - offset;
    for (u32 c = threadIdx.x; c < columns; c += blockDim.x) {
        float v = c < used ? expf(row[c] - top) * factor : 0.0f;
        row[c] = c == target && c < used ? v - scale : v;
    }
}
