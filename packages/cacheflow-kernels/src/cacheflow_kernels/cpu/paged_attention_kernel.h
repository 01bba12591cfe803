// The part of paged_attention.cpp that is compiled once per instruction set: included by each_level.h.

namespace {

constexpr float LOG2_E = 1.44269504088896340736f;

// How a block's operands are laid out for the multiply-adds of a cache in T: pairs of bfloat16 for the dot-product
// instruction, or floats.
template <class T>
constexpr bool PAIRS = HAS_BF16_DOT && std::is_same_v<T, BFloat16>;

constexpr int KEY_STEP = HAS_BF16_DOT ? 32 : LANES;  // a block's keys are filled up to a multiple: 16 pairs for the matrix unit

// Four bytes of a packed operand: a float, or a pair of bfloat16.
#if HAS_BF16_DOT
INLINE Floats multiply_add(Floats sum, const uint32_t* broadcast, Ints operand, std::true_type) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(*broadcast), (__m512bh)operand);
}
#endif

INLINE Floats multiply_add(Floats sum, const uint32_t* broadcast, Ints operand, std::false_type) {
    float value;
    memcpy(&value, broadcast, 4);
    return sum + value * (Floats)operand;
}

constexpr int MAX_ROWS = 6;                        // with these a product's sums, operands and one broadcast fill
constexpr int MAX_COLUMNS = LANES == 16 ? 4 : 2;   // the 32 or 16 vector registers

// Products that are added to one another before their sum is added to a result: rounding errors grow with this number.
constexpr int64_t MAX_CHAIN = 64;
alignas(64) const float ONES[MAX_ROWS] = {1, 1, 1, 1, 1, 1};

// c [ROWS, COLUMNS * LANES] = c * factors (nothing, without factors) + a [ROWS, depth] @ b [depth, COLUMNS * LANES].
template <bool IS_PAIRS, int ROWS, int COLUMNS>
void multiply_tile(
    const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
    const float* factors) {
    Floats sums[ROWS][COLUMNS] = {};
    for (int64_t d = 0; d < depth; d++) {
        Ints operands[COLUMNS];
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++) operands[j] = load_raw<Ints>(b + d * b_stride + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; j++)
                sums[i][j] = multiply_add(sums[i][j], a + i * a_stride + d, operands[j], std::bool_constant<IS_PAIRS>{});
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; j++) {
            float* to = c + i * c_stride + j * LANES;
            store_raw(to, factors ? load_raw<Floats>(to) * factors[i] + sums[i][j] : sums[i][j]);
        }
}

template <bool IS_PAIRS, int ROWS, int COLUMNS>
INLINE void multiply_columns(
    const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
    const float* factors) {
    const int64_t chain = IS_PAIRS ? depth : MAX_CHAIN;  // pairs lose far more when they are rounded to bfloat16
    for (int64_t d = 0; d < depth; d += chain)
        multiply_tile<IS_PAIRS, ROWS, COLUMNS>(
            a + d, a_stride, b + d * b_stride, b_stride, std::min(chain, depth - d), c, c_stride, d ? ONES : factors);
}

template <bool IS_PAIRS, int ROWS>
void multiply_rows(
    const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t depth, int64_t width, float* c,
    int64_t c_stride, const float* factors) {
    for (; width >= MAX_COLUMNS * LANES; width -= MAX_COLUMNS * LANES, b += MAX_COLUMNS * LANES, c += MAX_COLUMNS * LANES)
        multiply_columns<IS_PAIRS, ROWS, MAX_COLUMNS>(a, a_stride, b, b_stride, depth, c, c_stride, factors);
    if constexpr (MAX_COLUMNS == 4) {
        if (width >= 2 * LANES) {
            multiply_columns<IS_PAIRS, ROWS, 2>(a, a_stride, b, b_stride, depth, c, c_stride, factors);
            width -= 2 * LANES, b += 2 * LANES, c += 2 * LANES;
        }
    }
    if (width) multiply_columns<IS_PAIRS, ROWS, 1>(a, a_stride, b, b_stride, depth, c, c_stride, factors);
}

#if HAS_BF16_DOT
// What the matrix unit's eight tiles are: each 16 rows of 64 bytes.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
#endif

