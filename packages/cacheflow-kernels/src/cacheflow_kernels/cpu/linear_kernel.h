// The parts of linear.cpp that each level of instruction sets has in its own version: tiles, dequantising, and a panel's end.

INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if LANES == 16
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

INLINE void fetch_line(const char* next) { _mm_prefetch(next, _MM_HINT_T1); }

INLINE void fetch(const char* next) {
    fetch_line(next);
    fetch_line(next + 64);
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

// __builtin_convertvector does it in dozens of instructions.
INLINE Ints load_signed_bytes(const uint8_t* from) {
#if LANES == 16
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#endif
}

// Where a strip of a panel of grouped integers lies.
template <bool IS_INT4>
struct Strip {
    static constexpr int64_t BLOCK_BYTES = IS_INT4 ? 4 * STRIP : 8 * STRIP;  // of 8 k

    const int64_t size, num_groups, group_size;  // k, padded
    const uint8_t* weight;
    const Float16 *scales, *minimums;

    Strip(const Linear& l, int64_t panel, int strip)
        : size(2 * padded_items(l.in_features, 2)), num_groups(::num_groups(l)), group_size(l.group_size) {
        const int64_t number = 2 * panel + strip;
        weight = (const uint8_t*)l.weight + number * (size / 8 * BLOCK_BYTES);
        scales = (const Float16*)l.scales + number * num_groups * STRIP;
        minimums = IS_INT4 ? (const Float16*)l.minimums + number * num_groups * STRIP : nullptr;
    }

    int64_t end_of(int64_t group) const {
        return (group + 1) * group_size < size ? (group + 1) * group_size : size;
    }
};

// A panel of grouped integers as a PLAIN_FLOAT32 one.
template <bool IS_INT4>
static void unpack_to_float32(const Linear& l, int64_t panel, float* out) {
    for (int first = 0; first < PANEL; first += LANES) {
        const Strip<IS_INT4> strip(l, panel, first / STRIP);
        const int within = first % STRIP;
        for (int64_t g = 0; g < strip.num_groups; g++) {
            const Floats scale = load(strip.scales + g * STRIP + within);
            const Floats minimum = IS_INT4 ? load(strip.minimums + g * STRIP + within) : Floats{};
            for (int64_t k = g * strip.group_size, end = strip.end_of(g); k < end; k += 8) {
                const uint8_t* block = strip.weight + k / 8 * strip.BLOCK_BYTES;
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    Ints whole;
                    if (IS_INT4)
                        whole = load_raw<Ints>(block + 4 * within) >> (i / 2 * 4 + i % 2 * 16) & 15;
                    else
                        whole = load_signed_bytes(block + i * STRIP + within);
                    store(out + (k + i) * PANEL + first, multiply_add(__builtin_convertvector(whole, Floats), scale, minimum));
                }
            }
        }
    }
}

#if HAS_BF16_DOT

// A block of 8 k of a strip as four vectors of pairs of bfloat16, which hold these integers exactly.
template <bool IS_INT4>
INLINE void load_pairs(const uint8_t* block, __m512i pairs[4]) {
    if (IS_INT4) {
        // 0 to 15, twice, as the instruction looks at 5 bits.
        const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
            0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160,
            0x4170));
        const __m512i four = _mm512_loadu_si512(block);
        pairs[0] = _mm512_permutexvar_epi16(four, table);
        pairs[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 4), table);
        pairs[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 8), table);
        pairs[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 12), table);
        return;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const Floats even = __builtin_convertvector(load_signed_bytes(block + 2 * i * STRIP), Floats);
        const Floats odd = __builtin_convertvector(load_signed_bytes(block + (2 * i + 1) * STRIP), Floats);
        // One instruction: even's bits, and where the mask has ones odd's.
        const __m512i low = _mm512_srli_epi32((__m512i)even, 16), high = _mm512_set1_epi32(-0x10000);
        pairs[i] = _mm512_ternarylogic_epi32(low, (__m512i)odd, high, 0xf8);
    }
}

// The sum of each group of a row.
static void sum_groups(const void* row, int64_t size, int64_t group_size, float* out) {
    for (int64_t start = 0; start < size; start += group_size) {
        Floats total{};
        const int64_t end = start + group_size < size ? start + group_size : size;
        for (int64_t k = start; k < end; k += LANES) total += load((const BFloat16*)row + k);
        *out++ = sum(total);
    }
}

