// What every kernel is written in. It comes before each source; nothing else is included, so that
// NVRTC needs no headers.
//
// With EMULATED defined, crates/fakes/cpp/emulated.h comes before it instead of a CUDA compiler's built-ins,
// and the pieces that are PTX on a GPU have a plain body there. An emulated run shows that the
// arithmetic, the indexing and the barriers are right. It is not a run on a GPU.
//
// Shared memory is always `dynamic_shared`, carved up by the kernel: the size is the launch's.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#ifndef EMULATED
extern __shared__ __align__(128) unsigned char dynamic_shared[];

// bf16 and f16 are kept as 16 bits. Rounding is to nearest, ties to even.
__device__ inline float from_f16(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ inline u16 to_f16(float x) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}
// Packs two numbers as bf16, the first in the lower half.
__device__ inline u32 pack_bf16(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
// D (16 x 8, f32) += A (16 x 16, bf16) . B (16 x 8, bf16), one warp; the fragments' layout is that of
// the PTX manual's mma.m16n8k16.
__device__ inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four 8 x 8 matrices of 16 bits from shared memory: lane i gives the address of row i % 8 of matrix
// i / 8 and gets elements 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of each.
__device__ inline void load_matrices(u32 (&r)[4], const void* row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
// The same, transposed: elements of rows 2 (i % 4) and 2 (i % 4) + 1, column i / 4.
__device__ inline void load_matrices_transposed(u32 (&r)[4], const void* row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
#endif

__device__ inline float from_bf16(u16 h) { return __uint_as_float((u32)h << 16); }
__device__ inline float round_bf16(float x) { return from_bf16((u16)(pack_bf16(x, 0.0f) & 0xffff)); }

#define FULL 0xffffffffu
#define F16_MAX 65504.0f
#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)

__device__ inline float warp_sum(float x) {
    for (int m = 16; m > 0; m >>= 1) x += __shfl_xor_sync(FULL, x, m);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int m = 16; m > 0; m >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, m));
    return x;
}

// Sums over a block of whole warps, the same in every thread and every run. `scratch` holds 32 numbers
// and may be used again after the call.
__device__ inline float block_sum(float x, float* scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? scratch[lane] : 0.0f);
    __syncthreads();
    return x;
}
__device__ inline float block_max(float x, float* scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_max(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_max(lane < warps ? scratch[lane] : NEGATIVE_INFINITY);
    __syncthreads();
    return x;
}

// Values that are kept as f32 or, where `narrow` is not 0, as bf16. A kernel whose operands may be either
// has an argument `narrow` with a bit for each, the same for the whole launch.
__device__ inline float get(const void* p, u64 i, u32 narrow) {
    return narrow ? from_bf16(((const u16*)p)[i]) : ((const float*)p)[i];
}
__device__ inline void put(void* p, u64 i, u32 narrow, float x) {
    if (narrow) {
        ((u16*)p)[i] = (u16)(pack_bf16(x, 0.0f) & 0xffff);
    } else {
        ((float*)p)[i] = x;
    }
}
__device__ inline const void* after(const void* p, u64 i, u32 narrow) { return (const char*)p + i * (narrow ? 2 : 4); }
__device__ inline void* after(void* p, u64 i, u32 narrow) { return (char*)p + i * (narrow ? 2 : 4); }

// Four neighbours, read and written in one access where `vector` says that every operand is aligned
// to 16 bytes.
struct Four {
    float v[4];
};
__device__ inline Four load_four(const void* p, u64 i, u64 n, int vector, u32 narrow = 0) {
    Four r;
    if (vector && i + 4 <= n) {
        if (narrow) {
            uint2 t = *(const uint2*)((const u16*)p + i);
            r.v[0] = __uint_as_float(t.x << 16), r.v[1] = __uint_as_float(t.x & 0xffff0000u);
            r.v[2] = __uint_as_float(t.y << 16), r.v[3] = __uint_as_float(t.y & 0xffff0000u);
        } else {
            float4 t = *(const float4*)((const float*)p + i);
            r.v[0] = t.x, r.v[1] = t.y, r.v[2] = t.z, r.v[3] = t.w;
        }
    } else {
        for (int k = 0; k < 4; k++) r.v[k] = i + k < n ? get(p, i + k, narrow) : 0.0f;
    }
    return r;
}
__device__ inline void store_four(void* p, u64 i, u64 n, int vector, const Four& r, u32 narrow = 0) {
    if (vector && i + 4 <= n) {
        if (narrow) {
            uint2 t;
            t.x = pack_bf16(r.v[0], r.v[1]), t.y = pack_bf16(r.v[2], r.v[3]);
            *(uint2*)((u16*)p + i) = t;
        } else {
            float4 t;
            t.x = r.v[0], t.y = r.v[1], t.z = r.v[2], t.w = r.v[3];
            *(float4*)((float*)p + i) = t;
        }
    } else {
        for (int k = 0; k < 4; k++)
            if (i + k < n) put(p, i + k, narrow, r.v[k]);
    }
}
// Four elements for each thread, and round again until all are done.
#define FOR_FOURS(i, n)                                                                  \
    for (u64 i = 4 * ((u64)blockIdx.x * blockDim.x + threadIdx.x); i < (n);              \
         i += 4 * (u64)gridDim.x * blockDim.x)
