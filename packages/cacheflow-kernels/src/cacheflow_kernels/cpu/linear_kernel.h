// The parts of linear.cpp that each level of instruction sets has in its own version: tiles, dequantising, and a panel's end.

INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if LANES == 16
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

INLINE void fetch(const char* next) {
    _mm_prefetch(next, _MM_HINT_T1);
    _mm_prefetch(next + 64, _MM_HINT_T1);
}

// Activations in float32. A step is one k, or where the weights are pairs of bfloat16 two.
template <int ROWS, bool HAS_PAIRS>
static void float_tile(
    const void* rows, int64_t stride, const void* panel, int64_t steps, float* c, const char* next, int64_t next_step) {
    for (int first = 0; first < PANEL; first += 2 * LANES) {
        const float* x = (const float*)rows;
        const float* w = (const float*)panel + first;
        Floats sum[ROWS][2] = {};
        for (int64_t step = 0; step < steps; step++, w += PANEL, next += next_step) {
            fetch(next);
            Floats w0 = load(w), w1 = load(w + LANES);
            if (HAS_PAIRS) {
                const Floats even0 = (Floats)((Ints)w0 << 16), even1 = (Floats)((Ints)w1 << 16);
#pragma GCC unroll 12
                for (int row = 0; row < ROWS; row++) {
                    const Floats value = splat(x[row * stride]);
                    sum[row][0] = multiply_add(even0, value, sum[row][0]);
                    sum[row][1] = multiply_add(even1, value, sum[row][1]);
                }
                x++;
                w0 = (Floats)((Ints)w0 & -0x10000), w1 = (Floats)((Ints)w1 & -0x10000);
            }
#pragma GCC unroll 12
            for (int row = 0; row < ROWS; row++) {
                const Floats value = splat(x[row * stride]);
                sum[row][0] = multiply_add(w0, value, sum[row][0]);
                sum[row][1] = multiply_add(w1, value, sum[row][1]);
            }
            x++;
        }
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            store(c + row * PANEL + first, sum[row][0]);
            store(c + row * PANEL + first + LANES, sum[row][1]);
        }
    }
}

#if HAS_BF16_DOT

// Pairs of bfloat16.
INLINE __m512 add_products(__m512 sum, __m512i w, int32_t x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
}

// Four bytes, of which those of the activations are unsigned.
INLINE __m512i add_products(__m512i sum, __m512i w, int32_t x) {
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(x), w);
}

// A step is one 4-byte item of weights and of activations.
template <int ROWS, class Sum>
static void dot_tile(
    const void* rows, int64_t stride, const void* panel, int64_t steps, float* c, const char* next, int64_t next_step) {
    const int32_t* x = (const int32_t*)rows;
    const char* w = (const char*)panel;
    Sum sum[ROWS][2] = {};
    for (int64_t step = 0; step < steps; step++, x++, w += 4 * PANEL, next += next_step) {
        fetch(next);
        const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            sum[row][0] = add_products(sum[row][0], w0, x[row * stride]);
            sum[row][1] = add_products(sum[row][1], w1, x[row * stride]);
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++) {
        store_raw(c + row * PANEL, sum[row][0]);
        store_raw(c + row * PANEL + LANES, sum[row][1]);
    }
}

// What is added to quantised activations to make them unsigned.
constexpr int BYTE_OFFSET = 128;

#else

constexpr int BYTE_OFFSET = 0;

// Of four signed bytes the odd and the even ones as 16-bit numbers.
INLINE Ints odd_bytes(Ints four) {
#if LANES == 16
    return (Ints)_mm512_srai_epi16((__m512i)four, 8);
#else
    return (Ints)_mm256_srai_epi16((__m256i)four, 8);
#endif
}
INLINE Ints even_bytes(Ints four) { return odd_bytes((four & 0xff00ff) << 8); }

INLINE Ints products_of_pairs(Ints a, Ints b) {
#if LANES == 16
    return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

// Activations in signed bytes. A step is four k.
template <int ROWS>
static void integer_tile(
    const void* rows, int64_t stride, const void* panel, int64_t steps, float* c, const char* next, int64_t next_step) {
    for (int first = 0; first < PANEL; first += LANES) {
        const int32_t* x = (const int32_t*)rows;
        const int32_t* w = (const int32_t*)panel + first;
        Ints sum[ROWS] = {};
        for (int64_t step = 0; step < steps; step++, x++, w += PANEL, next += next_step) {
            fetch(next);
            const Ints four = load_raw<Ints>(w), odd = odd_bytes(four), even = even_bytes(four);
#pragma GCC unroll 12
            for (int row = 0; row < ROWS; row++) {
                const Ints value = Ints{} + x[row * stride];
                sum[row] += products_of_pairs(odd, odd_bytes(value)) + products_of_pairs(even, even_bytes(value));
            }
        }
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) store_raw(c + row * PANEL + first, sum[row]);
    }
}

