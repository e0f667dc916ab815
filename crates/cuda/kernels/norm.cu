// LayerNorm and RMSNorm with the residual addition, and their gradients. One block for a row; a
// thread keeps to its columns, four neighbours at a time, so that what it wrote it may read again.
// Traffic is given for f32; operands that are kept as bf16 move half of it.

// Computes, for each row of [rows, width], source = x + branch + branch_bias where there is a branch
// (stored in `sum`), else x; then y = (source - mean) rstd gain + bias, and stats = [2, rows]: means
// (0 for RMS), then 1 / sqrt(variance + epsilon).
// Moves 8 bytes for each element, 16 with a branch; the second and third look at a row come from L1.
// Grid: rows. Shared: 32 floats. With `vector`, width is a multiple of 4. narrow: branch, y.
extern "C" __global__ void normalise(const float* x, const void* branch, const float* branch_bias, float* sum,
                                const float* gain, const float* bias, void* y, float* stats, u32 rows, u32 width,
                                float epsilon, int rms, int vector, u32 narrow) {
    float* scratch = (float*)dynamic_shared;
    u64 at = (u64)blockIdx.x * width;
    const float* source = x + at;
    u32 first = 4 * threadIdx.x, step = 4 * blockDim.x;
    float total = 0.0f;
    if (branch) {
        const void* row = after(branch, at, narrow & 1);
        for (u32 c = first; c < width; c += step) {
            Four v = load_four(source, c, width, vector), b = load_four(row, c, width, vector, narrow & 1);
            for (int k = 0; k < 4; k++) {
                v.v[k] += b.v[k];
                if (branch_bias && c + k < width) v.v[k] += branch_bias[c + k];
            }
            store_four(sum + at, c, width, vector, v);
        }
        source = sum + at;
    }
    float mean = 0.0f;
    if (!rms) {
        for (u32 c = first; c < width; c += step) {
            Four v = load_four(source, c, width, vector);
            total += (v.v[0] + v.v[1]) + (v.v[2] + v.v[3]);
        }
        mean = block_sum(total, scratch) / width;
    }
    float square = 0.0f;
    for (u32 c = first; c < width; c += step) {
        Four v = load_four(source, c, width, vector);
        for (int k = 0; k < 4; k++) {
            float d = c + k < width ? v.v[k] - mean : 0.0f;
            square += d * d;
        }
    }
    float rstd = 1.0f / sqrtf(block_sum(square, scratch) / width + epsilon);
    void* to = after(y, at, narrow & 2);
    for (u32 c = first; c < width; c += step) {
        Four v = load_four(source, c, width, vector), g = load_four(gain, c, width, vector);
        for (int k = 0; k < 4; k++) {
            v.v[k] = (v.v[k] - mean) * rstd * g.v[k];
            if (bias && c + k < width) v.v[k] += bias[c + k];
        }
        store_four(to, c, width, vector, v, narrow & 2);
    }
    if (threadIdx.x == 0) {
        stats[blockIdx.x] = mean;
        stats[rows + blockIdx.x] = rstd;
    }
}

// Fours of columns that one thread of the gradient may have.
#define FOURS 4

// dx += gradient of the normalisation; sums of this block's rows for gain and bias go to
// partial[block] = [dgain width, dbias width], to be added by `add_rows` in order: no atomics.
// Moves 16 bytes for each element (dy, x, dx read and written).
// Grid: rows / row_group, rounded up. width <= 4 FOURS blockDim. Shared: 32 floats. With `vector`, width
// is a multiple of 4. narrow: dy.
extern "C" __global__ void norm_grad(const void* dy, const float* x, const float* gain, const float* stats,
                                     float* dx, float* partial, u32 rows, u32 width, u32 row_group, int rms,
                                     int vector, u32 narrow) {
    float* scratch = (float*)dynamic_shared;
    float dgain[FOURS][4], dbias[FOURS][4];
#pragma unroll
    for (int n = 0; n < FOURS; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) dgain[n][k] = dbias[n][k] = 0.0f;
    u32 first = blockIdx.x * row_group, last = first + row_group < rows ? first + row_group : rows;
    for (u32 r = first; r < last; r++) {
        u64 at = (u64)r * width;
        const void* row = after(dy, at, narrow & 1);
        float mean = stats[r], rstd = stats[rows + r], along = 0.0f, average = 0.0f;
        for (u32 c = 4 * threadIdx.x; c < width; c += 4 * blockDim.x) {
            Four d = load_four(row, c, width, vector, narrow & 1), v = load_four(x + at, c, width, vector);
            Four g = load_four(gain, c, width, vector);
            for (int k = 0; k < 4; k++) {
                // Beyond the width the gradient is 0.
                float scaled = d.v[k] * g.v[k];
                along += scaled * (v.v[k] - mean);
                average += scaled;
            }
        }
        along = block_sum(along, scratch) * rstd / width;
        average = rms ? 0.0f : block_sum(average, scratch) / width;
#pragma unroll
        for (int n = 0; n < FOURS; n++) {
            u32 c = 4 * (threadIdx.x + n * blockDim.x);
            if (c < width) {
                Four d = load_four(row, c, width, vector, narrow & 1), v = load_four(x + at, c, width, vector);
                Four g = load_four(gain, c, width, vector), to = load_four(dx + at, c, width, vector);
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    float normal = (v.v[k] - mean) * rstd;
                    to.v[k] += rstd * (d.v[k] * g.v[k] - average - normal * along);
                    dgain[n][k] += d.v[k] * normal;
                    dbias[n][k] += d.v[k];
                }
                store_four(dx + at, c, width, vector, to);
            }
        }
    }
    float* to = partial + (u64)blockIdx.x * 2 * width;
#pragma unroll
    for (int n = 0; n < FOURS; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 c = 4 * (threadIdx.x + n * blockDim.x) + k;
            if (c < width) {
                to[c] = dgain[n][k];
                to[width + c] = dbias[n][k];
            }
        }
}

// Sums of columns, first half: partial[part][c] = sum over the part's rows of values[r][c]; four columns
// for each thread. Reads 4 bytes for each element. Grid: (columns / (4 blockDim), parts). With `vector`,
// columns is a multiple of 4. narrow: values.
extern "C" __global__ void column_parts(const void* values, float* partial, u32 rows, u32 columns, u32 row_group,
                                        int vector, u32 narrow) {
    u32 c = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (c >= columns) return;
    u32 first = blockIdx.y * row_group, last = first + row_group < rows ? first + row_group : rows;
    Four total;
    for (int k = 0; k < 4; k++) total.v[k] = 0.0f;
#pragma unroll 4
    for (u32 r = first; r < last; r++) {
        Four v = load_four(after(values, (u64)r * columns, narrow & 1), c, columns, vector, narrow & 1);
        for (int k = 0; k < 4; k++) total.v[k] += v.v[k];
    }
    float* to = partial + (u64)blockIdx.y * columns;
    for (int k = 0; k < 4; k++)
        if (c + k < columns) to[c + k] = total.v[k];
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
