// A random element of each row: that at which the running sum of exp(x / temperature) passes a given share of the total. A row is
// read twice, the second time from its core's cache, and one block of it a third time.
#ifndef LANES

#include <vector>

#include "elements.h"

constexpr int64_t BLOCK = 256;             // elements whose weights are added up in float32; sums of blocks are in float64
constexpr int64_t MIN_PARALLEL = 1 << 13;  // elements; estimated, not measured: below, starting the threads costs more

#define SOURCE "draw_rows.cpp"
#include "each_level.h"

// x: rows of `size` elements, x_stride apart. Of row rows[i]: tokens[i], its logarithmic probability at temperature 1, which is
// not finite if the row has a NaN or infinity.
extern "C" void cf_draw_rows(
    const void* x, int64_t x_stride, const int64_t* rows, const float* temperatures, const double* numbers, int64_t* tokens,
    float* logprobs, int64_t count, int64_t size, int32_t dtype) {
    CALL_AT_LEVEL(draw_rows, dtype, x, x_stride, rows, temperatures, numbers, tokens, logprobs, count, size)
}

#else

INLINE Floats weight_of(Floats distance) { return distance >= -87.0f ? exponential(distance) : Floats{}; }

template <class T>
static void draw_rows(
    const void* x, int64_t x_stride, const int64_t* rows, const float* temperatures, const double* numbers, int64_t* tokens,
    float* logprobs, int64_t count, int64_t size) {
#pragma omp parallel for schedule(static) if (count * size >= MIN_PARALLEL)
    for (int64_t i = 0; i < count; i++) {
        const T* from = static_cast<const T*>(x) + rows[i] * x_stride;
        Ints lane;
        for (int l = 0; l < LANES; l++) lane[l] = l;
        // Lanes behind the row's end weigh nothing.
        const auto part = [&](int64_t k) __attribute__((always_inline)) {
            const Floats found = load(from + k, size - k);
            return size - k >= LANES ? found : lane < (int32_t)(size - k) ? found : splat(-INFINITY);
        };
        Floats greatest = splat(-INFINITY), undefined{};
        for (int64_t k = 0; k < size; k += LANES) {
            const Floats found = part(k);
            greatest = larger(found, greatest);
            undefined = found == found ? undefined : found;
        }
        const float most = maximum(greatest), temperature = temperatures[i];
        const int64_t num_blocks = (size + BLOCK - 1) / BLOCK;
        std::vector<double> ends(num_blocks);
        double total = 0;
        Floats normaliser{};
        for (int64_t block = 0; block < num_blocks; block++) {
            Floats weights{};
            for (int64_t k = block * BLOCK; k < size && k < (block + 1) * BLOCK; k += LANES) {
                const Floats distance = part(k) - most;
                normaliser += weight_of(distance);
                weights += weight_of(distance / temperature);
            }
            ends[block] = total += sum(weights);
        }
        const double target = numbers[i] * total;
        // Rounding must not lead past the last element of any weight.
        int64_t block = 0, last = 0, token = 0;
        for (int64_t other = 1; other < num_blocks; other++)
            if (ends[other] > ends[other - 1]) last = other;
        while (block < last && ends[block] <= target) block++;
        double end = block ? ends[block - 1] : 0;
        bool is_found = false;
        for (int64_t k = block * BLOCK; k < size && k < (block + 1) * BLOCK && !is_found; k += LANES) {
            const Floats weights = weight_of((part(k) - most) / temperature);
            for (int l = 0; l < LANES && !is_found; l++)
                if (weights[l] > 0) {
                    token = k + l;
                    end += weights[l];
                    is_found = end > target;
                }
        }
        tokens[i] = token;
        logprobs[i] = load(from + token, 1)[0] - most - logf(sum(normaliser));
        if (sum(undefined) != 0.0f || !(most < INFINITY) || most == -INFINITY) logprobs[i] = NAN;
    }
}

#endif