INLINE void take_matrices() {
#if HAS_BF16_DOT
    if (has_matrix_unit()) {
        const TileShapes shapes;
        asm volatile("" : : "r"(&shapes) : "memory");  // gcc believes that the next instruction reads 8 bytes of it
        _tile_loadconfig(&shapes);
    }
#endif
}

// Gives the matrix unit back: torch sets it up for itself.
INLINE void release_matrices() {
#if HAS_BF16_DOT
    if (has_matrix_unit()) _tile_release();
#endif
}

// c [rows, width] = c * factors + a [rows, depth] @ b [depth, width]; rows up to CHUNK_ROWS, width a multiple of LANES.
template <bool IS_PAIRS>
void multiply(
    const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t rows, int64_t depth, int64_t width,
    float* c, int64_t c_stride, const float* factors) {
    while (rows > 0) {
        const int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS, now = (rows + tiles - 1) / tiles;
        switch (now) {
            case 1: multiply_rows<IS_PAIRS, 1>(a, a_stride, b, b_stride, depth, width, c, c_stride, factors); break;
            case 2: multiply_rows<IS_PAIRS, 2>(a, a_stride, b, b_stride, depth, width, c, c_stride, factors); break;
            case 3: multiply_rows<IS_PAIRS, 3>(a, a_stride, b, b_stride, depth, width, c, c_stride, factors); break;
            case 4: multiply_rows<IS_PAIRS, 4>(a, a_stride, b, b_stride, depth, width, c, c_stride, factors); break;
            case 5: multiply_rows<IS_PAIRS, 5>(a, a_stride, b, b_stride, depth, width, c, c_stride, factors); break;
            default: multiply_rows<IS_PAIRS, 6>(a, a_stride, b, b_stride, depth, width, c, c_stride, factors);
        }
        rows -= now, a += now * a_stride, c += now * c_stride;
        if (factors) factors += now;
    }
}

// LANES words of a row's head_size elements from word `first` on; zeros behind the row's end.
template <class T>
INLINE Ints load_words(const T* row, int64_t first, int64_t head_size) {
    if constexpr (PAIRS<T>) {
        const T* from = row + 2 * first;
        const int64_t count = head_size - 2 * first;
        if (count >= 2 * LANES) return load_raw<Ints>(from);
#if LANES == 16
        return count > 0 ? (Ints)_mm512_maskz_loadu_epi16((1u << count) - 1, from) : Ints{};
#else
        return Ints{};
#endif
    } else {
        return (Ints)load(row + first, head_size - first);
    }
}

// Swaps blocks of STEP rows and columns, for STEP = 1, 2, 4 ...: the matrix of LANES x LANES words is transposed.
template <int STEP>
INLINE void transpose(Ints (&rows)[LANES]) {
    if constexpr (STEP < LANES) {
        Ints low, high;
        for (int i = 0; i < LANES; i++) {
            low[i] = i & STEP ? LANES + i - STEP : i;
            high[i] = i & STEP ? LANES + i : i + STEP;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & STEP)) {
                const Ints a = rows[i], b = rows[i + STEP];
                rows[i] = __builtin_shuffle(a, b, low);
                rows[i + STEP] = __builtin_shuffle(a, b, high);
            }
        transpose<2 * STEP>(rows);
    }
}

// Asks for the first `count` rows of the next block while this one is worked on. The processor's own prefetching ends with
// each page, and blocks lie anywhere: without this a decode waits as long for memory as it computes.
template <class T>
INLINE void prefetch(const T* const* rows, int64_t count, int64_t head_size) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t byte = 0; byte < head_size * int64_t(sizeof(T)); byte += 64)
            _mm_prefetch(reinterpret_cast<const char*>(rows[i]) + byte, _MM_HINT_T1);
}