// Adds a group's products, of integers, to the sums: times the scale, and the minimum times the sum of the row's numbers.
template <int ROWS, bool IS_INT4, class Part>
INLINE void add_group(
    const Float16* scales, const Float16* minimums, const float* row_sums, int64_t num_groups, const Part& part, Floats* sum) {
    const Floats scale = load(scales);
    const Floats minimum = IS_INT4 ? load(minimums) : Floats{};
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; row++) {
        sum[row] = multiply_add(part(row), scale, sum[row]);
        if (IS_INT4) sum[row] = multiply_add(minimum, splat(row_sums[row * num_groups]), sum[row]);
    }
}

template <int ROWS>
INLINE void store_strip(float* c, const Floats* sum) {
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; row++) store(c + row * PANEL, sum[row]);
}

// Integers are unpacked in registers, for each tile of rows again: that takes less time than to read what was unpacked.
template <int ROWS, bool IS_INT4>
static void grouped_tile(
    const Linear& l, int64_t panel, int s, const int32_t* rows, int64_t stride, const float* row_sums, const char*, float* c) {
    const Strip<IS_INT4> strip(l, panel, s);
    const uint8_t* block = strip.weight;
    const int32_t* x = rows;
    Floats sum[ROWS] = {};
    for (int64_t g = 0; g < strip.num_groups; g++) {
        Floats part[ROWS] = {};
        for (int64_t k = g * strip.group_size, end = strip.end_of(g); k < end; k += 8, x += 4) {
            __m512i pairs[4];
            load_pairs<IS_INT4>(block, pairs);
            fetch_line((const char*)block + STREAM_AHEAD);
            if (!IS_INT4) fetch_line((const char*)block + STREAM_AHEAD + 64);
            block += strip.BLOCK_BYTES;
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
#pragma GCC unroll 12
                for (int row = 0; row < ROWS; row++)
                    part[row] = (Floats)add_products((__m512)part[row], pairs[i], x[row * stride + i]);
        }
        add_group<ROWS, IS_INT4>(
            strip.scales + g * STRIP, strip.minimums + g * STRIP, row_sums + g, strip.num_groups,
            [&](int row) __attribute__((always_inline)) { return part[row]; }, sum);
    }
    store_strip<ROWS>(c + s * STRIP, sum);
}

// 32 k of a strip as the matrix unit takes them. Meanwhile as many are asked for that lie `ahead` bytes from there.
constexpr int UNIT_K = 32, UNIT_BYTES = UNIT_K * STRIP * 2;
template <bool IS_INT4>
INLINE void unpack_unit(const uint8_t* block, int64_t ahead, char* out) {
#pragma GCC unroll 4
    for (int i = 0; i < UNIT_K / 8; i++, block += Strip<IS_INT4>::BLOCK_BYTES) {
        __m512i pairs[4];
        load_pairs<IS_INT4>(block, pairs);
        fetch_line((const char*)block + ahead);
        if (!IS_INT4) fetch_line((const char*)block + ahead + 64);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) _mm512_store_si512(out + (4 * i + j) * 64, pairs[j]);
    }
}

template <bool IS_INT4>
static void unpack_for_unit(const Linear& l, int64_t panel, char* out) {
    for (int s = 0; s < 2; s++) {
        const Strip<IS_INT4> strip(l, panel, s);
        const int64_t panel_bytes = strip.size / 4 * strip.BLOCK_BYTES;
        for (int64_t k = 0; k < strip.size; k += UNIT_K, out += UNIT_BYTES)
            unpack_unit<IS_INT4>(strip.weight + k / 8 * strip.BLOCK_BYTES, panel_bytes, out);
    }
}

// What is stored takes a while until the matrix unit can read it, and what that stores until it can be read: 32 k are unpacked,
// those DELAY before them multiplied, and the group that ends as many before these added. In order, one row took twice as long.
constexpr int DELAY = 2, RING = 4;

