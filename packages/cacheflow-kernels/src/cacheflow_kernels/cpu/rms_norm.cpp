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

// Sums that are added up at the same time, as each addition waits for the one before it. They are part of the result's bits.
constexpr int NUM_SUMS = 4;

// The sum of squares of value(i, count), which has `count` elements, for each vector of a row.
template <class Value>
INLINE float sum_of_squares(int64_t size, const Value& value) {
    Floats sums[NUM_SUMS] = {};
    int64_t i = 0;
    for (; i + NUM_SUMS * LANES <= size; i += NUM_SUMS * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < NUM_SUMS; j++) {
            const Floats values = value(i + j * LANES, LANES);
            sums[j] += values * values;
        }
    for (; i < size; i += LANES) {
        const Floats values = value(i, size - i);
        sums[0] += values * values;
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
INLINE void scale_row(const T* x, const T* weight, T* out, int64_t size, float squares, float eps) {
    const float factor = 1.0f / sqrtf(squares / size + eps);
    const auto scale = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        store(out + i, rounded_to<T>(load(x + i, count) * factor) * load(weight + i, count), count);
    };
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) scale(i, LANES);
    if (i < size) scale(i, size - i);
}

template <class T>
INLINE void rms_norm_row(const T* x, const T* weight, T* out, int64_t size, float eps) {
    const float squares = sum_of_squares(
        size, [&](int64_t i, int64_t count) __attribute__((always_inline)) { return load(x + i, count); });
    scale_row(x, weight, out, size, squares, eps);
}

template <class T>
static void rms_norm(
    const void* x, int64_t x_stride, const void* weight, void* out, int64_t num_rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (num_rows * size >= MIN_PARALLEL)
    for (int64_t row = 0; row < num_rows; row++)
        rms_norm_row(
            static_cast<const T*>(x) + row * x_stride, static_cast<const T*>(weight), static_cast<T*>(out) + row * size, size,
            eps);
}

template <class T>
static void add_rms_norm_row(const void* x, void* residual, const void* weight, void* out, int64_t size, float eps) {
    const T *added = static_cast<const T*>(x), *scales = static_cast<const T*>(weight);
    T *total = static_cast<T*>(residual), *to = static_cast<T*>(out);
    if (!added) return rms_norm_row(total, scales, to, size, eps);
    const float squares = sum_of_squares(size, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        const Floats values = rounded_to<T>(load(added + i, count) + load(total + i, count));
        store(total + i, values, count);
        return values;
    });
    scale_row(total, scales, to, size, squares, eps);
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
