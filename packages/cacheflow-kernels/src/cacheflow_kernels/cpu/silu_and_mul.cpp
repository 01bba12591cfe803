// Gated activations (arXiv:2002.05202): an activation of a row's first half times its second half. The activation is rounded to
// the element type before the product, as in models that compute the two one after the other.
#ifndef LANES

#include "elements.h"

constexpr int64_t MIN_PARALLEL = 1 << 15;  // elements; estimated, not measured: below, starting the threads costs more

enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2 };

#define SOURCE "silu_and_mul.cpp"
#include "each_level.h"

// x: num_rows rows of 2 * size elements, x_stride apart; out is contiguous.
extern "C" void cf_activate_and_mul(
    const void* x, int64_t x_stride, void* out, int64_t num_rows, int64_t size, int32_t activation, int32_t dtype) {
    switch (activation) {
        case SILU: CALL_AT_LEVEL(silu_and_mul, dtype, x, x_stride, out, num_rows, size) break;
        case GELU: CALL_AT_LEVEL(gelu_and_mul, dtype, x, x_stride, out, num_rows, size) break;
        default: CALL_AT_LEVEL(gelu_tanh_and_mul, dtype, x, x_stride, out, num_rows, size)
    }
}

#else

INLINE Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

// x/2 * (1 + tanh u) is x / (1 + e^-2u).
INLINE Floats gelu_tanh(Floats x) {
    const float twice_root = 1.5957691216057308f;  // 2 * sqrt(2 / pi)
    return x / (1.0f + exponential(-twice_root * (x + 0.044715f * x * x * x)));
}

// x/2 * erfc(-x / sqrt(2)). erfc(z) = e^(-z^2) P(1 / (1 + 0.4 z)) for z >= 0, P being the polynomial of degree 8 with the least
// relative error up to z = 6.
INLINE Floats gelu(Floats x) {
    const Floats z = magnitude(x) * 0.70710678118654752f;
    const Floats t = 1.0f / (1.0f + 0.4f * z);
    Floats p = splat(8.455007156e-02f);
    p = p * t - 4.484377469e-01f;
    p = p * t + 8.058867377e-01f;
    p = p * t - 5.272550940e-01f;
    p = p * t + 5.269225464e-01f;
    p = p * t + 8.282932681e-02f;
    p = p * t + 2.530705002e-01f;
    p = p * t + 2.222466842e-01f;
    p = p * t + 1.869619152e-04f;
    const Floats complement = p * exponential(-z * z);
    return 0.5f * x * (x < 0.0f ? complement : 2.0f - complement);
}

template <class T, Floats (*ACTIVATION)(Floats)>
static void activate_and_mul(const void* x, int64_t x_stride, void* out, int64_t num_rows, int64_t size) {
#pragma omp parallel for schedule(static) if (num_rows * size >= MIN_PARALLEL)
    for (int64_t row = 0; row < num_rows; row++) {
        const T* gate = static_cast<const T*>(x) + row * x_stride;
        T* to = static_cast<T*>(out) + row * size;
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats activated = rounded_to<T>(ACTIVATION(load(gate + i, size - i)));
            store(to + i, activated * load(gate + size + i, size - i), size - i);
        }
    }
}

template <class T>
static void silu_and_mul(const void* x, int64_t x_stride, void* out, int64_t num_rows, int64_t size) {
    activate_and_mul<T, silu>(x, x_stride, out, num_rows, size);
}

template <class T>
static void gelu_and_mul(const void* x, int64_t x_stride, void* out, int64_t num_rows, int64_t size) {
    activate_and_mul<T, gelu>(x, x_stride, out, num_rows, size);
}

template <class T>
static void gelu_tanh_and_mul(const void* x, int64_t x_stride, void* out, int64_t num_rows, int64_t size) {
    activate_and_mul<T, gelu_tanh>(x, x_stride, out, num_rows, size);
}

#endif
