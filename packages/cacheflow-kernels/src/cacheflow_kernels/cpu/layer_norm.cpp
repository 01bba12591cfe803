// LayerNorm (arXiv:1607.06450): computed in float32 and rounded once.
#ifndef LANES

#include "elements.h"

constexpr int64_t MIN_PARALLEL = 1 << 15;  // elements; estimated, not measured: below, starting the threads costs more

#define SOURCE "layer_norm.cpp"
#include "each_level.h"

// x: num_rows rows of `size` elements, x_stride apart; bias may be null; out is contiguous.
extern "C" void cf_layer_norm(
    const void* x, int64_t x_stride, const void* weight, const void* bias, void* out, int64_t num_rows, int64_t size, float eps,
    int32_t dtype) {
    CALL_AT_LEVEL(layer_norm, dtype, x, x_stride, weight, bias, out, num_rows, size, eps)
}

#else

template <class T>
static void layer_norm(
    const void* x, int64_t x_stride, const void* weight, const void* bias, void* out, int64_t num_rows, int64_t size,
    float eps) {
#pragma omp parallel for schedule(static) if (num_rows * size >= MIN_PARALLEL)
    for (int64_t row = 0; row < num_rows; row++) {
        const T *from = static_cast<const T*>(x) + row * x_stride, *scale = static_cast<const T*>(weight);
        T* to = static_cast<T*>(out) + row * size;
        Floats total{}, squares{};
        for (int64_t i = 0; i < size; i += LANES) total += load(from + i, size - i);
        const float mean = sum(total) / size;
        const int64_t whole = size / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES) {
            const Floats centred = load(from + i) - mean;
            squares += centred * centred;
        }
        float variance = sum(squares);
        float rest[LANES];
        store_raw(rest, load(from + whole, size - whole) - mean);
        for (int64_t i = 0; i < size - whole; i++) variance += rest[i] * rest[i];
        const float factor = 1.0f / sqrtf(variance / size + eps);
        for (int64_t i = 0; i < size; i += LANES) {
            Floats result = (load(from + i, size - i) - mean) * factor * load(scale + i, size - i);
            if (bias) result += load(static_cast<const T*>(bias) + i, size - i);
            store(to + i, result, size - i);
        }
    }
}

#endif
