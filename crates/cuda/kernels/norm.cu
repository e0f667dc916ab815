// LayerNorm and RMSNorm with the residual addition, and their gradients. One block for a row; a
// thread keeps to its columns, so that what it wrote it may read again.

// Computes, for each row of [rows, width], source = x + branch + branch_bias where there is a branch
// (stored in `sum`), else x; then y = (source - mean) rstd gain + bias, and stats = [2, rows]: means
// (0 for RMS), then 1 / sqrt(variance + epsilon).
// Moves 8 bytes for each element, 16 with a branch; the second and third look at a row come from L1.
// Grid: rows. Shared: 32 floats.
extern "C" __global__ void normalise(const float* x, const float* branch, const float* branch_bias, float* sum,
                                const float* gain, const float* bias, float* y, float* stats, u32 rows, u32 width,
                                float epsilon, int rms) {
    float* scratch = (float*)dynamic_shared;
    u64 at = (u64)blockIdx.x * width;
    const float* source = x + at;
    float total = 0.0f;
    if (branch) {
        for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
            float v = x[at + c] + branch[at + c];
            if (branch_bias) v += branch_bias[c];
            sum[at + c] = v;
        }
        source = sum + at;
    }
    float mean = 0.0f;
    if (!rms) {
        for (u32 c = threadIdx.x; c < width; c += blockDim.x) total += source[c];
        mean = block_sum(total, scratch) / width;
    }
    float square = 0.0f;
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
        float d = source[c] - mean;
        square += d * d;
    }
    float rstd = 1.0f / sqrtf(block_sum(square, scratch) / width + epsilon);
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
        float v = (source[c] - mean) * rstd * gain[c];
        y[at + c] = bias ? v + bias[c] : v;
    }
    if (threadIdx.x == 0) {
        stats[blockIdx.x] = mean;
        stats[rows + blockIdx.x] = rstd;
    }
}

// Columns that one thread of the gradient may have.
#define COLUMNS 16

// dx += gradient of the normalisation; sums of this block's rows for gain and bias go to
// partial[block] = [dgain width, dbias width], to be added by `add_rows` in order: no atomics.
// Moves 16 bytes for each element (dy, x, dx read and written).
// Grid: rows / row_group, rounded up. width <= COLUMNS blockDim. Shared: 32 floats.
extern "C" __global__ void norm_grad(const float* dy, const float* x, const float* gain, const float* stats,
                                     float* dx, float* partial, u32 rows, u32 width, u32 row_group, int rms) {
    float* scratch = (float*)dynamic_shared;
    float dgain[COLUMNS], dbias[COLUMNS];
#pragma unroll
    for (int k = 0; k < COLUMNS; k++) dgain[k] = dbias[k] = 0.0f;
    u32 first = blockIdx.x * row_group, last = first + row_group < rows ? first + row_group : rows;
    for (u32 r = first; r < last; r++) {
        u64 at = (u64)r * width;
        float mean = stats[r], rstd = stats[rows + r], along = 0.0f, average = 0.0f;
        for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
            float d = dy[at + c] * gain[c];
            along += d * (x[at + c] - mean);
            average += d;
        }
        along = block_sum(along, scratch) * rstd / width;
        average = rms ? 0.0f : block_sum(average, scratch) / width;
#pragma unroll
        for (int k = 0; k < COLUMNS; k++) {
            u32 c = threadIdx.x + k * blockDim.x;
            if (c < width) {
                float d = dy[at + c], normal = (x[at + c] - mean) * rstd;
                dx[at + c] += rstd * (d * gain[c] - average - normal * along);
                dgain[k] += d * normal;
                dbias[k] += d;
            }
        }
    }
    float* to = partial + (u64)blockIdx.x * 2 * width;
#pragma unroll
    for (int k = 0; k < COLUMNS; k++) {
        u32 c = threadIdx.x + k * blockDim.x;
        if (c < width) {
            to[c] = dgain[k];
            to[width + c] = dbias[k];
        }
    }
}

// Sums of columns, first half: partial[part][c] = sum over the part's rows of values[r][c].
// Reads 4 bytes for each element. Grid: (columns / blockDim, parts).
extern "C" __global__ void column_parts(const float* values, float* partial, u32 rows, u32 columns, u32 row_group) {
    u32 c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= columns) return;
    u32 first = blockIdx.y * row_group, last = first + row_group < rows ? first + row_group : rows;
    float total = 0.0f;
    for (u32 r = first; r < last; r++) total += values[(u64)r * columns + c];
    partial[(u64)blockIdx.y * columns + c] = total;
}

// Second half: sums[c] += values[0][c] + values[1][c] + ..., in this order, of rows `stride` apart.
// Grid: columns / blockDim.
extern "C" __global__ void add_rows(const float* values, float* sums, u32 rows, u32 columns, u32 stride) {
    u32 c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= columns) return;
    float total = 0.0f;
    for (u32 r = 0; r < rows; r++) total += values[(u64)r * stride + c];
    sums[c] += total;
}
