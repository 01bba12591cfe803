// Of each row its largest number, where that is first, and the logarithm of the sum of all exponentials: what greedy decoding
// wants of logits. A row is read twice, the second time from its core's cache.
#ifndef LANES

#include "elements.h"

constexpr int64_t MIN_PARALLEL = 1 << 15;  // elements; estimated, not measured: below, starting the threads costs more

#define SOURCE "row_maxima.cpp"
#include "each_level.h"

// x: num_rows rows of `size` elements, x_stride apart. The normaliser of a row with a NaN, or with infinity, is not finite.
extern "C" void cf_row_maxima(
    const void* x, int64_t x_stride, float* values, int64_t* indices, float* normalisers, int64_t num_rows, int64_t size,
    int32_t dtype) {
    CALL_AT_LEVEL(row_maxima, dtype, x, x_stride, values, indices, normalisers, num_rows, size)
}

#else

template <class T>
static void row_maxima(
    const void* x, int64_t x_stride, float* values, int64_t* indices, float* normalisers, int64_t num_rows, int64_t size) {
#pragma omp parallel for schedule(static) if (num_rows * size >= MIN_PARALLEL)
    for (int64_t row = 0; row < num_rows; row++) {
        const T* from = static_cast<const T*>(x) + row * x_stride;
        Ints lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
        // Lanes behind the row's end can't win, and add nothing.
        const auto part = [&](int64_t i) __attribute__((always_inline)) {
            const Floats found = load(from + i, size - i);
            return size - i >= LANES ? found : lane < (int32_t)(size - i) ? found : splat(-INFINITY);
        };
        Floats greatest = splat(-INFINITY), undefined{};
        Ints first{};
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats found = part(i);
            const Ints is_greater = found > greatest;
            greatest = is_greater ? found : greatest;
            first = is_greater ? lane + (int32_t)i : first;
            undefined = found == found ? undefined : found;
        }
        const float most = maximum(greatest);
        int64_t index = size;
        for (int i = 0; i < LANES; i++)
            if (greatest[i] == most && first[i] < index) index = first[i];
        Floats total{};
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats distance = part(i) - most;
            total += distance >= -87.0f ? exponential(distance) : Floats{};
        }
        values[row] = most;
        // A row of -inf alone has its first element, like a row of equals; -inf + log 0 is -inf.
        indices[row] = most == -INFINITY ? 0 : index;
        normalisers[row] = most == -INFINITY ? most : most + logf(sum(total));
        if (sum(undefined) != 0.0f) normalisers[row] = NAN;
    }
}

#endif
