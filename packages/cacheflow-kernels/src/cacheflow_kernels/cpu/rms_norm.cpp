// RMSNorm (arXiv:1910.07467), alone and after the addition of a residual. Computed in float32, rounded to the element type,
// then scaled by the weight: the roundings that models are trained with.
#ifndef LANES

#include "elements.h"

constexpr int64_t MIN_PARALLEL = 1 << 15;  // elements; estimated, not measured: below, starting the threads costs more

#define SOURCE "rms_norm.cpp"
#include "each_level.h"

// x: num_rows rows of `size` elements, x_stride apart; out is contiguous.
extern "C" void cf_rms_norm(
    const void* x, int64_t x_stride, const void* weight, void* out, int64_t num_rows, int64_t size, float eps, int32_t dtype) {
    CALL_AT_LEVEL(rms_norm, dtype, x, x_stride, weight, out, num_rows, size, eps)
}

// residual becomes x + residual, and x its norm.
extern "C" void cf_fused_add_rms_norm(
    void* x, int64_t x_stride, void* residual, int64_t residual_stride, const void* weight, int64_t num_rows, int64_t size,
    float eps, int32_t dtype) {
    CALL_AT_LEVEL(fused_add_rms_norm, dtype, x, x_stride, residual, residual_stride, weight, num_rows, size, eps)
}

// Of one row, by the calling thread: residual becomes x + residual, unless x is null, and out its norm.
extern "C" void cf_add_rms_norm_row(
    const void* x, void* residual, const void* weight, void* out, int64_t size, float eps, int32_t dtype) {
    CALL_AT_LEVEL(add_rms_norm_row, dtype, x, residual, weight, out, size, eps)
}

#else

template <class T>
INLINE void scale_row(const T* x, const T* weight, T* out, int64_t size, Floats squares, float eps) {
    const float factor = 1.0f / sqrtf(sum(squares) / size + eps);
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats normed = rounded_to<T>(load(x + i, size - i) * factor);
        store(out + i, normed * load(weight + i, size - i), size - i);
    }
}

template <class T>
static void rms_norm(
    const void* x, int64_t x_stride, const void* weight, void* out, int64_t num_rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (num_rows * size >= MIN_PARALLEL)
    for (int64_t row = 0; row < num_rows; row++) {
        const T* from = static_cast<const T*>(x) + row * x_stride;
        Floats squares{};
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats values = load(from + i, size - i);
            squares += values * values;
        }
        scale_row(from, static_cast<const T*>(weight), static_cast<T*>(out) + row * size, size, squares, eps);
    }
}

template <class T>
static void add_rms_norm_row(const void* x, void* residual, const void* weight, void* out, int64_t size, float eps) {
    const T* added = static_cast<const T*>(x);
    T* total = static_cast<T*>(residual);
    Floats squares{};
    for (int64_t i = 0; i < size; i += LANES) {
        Floats values = load(total + i, size - i);
        if (added) {
            values = rounded_to<T>(load(added + i, size - i) + values);
            store(total + i, values, size - i);
        }
        squares += values * values;
    }
    scale_row(total, static_cast<const T*>(weight), static_cast<T*>(out), size, squares, eps);
}

template <class T>
static void fused_add_rms_norm(
    void* x, int64_t x_stride, void* residual, int64_t residual_stride, const void* weight, int64_t num_rows, int64_t size,
    float eps) {
#pragma omp parallel for schedule(static) if (num_rows * size >= MIN_PARALLEL)
    for (int64_t row = 0; row < num_rows; row++) {
        T* normed = static_cast<T*>(x) + row * x_stride;
        add_rms_norm_row<T>(normed, static_cast<T*>(residual) + row * residual_stride, weight, normed, size, eps);
    }
}

#endif