// Strip S of a panel's products by the matrix unit, which linear_matrix_unit.h prepares: register 0 is for sums, 4 for
// activations, 6 for weights. `unpacked` is what unpack_for_unit made.
template <int ROWS, bool IS_INT4>
static void grouped_unit(
    const Linear& l, int64_t panel, int s, const int32_t* rows, int64_t stride, const float* row_sums, const char* unpacked,
    float* c) {
    alignas(64) float parts[RING][16 * STRIP];
    const Strip<IS_INT4> strip(l, panel, s);
    const int64_t num_units = strip.size / UNIT_K, group_units = strip.group_size / UNIT_K;
    int64_t multiplied = 0, added = 0, units_to_multiply = group_units, units_to_add = group_units;
    Floats sum[ROWS] = {};
    for (int64_t unit = 0; unit < num_units + DELAY; unit++) {
        const int64_t behind = unit - DELAY;
        if (unit < num_units) {
            if (units_to_multiply == group_units) _tile_zero(0);
            _tile_loadd(4, rows + unit * (UNIT_K / 2), stride * 4);
            _tile_loadd(6, unpacked + (s * num_units + unit) * UNIT_BYTES, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (--units_to_multiply == 0 || unit == num_units - 1) {
                _tile_stored(0, parts[multiplied++ % RING], 4 * STRIP);
                units_to_multiply = group_units;
            }
        }
        if (behind >= 0 && (--units_to_add == 0 || behind == num_units - 1)) {
            const float* part = parts[added % RING];
            add_group<ROWS, IS_INT4>(
                strip.scales + added * STRIP, strip.minimums + added * STRIP, row_sums + added, strip.num_groups,
                [&](int row) __attribute__((always_inline)) { return load(part + row * STRIP); }, sum);
            added++;
            units_to_add = group_units;
        }
    }
    store_strip<ROWS>(c + s * STRIP, sum);
}

static void finish(const Linear& l, int64_t panel, int64_t rows, const float* row_scales, const float* c, void* out);

// Counts the 32 k of strips that follow one another, and says where a group or a strip ends.
struct Place {
    const int64_t group_units, num_units;
    int64_t unit = 0, in_group = 0;

    bool begins_group() const { return in_group == 0; }
    bool ends_strip() const { return unit == num_units - 1; }
    bool ends_group() const { return in_group == group_units - 1 || ends_strip(); }
    void next() {
        in_group = ends_group() ? 0 : in_group + 1;
        unit = ends_strip() ? 0 : unit + 1;
    }
};

// A single tile of rows times the panels from `begin` to before `end`, in the same way. Weights, scales and minimums are read
// from memory in the order in which they lie, without a pause where a strip or panel ends.
template <int ROWS, bool IS_INT4>
static void grouped_stream(
    const Linear& l, int64_t begin, int64_t end, const int32_t* rows, int64_t stride, const float* row_sums, void* out) {
    alignas(64) char units[RING][UNIT_BYTES];
    alignas(64) float parts[RING][16 * STRIP], c[ROWS * PANEL];
    const Strip<IS_INT4> strip(l, begin, 0);
    const uint8_t* block = strip.weight;
    const Float16 *scales = strip.scales, *minimums = strip.minimums;
    const int64_t group_units = strip.group_size / UNIT_K, num_units = strip.size / UNIT_K;
    const int64_t count = 2 * (end - begin) * num_units;
    Place multiplied{group_units, num_units}, added{group_units, num_units};
    int64_t panel = begin, group = 0, num_multiplied = 0, num_added = 0;
    int s = 0;
    Floats sum[ROWS] = {};
    for (int64_t ahead = 0; ahead < count + 2 * DELAY; ahead++) {
        if (ahead < count) {
            unpack_unit<IS_INT4>(block, STREAM_AHEAD, units[ahead % RING]);
            block += UNIT_K / 8 * strip.BLOCK_BYTES;
        }
        const int64_t unit = ahead - DELAY;
        if (unit >= 0 && unit < count) {
            if (multiplied.begins_group()) _tile_zero(0);
            _tile_loadd(4, rows + multiplied.unit * (UNIT_K / 2), stride * 4);
            _tile_loadd(6, units[unit % RING], 64);
            _tile_dpbf16ps(0, 4, 6);
            if (multiplied.ends_group()) _tile_stored(0, parts[num_multiplied++ % RING], 4 * STRIP);
            multiplied.next();
        }
        if (unit < DELAY) continue;
        if (added.ends_group()) {
            const float* part = parts[num_added++ % RING];
            fetch_line((const char*)scales + SCALES_AHEAD);
            if (IS_INT4) fetch_line((const char*)minimums + SCALES_AHEAD);
            add_group<ROWS, IS_INT4>(
                scales, minimums, row_sums + group, strip.num_groups,
                [&](int row) __attribute__((always_inline)) { return load(part + row * STRIP); }, sum);
            scales += STRIP;
            if (IS_INT4) minimums += STRIP;
            group++;
        }
        if (added.ends_strip()) {
            store_strip<ROWS>(c + s * STRIP, sum);
#pragma GCC unroll 16
            for (int row = 0; row < ROWS; row++) sum[row] = Floats{};
            group = 0;
            s = 1 - s;
            if (s == 0) finish(l, panel++, ROWS, nullptr, c, out);
        }
        added.next();
    }
}

// The same of a single row, of float32, by vectors: bit for bit what the matrix unit gives. That adds the products of 16 even
// k, and of 16 odd k, in order and rounded once a product, then both sums, then what came before; it takes denormal numbers as
// zero. All products of SmolLM2-135M took 2.4 ms by the unit in int4 and 2.2 so, in int8 4.1 and 3.4.
template <bool IS_INT4>
static void grouped_row(const Linear& l, int64_t begin, int64_t end, const float* row, const float* row_sums, void* out) {
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    alignas(64) float c[PANEL];
    const Strip<IS_INT4> strip(l, begin, 0);
    const uint8_t* block = strip.weight;
    const Float16 *scales = strip.scales, *minimums = strip.minimums;
    for (int64_t number = 2 * begin; number < 2 * end; number++) {
        const float* x = row;
        Floats sum[1] = {};
        for (int64_t g = 0; g < strip.num_groups; g++, scales += STRIP, minimums += IS_INT4 ? STRIP : 0) {
            fetch_line((const char*)scales + SCALES_AHEAD);
            if (IS_INT4) fetch_line((const char*)minimums + SCALES_AHEAD);
            Floats part{};
            for (int64_t k = g * strip.group_size, last = strip.end_of(g); k < last; k += UNIT_K) {
                Floats even{}, odd{};
#pragma GCC unroll 4
                for (int i = 0; i < UNIT_K / 8; i++, block += strip.BLOCK_BYTES, x += 8) {
                    fetch_line((const char*)block + STREAM_AHEAD);
                    if (!IS_INT4) fetch_line((const char*)block + STREAM_AHEAD + 64);
                    const __m512i eight = IS_INT4 ? _mm512_loadu_si512(block) : __m512i{};
                    const auto weights = [&](int j) __attribute__((always_inline)) {
                        // The instruction looks at 4 bits.
                        if (IS_INT4) return (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(eight, j / 2 * 4 + j % 2 * 16), table);
                        return __builtin_convertvector(load_signed_bytes(block + j * STRIP), Floats);
                    };
#pragma GCC unroll 4
                    for (int j = 0; j < 8; j += 2) {
                        even = multiply_add(weights(j), splat(x[j]), even);
                        odd = multiply_add(weights(j + 1), splat(x[j + 1]), odd);
                    }
                }
                part += even + odd;
            }
            add_group<1, IS_INT4>(
                scales, minimums, row_sums + g, 0, [&](int) __attribute__((always_inline)) { return part; }, sum);
        }
        store_strip<1>(c + number % 2 * STRIP, sum);
        if (number % 2) finish(l, number / 2, 1, nullptr, c, out);
    }
}

#endif

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

// 64 numbers times the Hadamard matrix over 8: what stands out in one place is spread over all of them.
constexpr int BLOCK = 64, BLOCK_VECTORS = BLOCK / LANES;
INLINE void rotate(Floats part[BLOCK_VECTORS]) {
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK_VECTORS; i++) {
        part[i] = butterfly<4>(butterfly<2>(butterfly<1>(part[i])));
        if constexpr (LANES == 16) part[i] = butterfly<8>(part[i]);
    }
#pragma GCC unroll 3
    for (int distance = 1; distance < BLOCK_VECTORS; distance *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK_VECTORS; i++)
            if (!(i & distance)) {
                const Floats a = part[i], b = part[i + distance];
                part[i] = a + b;
                part[i + distance] = a - b;
            }
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK_VECTORS; i++) part[i] *= 0.125f;
}