// packed [num_words, KEY_STRIDE]: word w of key j.
template <class T>
void pack_keys(
    const T* const* rows, const T* const* next, int64_t num_keys, int64_t head_size, int64_t num_words, uint32_t* packed) {
    for (int64_t key = 0; key < num_keys; key += LANES) {
        for (int64_t word = 0; word < num_words; word += LANES) {
            const int64_t first = word * LANES / num_words;
            prefetch(next + key + first, (word + LANES) * LANES / num_words - first, head_size);
            Ints square[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) square[i] = load_words(rows[key + i], word, head_size);
            transpose<1>(square);
            const int64_t count = std::min<int64_t>(LANES, num_words - word);
            if (count == LANES) {
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) store_raw(packed + (word + i) * KEY_STRIDE + key, square[i]);
            } else {
                for (int64_t i = 0; i < count; i++) store_raw(packed + (word + i) * KEY_STRIDE + key, square[i]);
            }
        }
    }
}

// packed [num_keys / 2, width]: columns of two keys side by side in a word; or [num_keys, width] floats.
template <class T>
void pack_values(
    const T* const* rows, const T* const* next, int64_t num_keys, int64_t head_size, int64_t width, uint32_t* packed) {
    if constexpr (PAIRS<T>) {
        typedef uint16_t Columns __attribute__((vector_size(4 * LANES)));
        Columns first, second;  // of 32 columns: where the pairs of the first 16 and of the others come from
        for (int i = 0; i < 2 * LANES; i++) {
            first[i] = i / 2 + (i & 1) * 2 * LANES;
            second[i] = first[i] + LANES;
        }
        for (int64_t key = 0; key < num_keys; key += 2, packed += width) {
            prefetch(next + key, 2, head_size);
            for (int64_t column = 0; column < head_size; column += 2 * LANES) {
                const auto even = (Columns)load_words(rows[key], column / 2, head_size);
                const auto odd = (Columns)load_words(rows[key + 1], column / 2, head_size);
                store_raw(packed + column, __builtin_shuffle(even, odd, first));
                if (column + LANES < width) store_raw(packed + column + LANES, __builtin_shuffle(even, odd, second));
            }
        }
    } else {
        for (int64_t key = 0; key < num_keys; key++, packed += width) {
            prefetch(next + key, 1, head_size);
            for (int64_t column = 0; column < head_size; column += LANES)
                store_raw(packed + column, load(rows[key] + column, head_size - column));
        }
    }
}

// One tile's memory: offsets into a thread's scratch. Scores and probabilities are those of CHUNK_ROWS rows.
struct Tile {
    uint32_t *queries, *keys, *values, *probabilities;
    float *scores, *out, *maxima, *sums, *factors, *slopes;
};

INLINE Tile tile_of(int64_t rows, int64_t num_words, int64_t width) {
    const int64_t padded = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS * CHUNK_ROWS;
    const int64_t sizes[] = {padded * num_words, num_words * KEY_STRIDE, KEYS * width, CHUNK_ROWS * KEY_STRIDE,
                             CHUNK_ROWS * KEY_STRIDE, padded * width, padded, padded, padded, padded};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    uint32_t* next = reinterpret_cast<uint32_t*>(scratch.of(4 * total));
    uint32_t* parts[10];
    for (int i = 0; i < 10; i++) parts[i] = next, next += sizes[i];
    auto floats = [&](int i) { return reinterpret_cast<float*>(parts[i]); };
    return {parts[0], parts[1], parts[2], parts[3], floats(4), floats(5), floats(6), floats(7), floats(8), floats(9)};
}

INLINE Floats bent(Floats score, float soft_cap) { return soft_cap * hyperbolic_tangent(score / soft_cap); }

// Scores times this are exponents of `power`: of 2 for pairs. Floats would lose more by rounding those than exponents of e.
template <class T>
constexpr float UNIT = PAIRS<T> ? LOG2_E : 1.0f;

// 2^x (pairs) or e^x for x <= 0, as near as T needs it; 0 where that is no normal number.
template <class T>
INLINE Floats power(Floats x) {
#if HAS_BF16_DOT
    // A cubic on the fraction in [0, 1), off by at most 7.5e-5 of the result: a twentieth of what a bfloat16 loses.
    if constexpr (PAIRS<T>) {
        const Floats f = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        Floats y = splat(0.07802452f) * f + 0.22606716f;
        y = y * f + 0.69583353f;
        y = y * f + 0.99992522f;
        return (Floats)_mm512_scalef_ps((__m512)y, (__m512)x);
    }
#endif
    return x < -87.0f ? Floats{} : exponential(x);
}

