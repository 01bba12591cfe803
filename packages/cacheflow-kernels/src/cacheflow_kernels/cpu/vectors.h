// Vectors of LANES floats for one instruction set: loads and stores of every element type, rounding, and the elementary
// functions. Included by each_level.h, once per level, inside that level's namespace.

#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));

template <class Vector>
INLINE Vector load_raw(const void* from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class Vector>
INLINE void store_raw(void* to, Vector vector) {
    memcpy(to, &vector, sizeof vector);
}

// `Floats{} + value` would be an addition too, as it makes of -0 a 0.
INLINE Floats splat(float value) {
#if LANES == 16
    return (Floats)_mm512_set1_ps(value);
#else
    return (Floats)_mm256_set1_ps(value);
#endif
}

INLINE Floats widen(Floats vector, float) { return vector; }

// __builtin_convertvector does it in six instructions instead of one.
INLINE Floats widen(Shorts bits, BFloat16) {
#if LANES == 16
    const Ints wide = (Ints)_mm512_cvtepu16_epi32((__m256i)bits);
#else
    const Ints wide = (Ints)_mm256_cvtepu16_epi32((__m128i)bits);
#endif
    return (Floats)(wide << 16);
}

INLINE Floats widen(Shorts bits, Float16) {
#if LANES == 16
    return (Floats)_mm512_cvtph_ps((__m256i)bits);
#else
    return (Floats)_mm256_cvtph_ps((__m128i)bits);
#endif
}

INLINE Floats narrow(Floats vector, float) { return vector; }

// Round to nearest, ties to even.
INLINE Shorts narrow(Floats vector, BFloat16) {
#if HAS_BF16_DOT
    return (Shorts)_mm512_cvtneps_pbh((__m512)vector);
#else
    Ints bits = (Ints)vector;
    Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(vector == vector ? rounded : Ints{} + 0x7fc0, Shorts);
#endif
}

INLINE Shorts narrow(Floats vector, Float16) {
#if LANES == 16
    return (Shorts)_mm512_cvtps_ph((__m512)vector, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return (Shorts)_mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
}

// The first `count` lanes from memory, zeros in the others.
INLINE Floats load_first(const void* from, int64_t count, Floats) {
#if LANES == 16
    return (Floats)_mm512_maskz_loadu_ps((1u << count) - 1, from);
#else
    Floats vector{};
    memcpy(&vector, from, count * 4);
    return vector;
#endif
}

INLINE Shorts load_first(const void* from, int64_t count, Shorts) {
#if LANES == 16
    return (Shorts)_mm256_maskz_loadu_epi16((1u << count) - 1, from);
#else
    Shorts vector{};
    memcpy(&vector, from, count * 2);
    return vector;
#endif
}

INLINE void store_first(void* to, int64_t count, Floats vector) {
#if LANES == 16
    _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)vector);
#else
    memcpy(to, &vector, count * 4);
#endif
}

INLINE void store_first(void* to, int64_t count, Shorts vector) {
#if LANES == 16
    _mm256_mask_storeu_epi16(to, (1u << count) - 1, (__m256i)vector);
#else
    memcpy(to, &vector, count * 2);
#endif
}

// LANES elements, or the first `count` of them and zeros.
template <class T>
INLINE Floats load(const T* from, int64_t count = LANES) {
    using Vector = decltype(narrow(Floats{}, T{}));
    return widen(count >= LANES ? load_raw<Vector>(from) : load_first(from, count, Vector{}), T{});
}

template <class T>
INLINE void store(T* to, Floats vector, int64_t count = LANES) {
    const auto narrowed = narrow(vector, T{});
    if (count >= LANES)
        store_raw(to, narrowed);
    else
        store_first(to, count, narrowed);
}

// What is left of a value once it has been stored as T.
template <class T>
INLINE Floats rounded_to(Floats vector) {
    return widen(narrow(vector, T{}), T{});
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// One bit for each lane.
INLINE uint32_t bits_of(Ints mask) {
#if LANES == 16
    return _mm512_movepi32_mask((__m512i)mask);
#else
    return _mm256_movemask_ps((__m256)mask);
#endif
}

// Lane i gets what lane i ^ DISTANCE holds.
template <int DISTANCE>
INLINE Floats swapped(Floats vector) {
    Ints from;
    for (int i = 0; i < LANES; i++) from[i] = i ^ DISTANCE;
    return __builtin_shuffle(vector, from);
}

INLINE float sum(Floats vector) {
    if constexpr (LANES == 16) vector += swapped<8>(vector);
    vector += swapped<4>(vector);
    vector += swapped<2>(vector);
    vector += swapped<1>(vector);
    return vector[0];
}

INLINE float maximum(Floats vector) {
    if constexpr (LANES == 16) vector = larger(vector, swapped<8>(vector));
    vector = larger(vector, swapped<4>(vector));
    vector = larger(vector, swapped<2>(vector));
    vector = larger(vector, swapped<1>(vector));
    return vector[0];
}

// Adding it to a float of less than 2^22 rounds that to an integer, which then lies in the low bits.
constexpr float TO_INTEGER = 12582912.0f;

// 2^(n + f), where n is in the low bits of `whole` and |f| <= 0.5: the Taylor series of 2^f at 0, which is off by 5e-9 at most.
INLINE Floats scaled_power(Floats whole, Floats f) {
    Floats y = splat(1.5252733804059841e-5f);
    y = y * f + 1.5403530393381608e-4f;
    y = y * f + 1.3333558146428443e-3f;
    y = y * f + 9.6181291076284772e-3f;
    y = y * f + 5.5504108664821580e-2f;
    y = y * f + 2.4022650695910071e-1f;
    y = y * f + 6.9314718055994531e-1f;
    y = y * f + 1.0f;
    return (Floats)((Ints)y + ((Ints)whole << 23));
}

// e^x for x from -87 to 88: what a float holds.
INLINE Floats exponential_within(Floats x) {
    // log2(e) in two parts, as x * log2(e) rounded to one float would be off by x times its last digit.
    const float high = 1.44269502162933349609375f, low = 1.92596303e-8f;
    Floats whole = x * high + TO_INTEGER;
    Floats f = x * high - (whole - TO_INTEGER);
    return scaled_power(whole, f + x * low);
}

// e^x, with x cut to what a float holds.
INLINE Floats exponential(Floats x) { return exponential_within(x > 88.0f ? splat(88.0f) : larger(x, splat(-87.0f))); }

INLINE Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// tanh x: by e^2x, and by a series where that would cancel. Terms are the Taylor coefficients, off by 1e-8 below 0.3.
INLINE Floats hyperbolic_tangent(Floats x) {
    const Floats far = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
    const Floats z = x * x;
    Floats near = splat(-1382.0f / 155925.0f);
    near = near * z + 62.0f / 2835.0f;
    near = near * z - 17.0f / 315.0f;
    near = near * z + 2.0f / 15.0f;
    near = near * z - 1.0f / 3.0f;
    near = x + x * z * near;
    return magnitude(x) < 0.3f ? near : far;
}
