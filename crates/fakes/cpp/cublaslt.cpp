// A fake cuBLASLt for the emulated device: plain products in f32 of f32 or bf16 factors, to either, with the
// attributes that crate `cuda` sets, checked as strictly as the documentation states them. Test
// equipment. DRUMLINE_FAKE_CUDA=no-epilogues: it knows no activation behind a product.
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { R_32F = 0, R_16BF = 14 };
enum { COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77 };
enum { EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4, EPILOGUE_GELU_AUX = 160, EPILOGUE_GELU_AUX_BIAS = 164, EPILOGUE_DGELU = 192 };

struct Layout {
    uint32_t type;
    uint64_t rows, columns;
    int64_t ld;
};
struct Description {
    uint32_t compute, scale;
    int32_t transposed_a = 0, transposed_b = 0;
    uint32_t epilogue = EPILOGUE_DEFAULT;
    const void* bias = nullptr;
    int32_t bias_type = -1;  // As the output.
    void* aux = nullptr;
    int64_t aux_ld = 0;
    int32_t aux_type = -1;
};
static bool writes_aux(uint32_t e) { return e == EPILOGUE_GELU_AUX || e == EPILOGUE_GELU_AUX_BIAS; }
static bool uses_bias(uint32_t e) { return e == EPILOGUE_BIAS || e == EPILOGUE_GELU_AUX_BIAS; }
struct Preference {
    uint64_t workspace = 0;
    uint32_t alignment[4] = {256, 256, 256, 256};
};
struct Algorithm {
    uint64_t data[8];
};
struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    uint32_t state;
    float waves;
    int reserved[4];
};
constexpr uint64_t MARK = 0x656d756c61746564;

EXPORT size_t cublasLtGetVersion() { return 130000; }
EXPORT int cublasLtCreate(void** handle) {
    *handle = new int(0);
    return SUCCESS;
}
EXPORT int cublasLtDestroy(void* handle) {
    delete (int*)handle;
    return SUCCESS;
}
EXPORT int cublasLtMatrixLayoutCreate(Layout** layout, uint32_t type, uint64_t rows, uint64_t columns, int64_t ld) {
    if ((type != R_32F && type != R_16BF) || ld < (int64_t)rows) return INVALID_VALUE;
    *layout = new Layout{type, rows, columns, ld};
    return SUCCESS;
}
EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return SUCCESS;
}
EXPORT int cublasLtMatmulDescCreate(Description** description, uint32_t compute, uint32_t scale) {
    if ((compute != COMPUTE_32F && compute != COMPUTE_32F_FAST_TF32) || scale != R_32F) return INVALID_VALUE;
    *description = new Description{compute, scale};
    return SUCCESS;
}
EXPORT int cublasLtMatmulDescDestroy(Description* description) {
    delete description;
    return SUCCESS;
}
EXPORT int cublasLtMatmulDescSetAttribute(Description* d, uint32_t attribute, const void* value, size_t bytes) {
    void* to = attribute == 3 ? (void*)&d->transposed_a
               : attribute == 4 ? (void*)&d->transposed_b
               : attribute == 7 ? (void*)&d->epilogue
               : attribute == 8 ? (void*)&d->bias
               : attribute == 11 ? (void*)&d->aux
               : attribute == 12 ? (void*)&d->aux_ld
               : attribute == 22 ? (void*)&d->aux_type
               : attribute == 26 ? (void*)&d->bias_type
                                : nullptr;
    bool wide = attribute == 8 || attribute == 11 || attribute == 12;
    if (!to || bytes != (wide ? 8u : 4u)) return INVALID_VALUE;
    memcpy(to, value, bytes);
    uint32_t e = d->epilogue;
    if (e != EPILOGUE_DEFAULT && e != EPILOGUE_BIAS && e != EPILOGUE_DGELU && !writes_aux(e)) return INVALID_VALUE;
    return SUCCESS;
}
EXPORT int cublasLtMatmulPreferenceCreate(Preference** preference) {
    *preference = new Preference;
    return SUCCESS;
}
EXPORT int cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return SUCCESS;
}
EXPORT int cublasLtMatmulPreferenceSetAttribute(Preference* p, uint32_t attribute, const void* value, size_t bytes) {
    if (attribute == 1 && bytes == 8) {
        memcpy(&p->workspace, value, 8);
    } else if (attribute >= 5 && attribute <= 8 && bytes == 4) {
        memcpy(&p->alignment[attribute - 5], value, 4);
    } else {
        return INVALID_VALUE;
    }
    return SUCCESS;
}