#endif

// __builtin_convertvector does these two in dozens of instructions.
INLINE Ints load_bytes(const uint8_t* from) {
#if LANES == 16
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#endif
}

INLINE Ints load_signed_bytes(const uint8_t* from) {
#if LANES == 16
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#endif
}

// A panel of grouped integers as a PLAIN_FLOAT32 panel, or as a PLAIN_BFLOAT16 one.
template <bool IS_INT4, bool TO_BFLOAT16>
static void unpack(const Linear& l, int64_t panel, void* out) {
    const int64_t pairs = padded_items(l.in_features, 2), group = l.group_size / 2, groups = (pairs + group - 1) / group;
    const uint8_t* w = (const uint8_t*)l.weight + panel * pairs * PANEL * (IS_INT4 ? 1 : 2);
    const Float16* scales = (const Float16*)l.scales + panel * groups * PANEL;
    const Float16* minimums = (const Float16*)l.minimums + panel * groups * PANEL;
#if HAS_BF16_DOT
    // Takes 16 evens and 16 odds to 16 pairs.
    const Ints lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i side_by_side = (__m512i)(lanes | (lanes + 16) << 16);
#endif
    for (int first = 0; first < PANEL; first += LANES)
        for (int64_t g = 0; g < groups; g++) {
            const Floats scale = load(scales + g * PANEL + first);
            const Floats minimum = IS_INT4 ? load(minimums + g * PANEL + first) : Floats{};
            const int64_t end = (g + 1) * group < pairs ? (g + 1) * group : pairs;
            for (int64_t pair = g * group; pair < end; pair++) {
                Floats even, odd;
                if (IS_INT4) {
                    const Ints both = load_bytes(w + pair * PANEL + first);
                    even = multiply_add(__builtin_convertvector(both & 15, Floats), scale, minimum);
                    odd = multiply_add(__builtin_convertvector(both >> 4, Floats), scale, minimum);
                } else {
                    const uint8_t* at = w + 2 * pair * PANEL + first;
                    even = __builtin_convertvector(load_signed_bytes(at), Floats) * scale;
                    odd = __builtin_convertvector(load_signed_bytes(at + PANEL), Floats) * scale;
                }
#if HAS_BF16_DOT
                if (TO_BFLOAT16) {
                    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
                    _mm512_storeu_si512((int32_t*)out + pair * PANEL + first, _mm512_permutexvar_epi16(side_by_side, both));
                    continue;
                }
#endif
                store((float*)out + 2 * pair * PANEL + first, even);
                store((float*)out + (2 * pair + 1) * PANEL + first, odd);
            }
        }
}

static void widen_row(const void* x, int64_t size, float* out) {
    for (int64_t i = 0; i < size; i += LANES) store(out + i, load((const BFloat16*)x + i, size - i), size - i);
}

// The sum of each lane and that at DISTANCE, or their difference.
template <int DISTANCE>
INLINE Floats butterfly(Floats x) {
    Floats signs;
    for (int lane = 0; lane < LANES; lane++) signs[lane] = lane & DISTANCE ? -1.0f : 1.0f;
    return multiply_add(x, signs, swapped<DISTANCE>(x));
}

// Multiplies each whole 64 numbers by the Hadamard matrix over 8: what stands out in one place is spread over all of them.
static void rotate_blocks(float* x, int64_t size) {
    constexpr int BLOCK = 64, VECTORS = BLOCK / LANES;
    for (int64_t block = 0; block + BLOCK <= size; block += BLOCK) {
        Floats part[VECTORS];
        for (int i = 0; i < VECTORS; i++) {
            part[i] = butterfly<4>(butterfly<2>(butterfly<1>(load(x + block + i * LANES))));
            if constexpr (LANES == 16) part[i] = butterfly<8>(part[i]);
        }
        for (int distance = 1; distance < VECTORS; distance *= 2)
            for (int i = 0; i < VECTORS; i++)
                if (!(i & distance)) {
                    const Floats a = part[i], b = part[i + distance];
                    part[i] = a + b;
                    part[i + distance] = a - b;
                }
        for (int i = 0; i < VECTORS; i++) store(x + block + i * LANES, part[i] * 0.125f);
    }
}

