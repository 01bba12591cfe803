// A random element of each row: that at which the running sum of exp(x / temperature) passes a given share of the total, among
// the elements that min_p, top_k and top_p leave. A row's weights are kept in its core's cache; which of them count is found by
// halving the range of values until few are left to sort, so that nothing but those is ever put in order.
#ifndef LANES

#include <algorithm>
#include <cfloat>
#include <memory>
#include <vector>

#include "elements.h"

constexpr int64_t BLOCK = 256;             // elements whose weights are added up in float32; sums of blocks are in float64
constexpr int64_t MIN_PARALLEL = 1 << 13;  // elements; estimated, not measured: below, starting the threads costs more
constexpr int64_t FEW = 128;               // elements that are sorted; a guess: sorting them is to take as long as one more halving
constexpr float FARTHEST = -87.0f;         // what is farther below the largest, in units of the temperature, weighs nothing

struct Element {
    float value, weight;
};

// The last element that counts, in the order (larger first, of equals the lowest place first).
struct Border {
    float value;
    int64_t place;
};

constexpr Border NO_BORDER{-INFINITY, INT64_MAX};

// Low bits of a float32 that are zero in every normal number of the type.
constexpr int num_unused_bits(float) { return 0; }
constexpr int num_unused_bits(BFloat16) { return 16; }
constexpr int num_unused_bits(Float16) { return 13; }

// The number with that many unused bits that is nearest to the middle. If there is one between the two, it is between them too.
static float middle_of(float low, float high, int num_unused) {
    const float middle = (float)(((double)low + (double)high) / 2);
    uint32_t bits;
    memcpy(&bits, &middle, sizeof bits);
    const uint32_t step = 1u << num_unused;
    bits = (bits + step / 2) & ~(step - 1);
    float rounded;
    memcpy(&rounded, &bits, sizeof rounded);
    return rounded;
}

// Elements that are not greater are farther below the largest than `distance` temperatures, whatever is rounded.
static float floor_of(float most, float temperature, float distance) {
    return std::max(-FLT_MAX, nextafterf(most + temperature * distance, -INFINITY));
}

#define SOURCE "draw_rows.cpp"
#include "each_level.h"

// x: rows of `size` elements, x_stride apart. Of row rows[i]: tokens[i], its logarithmic probability at temperature 1, which is
// not finite if the row has a NaN or infinity. top_ks, top_ps and min_ps may be null; 0, 1 and 0 leave everything in.
extern "C" void cf_draw_rows(
    const void* x, int64_t x_stride, const int64_t* rows, const float* temperatures, const double* numbers, const int64_t* top_ks,
    const double* top_ps, const float* min_ps, int64_t* tokens, float* logprobs, int64_t count, int64_t size, int32_t dtype) {
    CALL_AT_LEVEL(
        draw_rows, dtype, x, x_stride, rows, temperatures, numbers, top_ks, top_ps, min_ps, tokens, logprobs, count, size)
}

#else

INLINE Floats weight_of(Floats distance) { return distance >= FARTHEST ? exponential(distance) : Floats{}; }

INLINE Ints lanes_from(int64_t first) {
    Ints lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    return lane + (int32_t)first;
}

INLINE Floats only(Ints mask, Floats vector) { return (Floats)(mask & (Ints)vector); }

// The elements from place k on; lanes behind the row's end hold -inf, which weighs nothing.
template <class T>
INLINE Floats part(const T* from, int64_t k, int64_t size) {
    const Floats found = load(from + k, size - k);
    return size - k >= LANES ? found : lanes_from(0) < (int32_t)(size - k) ? found : splat(-INFINITY);
}

// A row's elements, widened, and what each weighs; blocks are whole, and what fills the last one is -inf and weighs nothing.
struct Row {
    const float* values;
    float* weights;
    int64_t num_blocks;
};

// How a row is weighed: what is less likely than min_p of the most likely weighs nothing.
struct Scale {
    float most, temperature, min_p;
};

INLINE Floats weight_at(Floats found, Scale scale) {
    const Floats weight = weight_of((found - scale.most) / scale.temperature);
    return only(weight >= scale.min_p, weight);
}

// Writes the running sum of blocks' weights, and for a row that is to be cut its elements and their weights; returns the sum of
// exponentials at temperature 1.
template <bool IS_CUT, class T>
static float weigh(
    const T* from, int64_t size, Scale scale, float* __restrict values, float* __restrict weights, double* __restrict ends) {
    Floats normaliser{};
    double total = 0;
    for (int64_t block = 0; block * BLOCK < size; block++) {
        Floats sums{};
        const int64_t end = std::min(size, (block + 1) * BLOCK);
        for (int64_t k = block * BLOCK; k < end; k += LANES) {
            const Floats found = part(from, k, size), weight = weight_at(found, scale);
            normaliser += weight_of(found - scale.most);
            sums += weight;
            if constexpr (IS_CUT) {
                store_raw(values + k, found);
                store_raw(weights + k, weight);
            }
        }
        ends[block] = total += sum(sums);
    }
    return sum(normaliser);
}