template <class T>
INLINE float power(float x) {
    return PAIRS<T> ? exp2f(x) : expf(x);
}

// Consecutive lines of memory.
struct Run {
    const char* from;
    int64_t lines;
};

// Asks for what a thread will read, in the order of memory and spread over its work: only some requests can be under way, and
// in bursts they held the work up (32/8 heads x 128 reached 0.72 of read bandwidth, not 0.80).
struct Ahead {
    std::vector<Run> runs;
    size_t next = 0;
    Run now{nullptr, 0};
    int64_t lines_behind = 0;   // of the runs behind `now`
    int64_t pace = 0, due = 0;  // lines for each call of `ask`, and those that are due, in 256ths

    void add(const char* from, int64_t bytes) {
        const auto first = reinterpret_cast<uintptr_t>(from) / 64, last = (reinterpret_cast<uintptr_t>(from) + bytes + 63) / 64;
        const char* line = reinterpret_cast<const char*>(first * 64);
        lines_behind += last - first;
        if (next < runs.size() && runs.back().from + 64 * runs.back().lines == line) {
            runs.back().lines += last - first;
            return;
        }
        if (next == runs.size()) runs.clear(), next = 0;
        runs.push_back({line, int64_t(last - first)});
    }

    int64_t lines_left() const { return now.lines + lines_behind; }

    // The next `calls` of `ask` share `lines`.
    void spread(int64_t lines, int64_t calls) { pace = calls > 0 ? (lines * 256 + calls - 1) / calls : 0; }

    __attribute__((always_inline)) void ask() {
        for (due += pace; due >= ASKED_AT_ONCE * 256;) {
            if (__builtin_expect(now.lines < ASKED_AT_ONCE, false)) {
                if (!ask_for_rest()) return;
                continue;
            }
#pragma GCC unroll 16
            for (int i = 0; i < ASKED_AT_ONCE; i++) _mm_prefetch(now.from + 64 * i, _MM_HINT_T1);
            now.from += 64 * ASKED_AT_ONCE, now.lines -= ASKED_AT_ONCE, due -= ASKED_AT_ONCE * 256;
        }
    }

    // Asks for what is left of a run and goes on to the next, if there is one.
    __attribute__((noinline)) bool ask_for_rest() {
        for (; now.lines; now.from += 64, now.lines--) _mm_prefetch(now.from, _MM_HINT_T1);
        if (next == runs.size()) {
            due = 0;
            return false;
        }
        now = runs[next++];
        lines_behind -= now.lines;
        return true;
    }
};

// Turns one row of scores into probabilities in T's packed form; keys outside [low, high) of the block are hidden. Updates the
// row's maximum and sum, and returns the factor that brings what was added up before to the new maximum. Asks ahead meanwhile.
template <class T>
INLINE float soften(
    const Layer& layer, float slope, float* scores, int64_t num_keys, int64_t low, int64_t high, int64_t distance,
    uint32_t* probabilities, float& maximum_so_far, float& sum_so_far, Ahead* ahead = nullptr) {
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    float scale = layer.scale * UNIT<T>;
    if (layer.soft_cap || layer.alibi_slopes || scale <= 0) {
        for (int64_t key = 0; key < num_keys; key += LANES) {
            Floats score = load_raw<Floats>(scores + key) * layer.scale;
            if (layer.soft_cap) score = bent(score, layer.soft_cap);
            if (layer.alibi_slopes) score += slope * __builtin_convertvector(lane + int32_t(key - distance), Floats);
            store_raw(scores + key, score * UNIT<T>);
        }
        scale = 1;
    }
    auto hide = [&](int64_t key) {
        const Ints position = lane + int32_t(key);
        const Ints is_visible = (position >= int32_t(low)) & (position < int32_t(high));
        store_raw(scores + key, is_visible ? load_raw<Floats>(scores + key) : splat(-INFINITY));
    };
    const int64_t visible = (std::max<int64_t>(low, 0) + LANES - 1) / LANES * LANES;
    for (int64_t key = 0; key < std::min(visible, num_keys); key += LANES) hide(key);
    for (int64_t key = std::max(visible, high / LANES * LANES); key < num_keys; key += LANES) hide(key);
    // Two sums and maxima, as each step waits for the one before it.
    Floats largest = load_raw<Floats>(scores), also = largest;
    int64_t key = 0;
    for (; key + 2 * LANES <= num_keys; key += 2 * LANES) {
        largest = larger(largest, load_raw<Floats>(scores + key));
        also = larger(also, load_raw<Floats>(scores + key + LANES));
    }
    if (key < num_keys) largest = larger(largest, load_raw<Floats>(scores + key));
    const float before = maximum_so_far, now = std::max(before, maximum(larger(largest, also)) * scale);
    maximum_so_far = now;
    // Nothing visible so far: any finite reference turns the hidden keys into zeros.
    const float reference = now == -INFINITY ? 0.0f : now;
    const auto soften_keys = [&](int64_t key) {
        const Floats p = power<T>(load_raw<Floats>(scores + key) * scale - reference);
        if constexpr (PAIRS<T>)
            store_raw(reinterpret_cast<uint16_t*>(probabilities) + key, narrow(p, BFloat16{}));
        else
            store_raw(probabilities + key, p);
        return p;
    };
    Floats total{}, rest{};
    for (key = 0; key + 2 * LANES <= num_keys; key += 2 * LANES) {
        if (ahead) ahead->ask();
        total += soften_keys(key);
        rest += soften_keys(key + LANES);
    }
    if (key < num_keys) total += soften_keys(key);
    total += rest;
    const float factor = before == now ? 1.0f : before == -INFINITY ? 0.0f : power<T>(before - now);
    sum_so_far = sum_so_far * factor + sum(total);
    return factor;
}