// Whether op(A) . op(B) has D's shape.
static bool fits(const Description* d, const Layout* a, const Layout* b, const Layout* c, const Layout* out) {
    uint64_t m = d->transposed_a ? a->columns : a->rows, k = d->transposed_a ? a->rows : a->columns;
    uint64_t k2 = d->transposed_b ? b->columns : b->rows, n = d->transposed_b ? b->rows : b->columns;
    // Narrow results are of narrow factors; a bias and what an epilogue keeps are of the result's type.
    if (out->type == R_16BF && a->type != R_16BF) return false;
    if (uses_bias(d->epilogue) && d->bias_type != -1 && d->bias_type != (int32_t)out->type) return false;
    if (writes_aux(d->epilogue) || d->epilogue == EPILOGUE_DGELU) {
        if (d->aux_ld < (int64_t)m || d->aux_ld % 8 || (d->aux_type != -1 && d->aux_type != (int32_t)out->type)) return false;
    }
    return k == k2 && a->type == b->type && out->type == c->type && m == out->rows &&
           n == out->columns && c->rows == m && c->columns == n && m > 0 && n > 0 && k > 0;
}
static float load(const void* from, uint64_t at, uint32_t type) {
    if (type == R_32F) return ((const float*)from)[at];
    uint32_t bits = (uint32_t)((const uint16_t*)from)[at] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static void store(void* to, uint64_t at, uint32_t type, float x) {
    if (type == R_32F) {
        ((float*)to)[at] = x;
        return;
    }
    uint32_t u;
    memcpy(&u, &x, 4);
    ((uint16_t*)to)[at] = x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
// The tanh form, which is the one that cuBLASLt has.
static float gelu(float x) {
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
static float gelu_slope(float x) {
    float t = tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x);
}
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, Description* d, Layout* a, Layout* b, Layout* c, Layout* out,
                                          Preference* p, int wanted, Heuristic* results, int* found) {
    *found = 0;
    if (!fits(d, a, b, c, out) || wanted < 1) return INVALID_VALUE;
    const char* fault = getenv("DRUMLINE_FAKE_CUDA");
    if (fault && strcmp(fault, "no-epilogues") == 0 && d->epilogue != EPILOGUE_DEFAULT && d->epilogue != EPILOGUE_BIAS)
        return NOT_SUPPORTED;
    memset(results, 0, sizeof *results);
    results->algorithm.data[0] = MARK;
    for (int i = 0; i < 4; i++) results->algorithm.data[1 + i] = p->alignment[i];
    results->workspace = p->workspace / 2;
    *found = 1;
    return SUCCESS;
}

static std::vector<float> widened(const void* from, const Layout* l, bool transposed) {
    // [inner, outer]: column-major without gaps, transposed where asked.
    std::vector<float> to(l->rows * l->columns);
    for (uint64_t j = 0; j < l->columns; j++)
        for (uint64_t i = 0; i < l->rows; i++) {
            uint64_t at = j * l->ld + i;
            float x = load(from, at, l->type);
            to[transposed ? i * l->columns + j : j * l->rows + i] = x;
        }
    return to;
}
static void multiply(const Description& d, float alpha, const void* a, const Layout& la, const void* b,
                     const Layout& lb, float beta, const void* c, const Layout& lc, void* out, const Layout& lo) {
    uint64_t m = lo.rows, n = lo.columns, k = d.transposed_a ? la.rows : la.columns;
    bool keeps = writes_aux(d.epilogue);
    // A as [k, m] by columns of m: neighbouring outputs are neighbours.
    std::vector<float> wa = widened(a, &la, d.transposed_a), wb = widened(b, &lb, d.transposed_b);
    std::vector<float> sums(m);
    for (uint64_t j = 0; j < n; j++) {
        for (auto& s : sums) s = 0;
        for (uint64_t x = 0; x < k; x++) {
            float factor = wb[j * k + x];
            const float* column = &wa[x * m];
            for (uint64_t i = 0; i < m; i++) sums[i] += factor * column[i];
        }
        for (uint64_t i = 0; i < m; i++) {
            float y = alpha * sums[i];
            if (beta != 0) y += beta * load(c, j * lc.ld + i, lc.type);
            if (uses_bias(d.epilogue)) y += load(d.bias, i, lo.type);
            if (keeps) {
                store(d.aux, j * d.aux_ld + i, lo.type, y);
                y = gelu(y);
            }
            if (d.epilogue == EPILOGUE_DGELU) y *= gelu_slope(load(d.aux, j * d.aux_ld + i, lo.type));
            store(out, j * lo.ld + i, lo.type, y);
        }
    }
}

// Whether the fake libcuda keeps `work` for a graph that the stream is captured for.
static bool captured(void* stream, const std::function<void()>& work) {
    static int (*keeps)(void*, const std::function<void()>*);
    if (!keeps) {
        void* cuda = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
        if (cuda) keeps = (int (*)(void*, const std::function<void()>*))dlsym(cuda, "fake_cuda_captures");
    }
    return keeps && keeps(stream, &work);
}

EXPORT int cublasLtMatmul(void*, Description* d, const float* alpha, const void* a, Layout* la, const void* b,
                          Layout* lb, const float* beta, const void* c, Layout* lc, void* out, Layout* lo,
                          const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
    if (!fits(d, la, lb, lc, lo) || !algorithm || algorithm->data[0] != MARK) return INVALID_VALUE;
    const void* pointers[4] = {a, b, c, out};
    for (int i = 0; i < 4; i++)
        if ((uintptr_t)pointers[i] % algorithm->data[1 + i]) return INVALID_VALUE;
    bool keeps = writes_aux(d->epilogue);
    if ((keeps || d->epilogue == EPILOGUE_DGELU) && (!d->aux || (uintptr_t)d->aux % 16)) return INVALID_VALUE;
    if (uses_bias(d->epilogue) && !d->bias) return INVALID_VALUE;
    if (workspace_bytes > 0 && (!workspace || (uintptr_t)workspace % 256)) return INVALID_VALUE;
    // Descriptions and layouts are read now, factors when it is their turn.
    auto work = [=, d = *d, la = *la, lb = *lb, lc = *lc, lo = *lo, alpha = *alpha, beta = *beta]() {
        multiply(d, alpha, a, la, b, lb, beta, c, lc, out, lo);
    };
    if (!captured(stream, work)) work();
    return SUCCESS;
}
