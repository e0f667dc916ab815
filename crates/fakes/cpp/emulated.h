// The emulated device's language: what a CUDA compiler has built in, in plain C++, so that the kernels'
// own sources run on the processor. Test equipment: nothing that ran here has run on a GPU.
//
// The threads of a block are fibers of one system thread. A fiber runs until it waits for others (a
// barrier, a shuffle) or ends; then another goes on. The order alternates between first to last and
// last to first at each turn, so that a missing barrier shows as a wrong result. Shared memory is full
// of NaN when a block begins. A block in which nobody can go on ends the launch with an error.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <tuple>
#include <type_traits>
#include <utility>

#define EMULATED
#ifndef EMULATED_SCAN
#define __global__ __attribute__((visibility("default")))
#endif
#define __device__ __attribute__((unused))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct __attribute__((aligned(16))) float4 { float x, y, z, w; };

namespace emulated {

struct Dim { unsigned x, y, z; };
// Four sets in turn: what an instruction with two exchanges reads stays until all have read it.
struct Warp { uint32_t slots[4][32][4]; unsigned arrived, generation; };
struct Fiber {
    void* stack_pointer;
    Dim thread;
    unsigned lane, warp;
    unsigned exchanges;       // Warp exchanges done: chooses the slots.
    const unsigned* waits;    // The generation that must move on,
    unsigned seen;            // from this value.
    bool done;
};

constexpr unsigned THREADS_MAX = 1024, WARPS_MAX = 32;
constexpr size_t STACK = 256 << 10;

static Fiber fibers[THREADS_MAX];
static Warp warps[WARPS_MAX];
static unsigned block_arrived, block_generation, live;
static unsigned warp_live[WARPS_MAX];
static Fiber* current;
static void* scheduler_stack;
static char* stacks;
static Dim block_index, block_dim, grid_dim;
static void (*body)(void**);
static void** arguments;

// Changes stacks: saves what the calling convention says a function must keep.
extern "C" void emulated_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.type emulated_switch, @function
emulated_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size emulated_switch, . - emulated_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.type emulated_switch, %function
emulated_switch:
    sub sp, sp, #176
    stp x19, x20, [sp, #0]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
    add sp, sp, #176
    ret
.size emulated_switch, . - emulated_switch
)");
#else
#error "the emulated device knows x86-64 and aarch64"
#endif

static void pause() { emulated_switch(&current->stack_pointer, scheduler_stack); }

// Waits until `expected` fibers have arrived.
static void barrier(unsigned& arrived, unsigned& generation, unsigned expected) {
    if (++arrived == expected) {
        arrived = 0;
        generation++;
        return;
    }
    current->waits = &generation;
    current->seen = generation;
    pause();
}
static void warp_barrier() {
    Warp& w = warps[current->warp];
    barrier(w.arrived, w.generation, warp_live[current->warp]);
}
// Gives every lane of the warp `count` words of the others.
static uint32_t (*exchange(const uint32_t* words, int count))[4] {
    Warp& w = warps[current->warp];
    auto slots = w.slots[current->exchanges++ & 3];
    for (int i = 0; i < count; i++) slots[current->lane][i] = words[i];
    warp_barrier();
    return slots;
}

static void fiber_main() {
    body(arguments);
    current->done = true;
    // Who has ended is not waited for.
    Warp& w = warps[current->warp];
    if (--live > 0 && block_arrived == live) block_arrived = 0, block_generation++;
    if (--warp_live[current->warp] > 0 && w.arrived == warp_live[current->warp]) w.arrived = 0, w.generation++;
    pause();
}

static void prepare(unsigned i) {
    Fiber& f = fibers[i];
    f = Fiber{};
    f.thread = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
    f.lane = i % 32;
    f.warp = i / 32;
    uintptr_t top = (uintptr_t)(stacks + (i + 1) * STACK) & ~(uintptr_t)63;
#if defined(__x86_64__)
    void** sp = (void**)top;
    *--sp = nullptr;            // Where fiber_main would return to; keeps the stack aligned.
    *--sp = (void*)fiber_main;  // Popped by `ret`.
    for (int k = 0; k < 6; k++) *--sp = nullptr;
    f.stack_pointer = sp;
#else
    char* sp = (char*)top - 176;
    memset(sp, 0, 176);
    *(void**)(sp + 88) = (void*)fiber_main;
    f.stack_pointer = sp;
#endif
}

static bool run_block(unsigned threads) {
    live = threads;
    block_arrived = 0;
    memset(warps, 0, sizeof warps);
    memset(warp_live, 0, sizeof warp_live);
    for (unsigned i = 0; i < threads; i++) {
        prepare(i);
        warp_live[i / 32]++;
    }
    for (unsigned turn = 0; live > 0; turn++) {
        bool moved = false;
        for (unsigned k = 0; k < threads; k++) {
            Fiber& f = fibers[turn % 2 ? threads - 1 - k : k];
            if (f.done || (f.waits && *f.waits == f.seen)) continue;
            f.waits = nullptr;
            current = &f;
            moved = true;
            emulated_switch(&scheduler_stack, f.stack_pointer);
        }
        if (!moved) return false;
    }
    return true;
}

}  // namespace emulated

static unsigned char dynamic_shared[256 << 10] __attribute__((aligned(128)));

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_dim)
#define gridDim (emulated::grid_dim)