// One row's result: divided into the output, or left unfinished for `merge`.
template <class T>
INLINE void finish(
    const Layer& layer, const float* result, float maximum, float sum, int64_t token, int64_t head, float* partial, T* out) {
    const int64_t head_size = layer.head_size;
    if (partial) {
        float* to = partial + head * (head_size + 2);
        memcpy(to, result, head_size * sizeof(float));
        to[head_size] = maximum;
        to[head_size + 1] = sum;
        return;
    }
    T* to = out + (token * layer.num_heads + head) * head_size;
    const float factor = 1 / sum;
    for (int64_t i = 0; i < head_size; i += LANES) store(to + i, load_raw<Floats>(result + i) * factor, head_size - i);
}

// Where `count` tokens from position `begin` on lie for one head; those outside [begin, end) are zeros, as what the cache
// holds there may be anything.
template <class T>
INLINE void locate_each(
    const Batch& batch, const Layer& layer, const Cache& cache, int64_t seq, int64_t kv_head, int64_t begin, int64_t end,
    int64_t count, const T** keys, const T** values) {
    const int32_t* table = batch.block_tables + seq * batch.table_stride;
    const int64_t head_offset = kv_head * layer.block_size * layer.head_size;
    int64_t block = begin / layer.block_size, slot = begin % layer.block_size;
    for (int64_t i = 0; i < count; block++, slot = 0) {
        const int64_t now = std::min({layer.block_size - slot, count - i, end - begin - i});
        if (now <= 0) {
            for (; i < count; i++) keys[i] = values[i] = reinterpret_cast<const T*>(ZEROS);
            break;
        }
        const int64_t offset = table[block] * cache.stride + head_offset + slot * layer.head_size;
        const T *key = static_cast<const T*>(cache.k) + offset, *value = static_cast<const T*>(cache.v) + offset;
        for (const int64_t last = i + now; i < last; i++, key += layer.head_size, value += layer.head_size)
            keys[i] = key, values[i] = value;
    }
}

#include "paged_decode_kernel.h"
#if HAS_BF16_DOT
#include "paged_prompt_kernel.h"
#endif

