// Rotary position embedding (RoFormer, arXiv:2104.09864) of queries and keys, in place. Cosines and sines are rounded to the
// element type, as are both products and their sum: the roundings that models are trained with.
#ifndef LANES

#include "elements.h"

constexpr int64_t MIN_PARALLEL = 1 << 15;  // elements; estimated, not measured: below, starting the threads costs more
constexpr int64_t MAX_ROTARY_SIZE = 1024;

#define SOURCE "rotary.cpp"
#include "each_level.h"

// q and k: num_tokens rows of {q,k}_heads heads, {q,k}_stride elements apart. cos_sin: [positions, rotary_size].
extern "C" void cf_rotary(
    void* q, int64_t q_stride, int64_t q_heads, void* k, int64_t k_stride, int64_t k_heads, const int64_t* positions,
    const float* cos_sin, int64_t num_tokens, int64_t head_size, int64_t rotary_size, int32_t is_neox, int32_t dtype) {
    CALL_AT_LEVEL(
        rotary, dtype, q, q_stride, q_heads, k, k_stride, k_heads, positions, cos_sin, num_tokens, head_size, rotary_size,
        is_neox)
}

#else

// Pairs (i, i + half).
template <class T>
INLINE void turn_halves(T* head, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t count = half - i;
        const Floats a = load(head + i, count), b = load(head + half + i, count);
        const Floats cosine = load(cosines + i, count), sine = load(sines + i, count);
        store(head + i, rounded_to<T>(a * cosine) - rounded_to<T>(b * sine), count);
        store(head + half + i, rounded_to<T>(b * cosine) + rounded_to<T>(a * sine), count);
    }
}

// Pairs (2i, 2i + 1); the tables have each pair's number twice, the first sine negated.
template <class T>
INLINE void turn_neighbours(T* head, const float* cosines, const float* sines, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t count = size - i;
        const Floats x = load(head + i, count);
        const Floats y = swapped<1>(x);
        store(head + i, rounded_to<T>(x * load(cosines + i, count)) + rounded_to<T>(y * load(sines + i, count)), count);
    }
}

template <class T>
static void rotary(
    void* q, int64_t q_stride, int64_t q_heads, void* k, int64_t k_stride, int64_t k_heads, const int64_t* positions,
    const float* cos_sin, int64_t num_tokens, int64_t head_size, int64_t rotary_size, int32_t is_neox) {
    const int64_t half = rotary_size / 2;
#pragma omp parallel for schedule(static) if (num_tokens * (q_heads + k_heads) * rotary_size >= MIN_PARALLEL)
    for (int64_t token = 0; token < num_tokens; token++) {
        float cosines[MAX_ROTARY_SIZE], sines[MAX_ROTARY_SIZE];
        const float* row = cos_sin + positions[token] * rotary_size;
        for (int64_t i = 0; i < half; i += LANES) {
            store(cosines + i, rounded_to<T>(load(row + i, half - i)), half - i);
            store(sines + i, rounded_to<T>(load(row + half + i, half - i)), half - i);
        }
        if (!is_neox)
            for (int64_t i = half - 1; i >= 0; i--) {
                const float cosine = cosines[i], sine = sines[i];
                cosines[2 * i] = cosines[2 * i + 1] = cosine;
                sines[2 * i] = -sine, sines[2 * i + 1] = sine;
            }
        for (int64_t i = 0; i < q_heads + k_heads; i++) {
            T* head = i < q_heads ? static_cast<T*>(q) + token * q_stride + i * head_size
                                  : static_cast<T*>(k) + token * k_stride + (i - q_heads) * head_size;
            is_neox ? turn_halves(head, cosines, sines, half) : turn_neighbours(head, cosines, sines, rotary_size);
        }
    }
}

#endif