// How many elements are greater than a value, and what they amount to: their number again, or their weights.
template <bool IS_COUNT>
static double amount_above(const Row& row, float value, int64_t& count) {
    double amount = 0;
    Ints counts{};
    for (int64_t block = 0; block < row.num_blocks; block++) {
        Floats sums{};
        for (int64_t k = block * BLOCK; k < (block + 1) * BLOCK; k += LANES) {
            const Ints is_above = load_raw<Floats>(row.values + k) > value;
            counts -= is_above;
            if constexpr (!IS_COUNT) sums += only(is_above, load_raw<Floats>(row.weights + k));
        }
        if constexpr (!IS_COUNT) amount += sum(sums);
    }
    count = 0;
    for (int l = 0; l < LANES; l++) count += counts[l];
    return IS_COUNT ? count : amount;
}

// Draws the range (low, high] as near to the elements in it as it can be; there are some.
static void tighten(const Row& row, float& low, float& high) {
    Floats least = splat(INFINITY), greatest = splat(-INFINITY);
    for (int64_t k = 0; k < row.num_blocks * BLOCK; k += LANES) {
        const Floats found = load_raw<Floats>(row.values + k);
        const Ints is_inside = (found > low) & (found <= high);
        least = is_inside & (found < least) ? found : least;
        greatest = is_inside & (found > greatest) ? found : greatest;
    }
    low = nextafterf(-maximum(-least), -INFINITY);
    high = maximum(greatest);
}

// The place of the nth element that equals a value and weighs something, from 1; behind the row if there are fewer.
static int64_t place_of(const Row& row, float value, int64_t nth) {
    const int64_t end = row.num_blocks * BLOCK;
    for (int64_t k = 0; k < end; k += LANES) {
        const Ints is_one = (load_raw<Floats>(row.values + k) == value) & (load_raw<Floats>(row.weights + k) > 0.0f);
        uint32_t bits = bits_of(is_one);
        const int count = __builtin_popcount(bits);
        if (nth > count) {
            nth -= count;
            continue;
        }
        for (; nth > 1; nth--) bits &= bits - 1;
        return k + __builtin_ctz(bits);
    }
    return end;
}

// How many elements of one weight it takes to get from `above` to the goal, at least 1 and at most `limit`.
static int64_t number_of(double above, double weight, double goal, int64_t limit) {
    int64_t number = std::max((int64_t)1, (int64_t)std::min((goal - above) / weight, (double)limit));
    while (number > 1 && above + (double)(number - 1) * weight >= goal) number--;
    while (number < limit && above + (double)number * weight < goal) number++;
    return number;
}

// The border behind which elements are left out when as few as possible amount to `goal`: to so many, or to such a weight. What
// is not greater than `low` weighs nothing or is known not to be needed; `most` is the row's largest element.
template <bool IS_COUNT>
static Border border_of(const Row& row, float low, float most, double goal, int num_unused) {
    float high = most;
    int64_t num_above_low, num_above_high = 0;
    double above = 0;  // what the elements greater than `high` amount to: not enough, while those greater than `low` are
    if (amount_above<IS_COUNT>(row, low, num_above_low) < goal) return NO_BORDER;
    while (num_above_low - num_above_high > FEW) {
        const float middle = middle_of(low, high, num_unused);
        if (!(low < middle && middle < high)) {
            // All that are left are equal.
            const int64_t limit = num_above_low - num_above_high, first = place_of(row, high, 1);
            if (first == row.num_blocks * BLOCK) return {high, first};
            const double weight = IS_COUNT ? 1.0 : row.weights[first];
            return {high, place_of(row, high, number_of(above, weight, goal, limit))};
        }
        int64_t count;
        const double amount = amount_above<IS_COUNT>(row, middle, count);
        const bool is_idle = count == (amount >= goal ? num_above_low : num_above_high);
        if (amount >= goal) {
            low = middle;
            num_above_low = count;
        } else {
            high = middle;
            num_above_high = count;
            above = amount;
        }
        // Halving would take long to come near to equals, above all near to zero, where numbers are dense.
        if (is_idle) tighten(row, low, high);
    }
    Element few[FEW];
    int64_t num_few = 0;
    for (int64_t k = 0; k < row.num_blocks * BLOCK; k += LANES) {
        const Floats found = load_raw<Floats>(row.values + k);
        Ints is_inside = (found > low) & (found <= high);
        if constexpr (!IS_COUNT) is_inside &= load_raw<Floats>(row.weights + k) > 0.0f;
        for (uint32_t bits = bits_of(is_inside); bits; bits &= bits - 1) {
            const int64_t place = k + __builtin_ctz(bits);
            few[num_few++] = {row.values[place], row.weights[place]};
        }
    }
    std::sort(few, few + num_few, [](const Element& a, const Element& b) { return a.value > b.value; });
    int64_t nth = 0;
    for (int64_t i = 0; i < num_few; i++) {
        nth = i && few[i].value == few[i - 1].value ? nth + 1 : 1;
        above += IS_COUNT ? 1.0 : few[i].weight;
        if (above >= goal) return {few[i].value, place_of(row, few[i].value, nth)};
    }
    // Only rounding leads here: in another order the same weights reached the goal.
    return {low, -1};
}