// The row, turned in place, times 127 / its largest magnitude, as bytes, BYTE_OFFSET too large; returns the scale that undoes it.
static float quantise_row(float* x, int64_t size, uint8_t* out) {
    rotate_blocks(x, size);
    // As integers: the bits of a NaN are larger than those of any number, so that a NaN makes the scale a NaN.
    Ints largest{};
    for (int64_t i = 0; i < size; i += LANES) {
        const Ints bits = (Ints)magnitude(load(x + i, size - i));
        largest = bits > largest ? bits : largest;
    }
    int32_t bits = 0;
    for (int lane = 0; lane < LANES; lane++) bits = largest[lane] > bits ? largest[lane] : bits;
    float top;
    memcpy(&top, &bits, 4);
    const float factor = top == 0.0f ? 0.0f : 127.0f / top;
    for (int64_t i = 0; i < size; i += LANES) {
        typedef uint8_t Bytes __attribute__((vector_size(LANES)));
        const Ints whole = (Ints)(load(x + i, size - i) * factor + TO_INTEGER) + BYTE_OFFSET;
        const Bytes bytes = __builtin_convertvector(whole, Bytes);
        memcpy(out + i, &bytes, size - i < LANES ? size - i : LANES);
    }
    return top / 127.0f;
}

// Sums of integers to numbers: less what BYTE_OFFSET added, times both scales.
static void scale(const Linear& l, int64_t panel, int64_t rows, const float* row_scales, float* c) {
    for (int first = 0; first < PANEL; first += LANES) {
        const Floats column_scale = load((const float*)l.scales + panel * PANEL + first);
        const Ints extra = load_raw<Ints>(l.sums + panel * PANEL + first) * BYTE_OFFSET;
        for (int64_t row = 0; row < rows; row++) {
            float* at = c + row * PANEL + first;
            store(at, __builtin_convertvector(load_raw<Ints>(at) - extra, Floats) * column_scale * row_scales[row]);
        }
    }
}

// Bias, activation and rounding; writes those columns of the panel that exist.
template <class T>
INLINE void finish_as(const Linear& l, int64_t panel, int64_t rows, const float* c, T* out) {
    const int columns = l.is_gated ? PANEL / 2 : PANEL;
    const int64_t start = panel * columns, end = l.out_features - start < columns ? l.out_features - start : columns;
    for (int64_t row = 0; row < rows; row++) {
        const auto column = [&](int i) __attribute__((always_inline)) {
            const Floats x = load(c + row * PANEL + i);
            return l.bias ? x + load(l.bias + panel * PANEL + i) : x;
        };
        T* to = out + row * l.out_features + start;
        for (int i = 0; i < end; i += LANES) {
            Floats x = column(i);
            if (l.is_gated) x = x / (1.0f + exponential(-x)) * column(i + columns);
            store(to + i, x, end - i);
        }
    }
}

static void finish(const Linear& l, int64_t panel, int64_t rows, float* c, void* out) {
    if (l.is_bfloat16)
        finish_as(l, panel, rows, c, (BFloat16*)out);
    else
        finish_as(l, panel, rows, c, (float*)out);
}

template <int... I>
constexpr LinearKernels linear_kernels(std::integer_sequence<int, I...>) {
    return {
        {float_tile<I + 1, false>...},
#if HAS_BF16_DOT
        {dot_tile<I + 1, __m512>...},
        {dot_tile<I + 1, __m512i>...},
#else
        {float_tile<I + 1, true>...},
        {integer_tile<I + 1>...},
#endif
        {unpack<false, false>, unpack<true, false>},
        {unpack<false, true>, unpack<true, true>},
        widen_row,
        quantise_row,
        scale,
        finish,
        sizeof...(I),
        HAS_BF16_DOT,
    };
}

// A constant that needs no code to run when the library is loaded: that code would be this level's.
static constexpr LinearKernels LINEAR_KERNELS = linear_kernels(std::make_integer_sequence<int, LANES == 16 ? MAX_TILE_ROWS : 6>());