// The lowest byte of each lane, or of the first `count`. A copy of a length that the compiler does not know takes a dozen
// branches.
INLINE void store_low_bytes(uint8_t* to, Ints whole, int64_t count) {
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    const Bytes bytes = __builtin_convertvector(whole, Bytes);
    if (count >= LANES)
        store_raw(to, bytes);
    else
        memcpy(to, &bytes, count);
}

// The row, each whole 64 of it turned (into `turned`), times 127 / its largest magnitude, as bytes, BYTE_OFFSET too large;
// returns the scale that undoes it.
template <class T>
static float quantise_row(const void* row, int64_t size, float* turned, uint8_t* out) {
    const T* x = (const T*)row;
    // As integers: the bits of a NaN are larger than those of any number, so that a NaN makes the scale a NaN.
    Ints largest{};
    const auto keep = [&](int64_t i, Floats values) __attribute__((always_inline)) {
        store(turned + i, values, size - i);
        const Ints bits = (Ints)magnitude(values);
        largest = bits > largest ? bits : largest;
    };
    int64_t start = 0;
    for (; start + BLOCK <= size; start += BLOCK) {
        Floats part[BLOCK_VECTORS];
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK_VECTORS; i++) part[i] = load(x + start + i * LANES);
        rotate(part);
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK_VECTORS; i++) keep(start + i * LANES, part[i]);
    }
    for (; start < size; start += LANES) keep(start, load(x + start, size - start));
    int32_t bits = 0;
    for (int lane = 0; lane < LANES; lane++) bits = largest[lane] > bits ? largest[lane] : bits;
    float top;
    memcpy(&top, &bits, 4);
    const float factor = top == 0.0f ? 0.0f : 127.0f / top;
    for (int64_t i = 0; i < size; i += LANES) {
        const Ints whole = (Ints)(load(turned + i, size - i) * factor + TO_INTEGER) + BYTE_OFFSET;
        store_low_bytes(out + i, whole, size - i);
    }
    return top / 127.0f;
}