// Takes the weight from all behind the border; writes the running sum of blocks, and returns the total.
static double cut_behind(const Row& row, Border border, double* ends) {
    double total = 0;
    const int32_t last = (int32_t)std::min(border.place, row.num_blocks * BLOCK);
    for (int64_t block = 0; block < row.num_blocks; block++) {
        Floats sums{};
        for (int64_t k = block * BLOCK; k < (block + 1) * BLOCK; k += LANES) {
            const Floats found = load_raw<Floats>(row.values + k);
            const Ints is_kept = (found > border.value) | ((found == border.value) & (lanes_from(k) <= last));
            const Floats weight = only(is_kept, load_raw<Floats>(row.weights + k));
            store_raw(row.weights + k, weight);
            sums += weight;
        }
        ends[block] = total += sum(sums);
    }
    return total;
}

template <class T>
static void draw_rows(
    const void* x, int64_t x_stride, const int64_t* rows, const float* temperatures, const double* numbers, const int64_t* top_ks,
    const double* top_ps, const float* min_ps, int64_t* tokens, float* logprobs, int64_t count, int64_t size) {
    const int64_t num_blocks = (size + BLOCK - 1) / BLOCK;
    const bool has_filters = top_ks || top_ps;
#pragma omp parallel if (count * size >= MIN_PARALLEL)
    {
        // What nothing is cut from is weighed again where it is needed.
        const std::unique_ptr<float[]> memory(new float[has_filters ? 2 * num_blocks * BLOCK : 0]);
        float* const weights = memory.get();
        float* const values = weights + num_blocks * BLOCK;
        std::vector<double> ends(num_blocks);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            const T* from = static_cast<const T*>(x) + rows[i] * x_stride;
            Floats greatest = splat(-INFINITY), undefined{};
            for (int64_t k = 0; k < size; k += LANES) {
                const Floats found = part(from, k, size);
                greatest = larger(found, greatest);
                undefined = found == found ? undefined : found;
            }
            const float most = maximum(greatest), temperature = temperatures[i];
            const int64_t top_k = top_ks && 0 < top_ks[i] && top_ks[i] < size ? top_ks[i] : 0;
            const double top_p = top_ps ? top_ps[i] : 1.0;
            const bool is_cut = top_k || top_p < 1;
            tokens[i] = 0;
            logprobs[i] = NAN;
            if (sum(undefined) != 0.0f || !(most < INFINITY) || most == -INFINITY) continue;
            const Scale scale{most, temperature, min_ps ? min_ps[i] : 0.0f};
            const float normaliser = is_cut ? weigh<true>(from, size, scale, values, weights, ends.data())
                                            : weigh<false>(from, size, scale, values, weights, ends.data());
            double total = ends[num_blocks - 1];
            if (is_cut) {
                const int64_t end = (size + LANES - 1) / LANES * LANES;
                std::fill(values + end, values + num_blocks * BLOCK, -INFINITY);
                std::fill(weights + end, weights + num_blocks * BLOCK, 0.0f);
                const Row row{values, weights, num_blocks};
                const int num_unused = num_unused_bits(T{});
                float least = floor_of(most, temperature, FARTHEST - 1);
                if (top_k) {
                    const Border border = border_of<true>(row, least, most, (double)top_k, num_unused);
                    total = cut_behind(row, border, ends.data());
                    least = std::max(least, nextafterf(border.value, -INFINITY));
                }
                if (top_p < 1) {
                    const double goal = top_p * total;
                    // All elements together that weigh half of this are less than what may be left out.
                    const float distance = logf((float)((total - goal) / (double)size) / 2);
                    const float low = std::max(least, floor_of(most, temperature, std::max(distance, FARTHEST - 1)));
                    total = cut_behind(row, border_of<false>(row, low, most, goal, num_unused), ends.data());
                }
            }
            const double target = numbers[i] * total;
            // Rounding must not lead past the last element of any weight.
            int64_t block = 0, last = 0, token = 0;
            for (int64_t other = 1; other < num_blocks; other++)
                if (ends[other] > ends[other - 1]) last = other;
            while (block < last && ends[block] <= target) block++;
            double end = block ? ends[block - 1] : 0;
            bool is_found = false;
            for (int64_t k = block * BLOCK; k < std::min(size, (block + 1) * BLOCK) && !is_found; k += LANES) {
                const Floats found = is_cut ? load_raw<Floats>(weights + k) : weight_at(part(from, k, size), scale);
                for (int l = 0; l < LANES && !is_found; l++)
                    if (found[l] > 0) {
                        token = k + l;
                        end += found[l];
                        is_found = end > target;
                    }
            }
            tokens[i] = token;
            logprobs[i] = load(from + token, 1)[0] - most - logf(normaliser);
        }
    }
}

#endif
