// Of each row its largest number, where that is first, and the logarithm of the sum of all exponentials: what greedy decoding
// wants of logits. A row is cut into blocks, which threads share out, and whose sums are added in order: a row's result depends
// on no other row, and on no number of threads.
#ifndef LANES

#include <vector>

#include "elements.h"

constexpr int64_t MIN_PARALLEL = 1 << 15;  // elements; estimated, not measured: below, starting the threads costs more
constexpr int64_t BLOCK = 4096;            // elements of a block, which is read a second time from the nearest cache
constexpr int UNROLLED = 4;                // vectors that are worked on at once, as each step waits for the one before

// A block's largest number, and the sum of the exponentials of what its numbers are short of that.
struct Share {
    float most, total;
};

#define SOURCE "row_maxima.cpp"
#include "each_level.h"

// x: num_rows rows of `size` elements, x_stride apart. The normaliser of a row with a NaN, or with infinity, is not finite.
extern "C" void cf_row_maxima(
    const void* x, int64_t x_stride, float* values, int64_t* indices, float* normalisers, int64_t num_rows, int64_t size,
    int32_t dtype) {
    CALL_AT_LEVEL(row_maxima, dtype, x, x_stride, values, indices, normalisers, num_rows, size)
}

#else

// Calls `use(vector, place among UNROLLED)` for all of a block. Lanes behind its end hold -inf, which can't win and adds
// nothing.
template <class T, class Use>
INLINE void each_vector(const T* from, int64_t size, const Use& use) {
    int64_t i = 0;
    for (; i + UNROLLED * LANES <= size; i += UNROLLED * LANES)
        for (int u = 0; u < UNROLLED; u++) use(load(from + i + u * LANES), u);
    for (; i < size; i += LANES) {
        Ints lane;
        for (int l = 0; l < LANES; l++) lane[l] = l;
        const Floats found = load(from + i, size - i);
        use(size - i >= LANES ? found : lane < (int32_t)(size - i) ? found : splat(-INFINITY), 0);
    }
}

template <class T>
static Share share_of(const T* from, int64_t size) {
    Floats greatest[UNROLLED], totals[UNROLLED], distances[UNROLLED];
    for (int u = 0; u < UNROLLED; u++) greatest[u] = splat(-INFINITY), totals[u] = distances[u] = Floats{};
    each_vector(from, size, [&](Floats found, int u) __attribute__((always_inline)) { greatest[u] = larger(found, greatest[u]); });
    for (int u = 1; u < UNROLLED; u++) greatest[0] = larger(greatest[u], greatest[0]);
    const float most = maximum(greatest[0]), top = most == -INFINITY ? 0.0f : most;
    each_vector(from, size, [&](Floats found, int u) __attribute__((always_inline)) {
        const Floats distance = larger(splat(-87.0f), found - top);  // In this order what is no number stays.
        distances[u] += distance;
        totals[u] += exponential_within(distance);
    });
    for (int u = 1; u < UNROLLED; u++) totals[0] += totals[u], distances[0] += distances[u];
    const float distance = sum(distances[0]);
    return {most, distance == distance ? sum(totals[0]) : NAN};
}

// Where a block has a number first that it has.
template <class T>
static int64_t place_of(const T* from, int64_t size, float value) {
    for (int64_t i = 0;; i += LANES) {
        const uint32_t bits = bits_of(load(from + i, size - i) == value);
        if (bits) return i + __builtin_ctz(bits);
    }
}

template <class T>
static void row_maxima(
    const void* x, int64_t x_stride, float* values, int64_t* indices, float* normalisers, int64_t num_rows, int64_t size) {
    const int64_t num_blocks = (size + BLOCK - 1) / BLOCK;
    const auto row_of = [&](int64_t row) { return static_cast<const T*>(x) + row * x_stride; };
    std::vector<Share> shares(num_rows * num_blocks);
#pragma omp parallel if (num_rows * size >= MIN_PARALLEL)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_rows * num_blocks; i++) {
            const int64_t first = i % num_blocks * BLOCK;
            shares[i] = share_of(row_of(i / num_blocks) + first, size - first < BLOCK ? size - first : BLOCK);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < num_rows; row++) {
            const Share* own = shares.data() + row * num_blocks;
            int64_t best = 0;
            for (int64_t block = 1; block < num_blocks; block++)
                if (own[block].most > own[best].most) best = block;
            const float most = own[best].most;
            // A row of -inf alone has its first element, like a row of equals, and nothing to add up: -inf + log 0 is -inf.
            const bool is_empty = most == -INFINITY;
            float total = 0;
            for (int64_t block = 0; block < num_blocks; block++)
                total += own[block].total * expf(own[block].most - (is_empty ? 0.0f : most));
            values[row] = most;
            indices[row] = is_empty ? 0 : best * BLOCK + place_of(row_of(row) + best * BLOCK, size - best * BLOCK, most);
            normalisers[row] = most + logf(total);
        }
    }
}

#endif