template <class T>
void attend(
    const Batch& batch, const Layer& layer, const T* q, int64_t q_stride, const Cache& cache, const Item& item,
    int64_t kv_head, float* partial, T* out) {
#if HAS_BF16_DOT
    if constexpr (PAIRS<T>) {
        if (has_matrix_unit()) {
            attend_turned(batch, layer, q, q_stride, cache, item, kv_head, partial, out);
            return;
        }
    }
#endif
    const int64_t group = layer.num_heads / layer.num_kv_heads, rows = (item.last - item.first) * group;
    const int64_t head_size = layer.head_size, num_words = PAIRS<T> ? (head_size + 31) / 32 * 16 : head_size;
    const int64_t width = (head_size + LANES - 1) / LANES * LANES;
    const int64_t token = batch.query_start_loc[item.seq] + item.first;
    const int64_t num_queries = batch.query_start_loc[item.seq + 1] - batch.query_start_loc[item.seq];
    const int64_t position = batch.seq_lens[item.seq] - num_queries + item.first;
    const Tile tile = tile_of(rows, num_words, width);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t head = kv_head * group + row % group;
        const T* from = q + (token + row / group) * q_stride + head * head_size;
        float* query = reinterpret_cast<float*>(tile.queries + row * num_words);
        for (int64_t i = 0; i < num_words; i += LANES) store(query + i, (Floats)load_words(from, i, head_size), num_words - i);
        tile.slopes[row] = layer.alibi_slopes ? layer.alibi_slopes[head] : 0.0f;
        tile.maxima[row] = -INFINITY;
        tile.sums[row] = 0;
        tile.factors[row] = 0;
    }
    memset(tile.out, 0, rows * width * sizeof(float));
    const T *keys[2][KEYS], *values[2][KEYS];
    locate_each(batch, layer, cache, item.seq, kv_head, item.key_begin, item.key_end, KEYS, keys[0], values[0]);
    take_matrices();
    for (int64_t begin = item.key_begin, now = 0; begin < item.key_end; begin += KEYS, now ^= 1) {
        const int64_t next = now ^ 1;
        locate_each(batch, layer, cache, item.seq, kv_head, begin + KEYS, item.key_end, KEYS, keys[next], values[next]);
        const int64_t num_keys = (std::min<int64_t>(KEYS, item.key_end - begin) + KEY_STEP - 1) / KEY_STEP * KEY_STEP;
        pack_keys(keys[now], keys[next], num_keys, head_size, num_words, tile.keys);
        pack_values(values[now], values[next], num_keys, head_size, width, tile.values);
        for (int64_t first = 0; first < rows; first += CHUNK_ROWS) {
            const int64_t last = std::min(rows, first + CHUNK_ROWS);
            // The first row sees the earliest key of the chunk's rows, and the last one the latest.
            const int64_t low = first_visible(position + first / group, layer.window) - begin;
            const int64_t high = std::min(position + (last - 1) / group + 1, item.key_end) - begin;
            if (high <= 0 || low >= num_keys) continue;
            const int64_t seen = std::min(num_keys, (high + KEY_STEP - 1) / KEY_STEP * KEY_STEP);
            multiply<PAIRS<T>>(
                tile.queries + first * num_words, num_words, tile.keys, KEY_STRIDE, last - first, num_words, seen, tile.scores,
                KEY_STRIDE, nullptr);
            for (int64_t row = first; row < last; row++) {
                const int64_t at = position + row / group, place = (row - first) * KEY_STRIDE;
                tile.factors[row] = soften<T>(
                    layer, tile.slopes[row], tile.scores + place, seen, first_visible(at, layer.window) - begin,
                    std::min(at + 1, item.key_end) - begin, at - begin, tile.probabilities + place, tile.maxima[row],
                    tile.sums[row]);
            }
            multiply<PAIRS<T>>(
                tile.probabilities, KEY_STRIDE, tile.values, width, last - first, PAIRS<T> ? seen / 2 : seen, width,
                tile.out + first * width, width, tile.factors + first);
        }
    }
    for (int64_t row = 0; row < rows; row++)
        finish(
            layer, tile.out + row * width, tile.maxima[row], tile.sums[row], token + row / group,
            kv_head * group + row % group, partial, out);
}

// One head's unfinished results, brought to one maximum and added in the order of their keys.
template <class T>
void merge(const Layer& layer, const float* first, int64_t count, T* out) {
    const int64_t head_size = layer.head_size, stride = layer.num_heads * (head_size + 2);
    float largest = -INFINITY, total = 0;
    for (int64_t i = 0; i < count; i++) largest = std::max(largest, first[i * stride + head_size]);
    alignas(64) float result[MAX_HEAD_SIZE] = {};
    for (int64_t i = 0; i < count; i++) {
        const float* part = first + i * stride;
        const float factor = power<T>(part[head_size] - largest);
        total += factor * part[head_size + 1];
        for (int64_t j = 0; j < head_size; j++) result[j] += factor * part[j];
    }
    for (int64_t i = 0; i < head_size; i += LANES) store(out + i, load_raw<Floats>(result + i) / total, head_size - i);
}

}  // namespace