static inline void __syncthreads() {
    emulated::barrier(emulated::block_arrived, emulated::block_generation, emulated::live);
}
static inline void __syncwarp() { emulated::warp_barrier(); }
static inline uint32_t __float_as_uint(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float __uint_as_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
static inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return (uint64_t)((unsigned __int128)a * b >> 64); }
static inline float __shfl_xor_sync(unsigned, float x, int mask) {
    uint32_t word = __float_as_uint(x);
    return __uint_as_float(emulated::exchange(&word, 1)[emulated::current->lane ^ mask][0]);
}

static inline float from_f16(uint16_t h) {
    uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    float value = exponent == 0    ? ldexpf((float)mantissa, -24)
                  : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                   : ldexpf((float)(mantissa | 1024), (int)exponent - 25);
    return __uint_as_float(__float_as_uint(value) | sign);
}
// To nearest, ties to even: below 2^-14 in units of 2^-24, above by the bits that f16 has no room for.
static inline uint16_t to_f16(float x) {
    uint32_t u = __float_as_uint(x), sign = u >> 16 & 0x8000u, rest = u & 0x7fffffffu;
    if (x != x) return 0x7fff;
    if (fabsf(x) >= 65520.0f) return (uint16_t)(sign | 0x7c00u);
    if (fabsf(x) < ldexpf(1.0f, -14)) return (uint16_t)(sign | (uint32_t)nearbyintf(ldexpf(fabsf(x), 24)));
    return (uint16_t)(sign | (((rest + 0xfffu + (rest >> 13 & 1)) >> 13) - (112u << 10)));
}
static inline uint32_t to_bf16_bits(float x) {
    uint32_t u = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static inline uint32_t pack_bf16(float low, float high) { return to_bf16_bits(low) | to_bf16_bits(high) << 16; }

// The fragments of mma.m16n8k16 and ldmatrix as the PTX manual draws them.
static inline float emulated_half(uint32_t word, unsigned high) {
    return __uint_as_float(high ? word & 0xffff0000u : word << 16);
}
static inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t b[2] = {b0, b1};
    auto as = emulated::exchange(a, 4);
    auto bs = emulated::exchange(b, 2);
    unsigned lane = emulated::current->lane;
    for (unsigned n = 0; n < 4; n++) {
        unsigned row = lane / 4 + 8 * (n / 2), column = lane % 4 * 2 + n % 2;
        float sum = 0;
        for (unsigned k = 0; k < 16; k++) {
            float x = emulated_half(as[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2);
            float y = emulated_half(bs[column * 4 + k % 8 / 2][k / 8], k % 2);
            sum += x * y;
        }
        d[n] += sum;
    }
}
static inline void emulated_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    uint32_t words[2];
    memcpy(words, &row, 8);
    if ((uintptr_t)row % 16) abort();  // A GPU faults here too.
    auto rows = emulated::exchange(words, 2);
    unsigned lane = emulated::current->lane;
    for (unsigned m = 0; m < 4; m++) {
        auto at = [&](unsigned i, unsigned j) {
            const uint16_t* p;
            memcpy(&p, rows[8 * m + i], 8);
            return (uint32_t)p[j];
        };
        unsigned i = lane / 4, j = lane % 4 * 2;
        r[m] = transposed ? at(j, i) | at(j + 1, i) << 16 : at(i, j) | at(i, j + 1) << 16;
    }
}
static inline void load_matrices(uint32_t (&r)[4], const void* row) { emulated_matrices(r, row, false); }
static inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulated_matrices(r, row, true); }

namespace emulated {

template <class... A, size_t... I>
void call(void (*f)(A...), void** p, std::index_sequence<I...>) {
    f(*(std::decay_t<A>*)p[I]...);
}
template <class... A>
void call(void (*f)(A...), void** p) {
    call(f, p, std::index_sequence_for<A...>{});
}

template <class... A>
int count(void (*)(A...)) {
    static_assert(((sizeof(std::decay_t<A>) <= 8) && ...), "an argument fits its slot");
    return sizeof...(A);
}

// Runs every block of a launch. Returns false when a block's threads wait for each other for ever.
static bool launch(void (*entry)(void**), const unsigned* grid, const unsigned* block, unsigned shared, void** p) {
    if (!stacks) {
        void* m = mmap(nullptr, THREADS_MAX * STACK, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (m == MAP_FAILED) return false;
        stacks = (char*)m;
    }
    body = entry;
    arguments = p;
    grid_dim = {grid[0], grid[1], grid[2]};
    block_dim = {block[0], block[1], block[2]};
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                block_index = {x, y, z};
                memset(dynamic_shared, 0xff, shared);
                if (!run_block(block[0] * block[1] * block[2])) return false;
            }
    return true;
}

}  // namespace emulated

// What the fake NVRTC adds for each kernel that it finds.
#define EMULATED_ENTRY(name)                                                                          \
    extern "C" __attribute__((visibility("default"))) int emulated_##name(                            \
        const unsigned* grid, const unsigned* block, unsigned shared, void** p) {                     \
        return emulated::launch([](void** p) { emulated::call(name, p); }, grid, block, shared, p); \
    }                                                                                                 \
    extern "C" __attribute__((visibility("default"))) int emulated_arguments_##name() {              \
        return emulated::count(name);                                                                 \
    }