// x / (1 + e^-x) for a result of type T. In bfloat16, whose rounding is off by 2e-3, 2^f for f from 0 to 1 comes from a
// polynomial that is off by 8e-5 and the reciprocal from an estimate that is off by 6e-5: 9 instructions for 16 gates.
template <class T>
INLINE Floats gate(Floats x) {
#if LANES == 16
    if constexpr (!std::is_same_v<T, float>) {
        const Floats z = x * -1.44269504f;  // -log2(e)
        const Floats f = (Floats)_mm512_reduce_ps((__m512)z, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        Floats y = splat(0.07802452f);
        y = y * f + 0.22606724f;
        y = y * f + 0.69583347f;
        y = y * f + 0.99992523f;
        const Floats power = (Floats)_mm512_scalef_ps((__m512)y, (__m512)z);
        return x * (Floats)_mm512_rcp14_ps((__m512)(1.0f + power));
    }
#endif
    return x / (1.0f + exponential(-x));
}

// What happens to a panel's sums. Those of whole numbers become numbers: less what BYTE_OFFSET added, times both scales. Then
// bias, activation and rounding. Multiplied and added by one instruction, wherever this is inlined, so that no bit depends on
// it. OFFSET is what the activations are too large by.
template <class T, bool IS_INTEGER, int OFFSET = BYTE_OFFSET>
struct PanelEnd {
    Floats bias[PANEL / LANES] = {}, column_scale[PANEL / LANES] = {};
    Ints extra[PANEL / LANES] = {};

    PanelEnd() = default;
    __attribute__((always_inline)) PanelEnd(const Linear& l, int64_t panel) {
        for (int i = 0; i < PANEL; i += LANES) {
            if (l.bias) bias[i / LANES] = load(l.bias + panel * PANEL + i);
            if (!IS_INTEGER) continue;
            extra[i / LANES] = load_raw<Ints>(l.sums + panel * PANEL + i) * OFFSET;
            column_scale[i / LANES] = load((const float*)l.scales + panel * PANEL + i);
        }
    }

    __attribute__((always_inline)) Floats column(const float* c, int i, float row_scale) const {
        if (!IS_INTEGER) return load(c + i) + bias[i / LANES];
        Ints sum = load_raw<Ints>(c + i);
        if (OFFSET) sum -= extra[i / LANES];
        const Floats whole = __builtin_convertvector(sum, Floats);
        return multiply_add(whole * column_scale[i / LANES], splat(row_scale), bias[i / LANES]);
    }

    // The first `count` columns of a row's result, if there are fewer than all.
    template <bool IS_GATED>
    __attribute__((always_inline)) void finish_row(const float* c, float row_scale, int64_t count, T* to) const {
        constexpr int COLUMNS = IS_GATED ? PANEL / 2 : PANEL;
#pragma GCC unroll 4
        for (int i = 0; i < COLUMNS; i += LANES) {
            if (i >= count) break;
            Floats x = column(c, i, row_scale);
            if (IS_GATED) x = gate<T>(x) * column(c, i + COLUMNS, row_scale);
            store(to + i, x, count - i);
        }
    }
};

template <class T, bool IS_INTEGER, bool IS_GATED>
INLINE void finish_as(const Linear& l, int64_t panel, int64_t rows, const float* row_scales, const float* c, T* out) {
    const PanelEnd<T, IS_INTEGER> end(l, panel);
    const int columns = IS_GATED ? PANEL / 2 : PANEL;
    const int64_t start = panel * columns;
    for (int64_t row = 0; row < rows; row++)
        end.template finish_row<IS_GATED>(
            c + row * PANEL, IS_INTEGER ? row_scales[row] : 1.0f, l.out_features - start, out + row * l.out_features + start);
}

template <class T, bool IS_INTEGER>
INLINE void finish_gated_or_not(const Linear& l, int64_t panel, int64_t rows, const float* row_scales, const float* c, T* out) {
    if (l.is_gated)
        finish_as<T, IS_INTEGER, true>(l, panel, rows, row_scales, c, out);
    else
        finish_as<T, IS_INTEGER, false>(l, panel, rows, row_scales, c, out);
}

template <class T>
INLINE void finish_form(const Linear& l, int64_t panel, int64_t rows, const float* row_scales, const float* c, T* out) {
    if (l.form == DYNAMIC_INT8)
        finish_gated_or_not<T, true>(l, panel, rows, row_scales, c, out);
    else
        finish_gated_or_not<T, false>(l, panel, rows, row_scales, c, out);
}

static void finish(const Linear& l, int64_t panel, int64_t rows, const float* row_scales, const float* c, void* out) {
    if (l.is_bfloat16)
        finish_form(l, panel, rows, row_scales, c, (BFloat16*)out);
    else
        finish_form(l, panel, rows, row_scales, c, (float*)out);
}

template <int... I>
constexpr LinearKernels linear_kernels(std::integer_sequence<int, I...>) {
    return {
        {float_tile<I + 1, false>...},
#if HAS_BF16_DOT
        {dot_tile<I + 1, __m512>...},
        {dot_tile<I + 1, __m512i>...},
        {{grouped_tile<I + 1, false>...}, {grouped_tile<I + 1, true>...}},
        sum_groups,
#else
        {float_tile<I + 1, true>...},
        {integer_tile<I + 1>...},
        {},
        nullptr,
#endif
        {unpack_to_float32<false>, unpack_to_float32<true>},
        widen_row,
        {quantise_row<float>, quantise_row<BFloat16>},
        finish,
        sizeof...(I),
        HAS_BF16_DOT,
    };
}

// Constants that need no code to run when the library is loaded: that code would be this level's.
static constexpr LinearKernels LINEAR_KERNELS = linear_kernels(std::make_integer_sequence<int, LANES == 16 ? MAX_TILE_ROWS : 6>());

#if HAS_BF16_DOT
template <int... I>
constexpr MatrixUnitKernels matrix_unit_kernels(std::integer_sequence<int, I...>) {
    return {
        {{grouped_unit<I + 1, false>...}, {grouped_unit<I + 1, true>...}},
        {{grouped_stream<I + 1, false>...}, {grouped_stream<I + 1, true>...}},
        {grouped_row<false>, grouped_row<true>},
        {unpack_for_unit<false>, unpack_for_unit<true>},
    };
}

static constexpr MatrixUnitKernels MATRIX_UNIT_KERNELS = matrix_unit_kernels(std::make_integer_sequence<int, 16>());
#endif