template <class T>
static void paged_attention(
    const Batch& batch, const Layer& layer, const void* q, int64_t q_stride, const Cache& cache, void* out) {
    const Work work = divide(batch, layer);
    const int64_t partial_size = layer.num_heads * (layer.head_size + 2);
    const size_t partial_bytes = work.num_partials * partial_size * sizeof(float);
    float* parts = reinterpret_cast<float*>(partials.of(partial_bytes));
    const int64_t num_items = work.items.size() * layer.num_kv_heads, num_merges = work.merges.size() * layer.num_heads;
    const bool few_heads = layer.num_heads / layer.num_kv_heads <= MAX_DECODE_ROWS;
    auto is_decode = [&](int64_t i) {
        const Item& item = work.items[i / layer.num_kv_heads];
        return few_heads && item.last - item.first == 1 && item.key_end - item.key_begin <= SPLIT;
    };
    const int64_t head_bytes = 2 * SPLIT * layer.head_size * sizeof(T);
    const int64_t heads_at_once = std::max<int64_t>(1, std::min(layer.num_kv_heads, UNIT_BYTES / head_bytes));
    std::atomic<int64_t> taken{0};
#pragma omp parallel if (work.multiply_adds > MIN_PARALLEL)
    {
        Rows<T> rows;
        Ahead ahead;
        const int64_t num_threads = omp_get_num_threads();
        const auto take = [&] {
            int64_t first = taken.load(), count;
            do {
                count = 1;
                // The last heads are taken one by one, so that all threads end at about the same time.
                if (first + num_threads + heads_at_once <= num_items && is_decode(first))
                    count = std::min(heads_at_once, layer.num_kv_heads - first % layer.num_kv_heads);
            } while (!taken.compare_exchange_weak(first, first + count));
            return Unit{first, first + count};
        };
        const auto add_ahead = [&](const Unit& unit) {
            const Item& item = work.items[unit.first / layer.num_kv_heads];
            const int64_t kv_head = unit.first % layer.num_kv_heads;
            ask_for(batch, layer, cache, item, kv_head, kv_head + unit.last - unit.first, sizeof(T), ahead);
        };
        bool is_asked_for = false;
        for (Unit unit = take(), next; unit.first < num_items; unit = next) {
            const Item& item = work.items[unit.first / layer.num_kv_heads];
            float* partial = item.partial < 0 ? nullptr : parts + item.partial * partial_size;
            const int64_t first_head = unit.first % layer.num_kv_heads;
            if (!is_decode(unit.first)) {
                attend(
                    batch, layer, static_cast<const T*>(q), q_stride, cache, item, first_head, partial, static_cast<T*>(out));
                next = take();
                is_asked_for = false;
                continue;
            }
            if (!is_asked_for) add_ahead(unit);
            // While there is enough for all threads, the next unit is taken early, so that it can be asked for.
            const bool is_early = taken + num_threads <= num_items;
            if (is_early) next = take();
            is_asked_for = is_early && next.first < num_items && is_decode(next.first);
            if (is_asked_for) add_ahead(next);
            for (int64_t left = unit.last - unit.first, kv_head = first_head; left > 0; left--, kv_head++) {
                rows.locate(batch, layer, cache, item, kv_head);
                decode(
                    batch, layer, static_cast<const T*>(q), q_stride, item, kv_head, rows, ahead, ahead.lines_left() / left,
                    partial, static_cast<T*>(out));
            }
            if (!is_early) next = take();
        }
        release_matrices();
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_merges; i++) {
            const Merge& split = work.merges[i / layer.num_heads];
            const int64_t head = i % layer.num_heads;
            T* to = static_cast<T*>(out) + (split.token * layer.num_heads + head) * layer.head_size;
            merge(layer, parts + split.partial * partial_size + head * (layer.head_size + 2), split.count, to);
        }
    }
}
