// Attention of one query token to at most SPLIT keys, included by paged_attention_kernel.h: reading the cache is what takes
// time, so keys and values are multiplied where they lie.

// Lane i gets the sum of rows[i].
template <int STEP>
INLINE Floats sums_of(Floats* rows) {
    if constexpr (STEP == LANES) {
        return rows[0];
    } else {
        Ints kept, moved;
        for (int i = 0; i < LANES; i++) {
            kept[i] = i & STEP ? LANES + i : i;
            moved[i] = i & STEP ? LANES + i - STEP : i + STEP;
        }
#pragma GCC unroll 8
        for (int i = 0; i < LANES; i += 2 * STEP)
            rows[i] = __builtin_shuffle(rows[i], rows[i + STEP], kept) + __builtin_shuffle(rows[i], rows[i + STEP], moved);
        return sums_of<2 * STEP>(rows);
    }
}

template <class T>
INLINE Floats multiply_add_words(Floats sum, Ints a, Ints b) {
#if HAS_BF16_DOT
    if constexpr (PAIRS<T>) return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    return sum + (Floats)a * (Floats)b;
}

// scores [rows, SPLIT] of LANES keys from `key` on.
template <class T>
INLINE void score_keys(
    const T* const* keys, int64_t key, const uint32_t* queries, int64_t num_words, int64_t rows, int64_t head_size,
    float* scores, Ahead& ahead) {
    const int64_t whole = head_size / (PAIRS<T> ? 2 * LANES : LANES) * LANES;
    for (int64_t row = 0; row < rows; row++, queries += num_words) {
        Floats sums[LANES] = {};
        for (int64_t word = 0; word < whole; word += LANES) {
            const auto query = load_raw<Ints>(queries + word);
            ahead.ask();
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                sums[i] = multiply_add_words<T>(sums[i], query, load_words(keys[key + i], word, INT32_MAX));
        }
        if (whole < num_words) {
            ahead.ask();
            const auto query = load_raw<Ints>(queries + whole);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                sums[i] = multiply_add_words<T>(sums[i], query, load_words(keys[key + i], whole, head_size));
        }
        store_raw(scores + row * SPLIT + key, sums_of<1>(sums));
    }
}

constexpr int PACKED_WORDS = HAS_BF16_DOT ? 4 * 16 * 64 : 0;  // 4 right operands of 32 keys and 64 elements

#if HAS_BF16_DOT
// From L2, 4 query rows took keys and values at 79 GB/s on the matrix unit (without it 37) and 3 rows at 64 (44); one row,
// whose keys alone were tried there, at 79 (106).
constexpr int MIN_MATRIX_ROWS = 3;

// Whether the matrix unit pays, each 16 keys of an item lie one after the other, and they fill its tiles.
template <class T>
INLINE bool can_take_matrices(const Layer& layer, const Item& item, int64_t rows) {
    return PAIRS<T> && has_matrix_unit() && rows >= MIN_MATRIX_ROWS && layer.block_size % 16 == 0 && item.key_begin % 16 == 0 &&
           layer.head_size % 32 == 0;
}

// score_keys for all keys on the matrix unit, 64 keys times 4 query rows at a time: the keys, CHUNK_KEYS at each address, are
// the left operand, as they lie. `turned` [num_words, 4] is memory for a right operand.
template <class T>
void score_matrices(
    const T* const* keys, int64_t num_keys, const uint32_t* queries, int64_t num_words, int64_t rows, int64_t head_size,
    uint32_t* turned, float* scores, Ahead& ahead) {
    TileShapes shapes;  // 0 to 3: sums [16 keys, 4 rows]; 4 to 7: keys, then the queries of 32 elements
    for (int tile : {0, 1, 2, 3, 7}) shapes.row_bytes[tile] = 16;
    asm volatile("" : : "r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
    alignas(64) float sums[64 * 4];
    Ints from;  // the first row's scores of 8 keys in two vectors of 4 keys times 4 rows
    for (int i = 0; i < LANES; i++) from[i] = i % 8 * 4;
    const int64_t stride = head_size * sizeof(T);
    for (int64_t first = 0; first < rows; first += 4) {
        for (int64_t word = 0; word < num_words; word++)
            for (int64_t row = 0; row < 4; row++)
                turned[4 * word + row] = first + row < rows ? queries[(first + row) * num_words + word] : 0;
        for (int64_t key = 0; key < num_keys; key += 64) {
            const int64_t count = std::min<int64_t>(4, (num_keys - key + 15) / 16);
            const T* const* chunks = keys + key / CHUNK_KEYS;
            asm volatile("" : : : "memory");
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t word = 0; word < num_words; word += 16) {
                _tile_loadd(7, turned + 4 * word, 16);
                _tile_loadd(4, chunks[0] + 2 * word, stride);
                _tile_dpbf16ps(0, 4, 7);
                ahead.ask();
                if (count > 1) {
                    _tile_loadd(5, chunks[1] + 2 * word, stride);
                    _tile_dpbf16ps(1, 5, 7);
                    ahead.ask();
                }
                if (count > 2) {
                    _tile_loadd(6, chunks[2] + 2 * word, stride);
                    _tile_dpbf16ps(2, 6, 7);
                    ahead.ask();
                }
                if (count > 3) {
                    _tile_loadd(4, chunks[3] + 2 * word, stride);
                    _tile_dpbf16ps(3, 4, 7);
                    ahead.ask();
                }
            }
            _tile_stored(0, sums, 16);
            if (count > 1) _tile_stored(1, sums + 64, 16);
            if (count > 2) _tile_stored(2, sums + 128, 16);
            if (count > 3) _tile_stored(3, sums + 192, 16);
            asm volatile("" : : : "memory");
            for (int64_t i = 0; i < count; i++) {
                const float* sum = sums + 64 * i;
                const auto a = load_raw<Floats>(sum), b = load_raw<Floats>(sum + 16), c = load_raw<Floats>(sum + 32),
                           d = load_raw<Floats>(sum + 48);
                for (int row = 0; row < 4 && first + row < rows; row++) {
                    const Ints place = from + row;
                    const auto low = __builtin_shuffle(a, b, place), high = __builtin_shuffle(c, d, place);
                    store_raw(
                        scores + (first + row) * SPLIT + key + 16 * i,
                        (Floats)_mm512_shuffle_f32x4((__m512)low, (__m512)high, 0x44));
                }
            }
        }
    }
}

// add_values for all keys on the matrix unit, 32 keys times 64 elements (IS_WIDE) or 32 at a time; out [rows, width] in the
// same order of columns. `packed` is memory for a right operand of 4 steps, so that one is filled while others are multiplied.
template <bool IS_WIDE, class T>
INLINE void add_value_columns(
    const T* const* values, int64_t num_keys, const uint32_t* probabilities, int64_t column, int64_t head_size,
    uint32_t* packed, float* out, int64_t width, Ahead& ahead) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t key = 0; key < num_keys; key += 32) {
        uint32_t* operand = packed + key / 32 % 4 * (16 * 64);
        for (int64_t chunk = 0; chunk < 2; chunk++) {
            const T* from = values[key / CHUNK_KEYS + chunk] + column;
            uint32_t* to = operand + chunk * 8 * 64;
#pragma GCC unroll 8
            for (int pair = 0; pair < 8; pair++, from += 2 * head_size, to += 64) {
                if (pair % 4 == 0) ahead.ask();
#pragma GCC unroll 2
                for (int half = 0; half <= IS_WIDE; half++) {
                    const auto even = load_raw<__m512i>(from + 32 * half);
                    const auto odd = load_raw<__m512i>(from + head_size + 32 * half);
                    store_raw(to + 32 * half, _mm512_unpacklo_epi16(even, odd));
                    store_raw(to + 32 * half + 16, _mm512_unpackhi_epi16(even, odd));
                }
            }
        }
        asm volatile("" : : : "memory");
        _tile_loadd(4, probabilities + key / 2, 4 * SPLIT);
        _tile_loadd(5, operand, 256);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, operand + 16, 256);
        _tile_dpbf16ps(1, 4, 6);
        if (IS_WIDE) {
            _tile_loadd(5, operand + 32, 256);
            _tile_dpbf16ps(2, 4, 5);
            _tile_loadd(6, operand + 48, 256);
            _tile_dpbf16ps(3, 4, 6);
        }
    }
    _tile_stored(0, out + column, 4 * width);
    _tile_stored(1, out + column + 16, 4 * width);
    if (IS_WIDE) {
        _tile_stored(2, out + column + 32, 4 * width);
        _tile_stored(3, out + column + 48, 4 * width);
    }
}

template <class T>
void add_value_matrices(
    const T* const* values, int64_t num_keys, const uint32_t* probabilities, int64_t rows, int64_t head_size, uint32_t* packed,
    float* out, int64_t width, Ahead& ahead) {
    TileShapes shapes;  // 0 to 3: sums [rows, 16]; 4: probabilities of 32 keys; 5 and 6: values
    for (int tile : {0, 1, 2, 3, 4}) shapes.rows[tile] = rows;
    asm volatile("" : : "r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
    for (int64_t column = 0; column < head_size; column += 64) {
        if (column + 32 < head_size)
            add_value_columns<true>(values, num_keys, probabilities, column, head_size, packed, out, width, ahead);
        else
            add_value_columns<false>(values, num_keys, probabilities, column, head_size, packed, out, width, ahead);
    }
    asm volatile("" : : : "memory");
}
#endif

// Vectors of one step over a value's elements, and elements in them.
constexpr int VALUE_VECTORS = LANES == 16 ? 4 : 2;
constexpr int VALUE_STEP = VALUE_VECTORS * LANES;

// out [ROWS, VALUE_STEP] += probabilities [ROWS, num_keys] @ values [num_keys, VALUE_STEP], those from `column` on. Pairs leave
// the columns of out in the order of the unpacking instructions.
template <class T, int ROWS, bool IS_WHOLE>
INLINE void add_values(
    const T* const* values, int64_t num_keys, const uint32_t* probabilities, int64_t column, int64_t head_size, float* out,
    int64_t width, Ahead& ahead) {
    Floats sums[ROWS][VALUE_VECTORS] = {};
#if HAS_BF16_DOT
    if constexpr (PAIRS<T>) {
        for (int64_t pair = 0; pair < num_keys / 2; pair++) {
            ahead.ask();
            Ints operands[VALUE_VECTORS];
#pragma GCC unroll 2
            for (int j = 0; j < VALUE_VECTORS; j += 2) {
                const int64_t word = column / 2 + j * LANES / 2, size = IS_WHOLE ? int64_t(INT32_MAX) : head_size;
                const auto even = (__m512i)load_words(values[2 * pair], word, size);
                const auto odd = (__m512i)load_words(values[2 * pair + 1], word, size);
                operands[j] = (Ints)_mm512_unpacklo_epi16(even, odd);
                operands[j + 1] = (Ints)_mm512_unpackhi_epi16(even, odd);
            }
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
                for (int j = 0; j < VALUE_VECTORS; j++)
                    sums[i][j] = multiply_add(sums[i][j], probabilities + i * SPLIT + pair, operands[j], std::true_type{});
        }
    }
#endif
    if constexpr (!PAIRS<T>) {
        for (int64_t key = 0; key < num_keys; key++) {
            ahead.ask();
            Ints operands[VALUE_VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VALUE_VECTORS; j++) {
                const int64_t first = column + j * LANES;
                operands[j] = IS_WHOLE || first < head_size
                                  ? (Ints)load(values[key] + first, IS_WHOLE ? LANES : head_size - first)
                                  : Ints{};
            }
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
                for (int j = 0; j < VALUE_VECTORS; j++)
                    sums[i][j] = multiply_add(sums[i][j], probabilities + i * SPLIT + key, operands[j], std::false_type{});
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < VALUE_VECTORS; j++) {
            float* to = out + i * width + column + j * LANES;
            store_raw(to, load_raw<Floats>(to) + sums[i][j]);
        }
}

template <class T, int ROWS>
INLINE void add_value_rows(
    const T* const* values, int64_t num_keys, const uint32_t* probabilities, int64_t head_size, float* out, int64_t width,
    Ahead& ahead) {
    for (int64_t column = 0; column < head_size; column += VALUE_STEP) {
        if (column + VALUE_STEP <= head_size)
            add_values<T, ROWS, true>(values, num_keys, probabilities, column, head_size, out, width, ahead);
        else
            add_values<T, ROWS, false>(values, num_keys, probabilities, column, head_size, out, width, ahead);
    }
}

// Puts columns that were left in the order of the unpacking instructions into their own.
template <class T>
INLINE void order_columns(float* row, int64_t width) {
    if constexpr (PAIRS<T>) {
        Ints first, second;
        for (int i = 0; i < LANES; i++) {
            first[i] = i / 8 * 4 + i % 4 + (i & 4 ? LANES : 0);
            second[i] = first[i] + LANES / 2;
        }
        for (int64_t column = 0; column < width; column += 2 * LANES) {
            const auto low = load_raw<Floats>(row + column), high = load_raw<Floats>(row + column + LANES);
            store_raw(row + column, __builtin_shuffle(low, high, first));
            store_raw(row + column + LANES, __builtin_shuffle(low, high, second));
        }
    }
}

// Where the keys and values of one item and KV head lie: each of them, or for the matrix unit each CHUNK_KEYS.
template <class T>
struct Rows {
    const T *keys[SPLIT], *values[SPLIT];
    bool is_in_chunks;
    int64_t num_keys;
    alignas(64) T padded[2 * CHUNK_KEYS * MAX_HEAD_SIZE];

    void locate(const Batch& batch, const Layer& layer, const Cache& cache, const Item& item, int64_t kv_head) {
        num_keys = item.key_end - item.key_begin;
        is_in_chunks = false;
#if HAS_BF16_DOT
        is_in_chunks = can_take_matrices<T>(layer, item, layer.num_heads / layer.num_kv_heads);
#endif
        if (!is_in_chunks) {
            const int64_t filled = (num_keys + KEY_STEP - 1) / KEY_STEP * KEY_STEP;
            locate_each(batch, layer, cache, item.seq, kv_head, item.key_begin, item.key_end, filled, keys, values);
            return;
        }
        const int32_t* table = batch.block_tables + item.seq * batch.table_stride;
        for (int64_t key = item.key_begin, i = 0; key < item.key_end; key += CHUNK_KEYS, i++) {
            const int64_t row = kv_head * layer.block_size + key % layer.block_size;
            const int64_t offset = table[key / layer.block_size] * cache.stride + row * layer.head_size;
            keys[i] = static_cast<const T*>(cache.k) + offset;
            values[i] = static_cast<const T*>(cache.v) + offset;
        }
    }

    // Values in chunks are multiplied 32 at a time: zeros stand for those behind the last; the cache may hold anything there.
    void pad_values(int64_t head_size) {
        const int64_t whole = num_keys / CHUNK_KEYS, left = num_keys % CHUNK_KEYS, size = CHUNK_KEYS * head_size;
        if (left) {
            memcpy(padded, values[whole], left * head_size * sizeof(T));
            memset(padded + left * head_size, 0, (CHUNK_KEYS - left) * head_size * sizeof(T));
            values[whole] = padded;
        }
        if ((whole + (left > 0)) % 2) {
            memset(padded + size, 0, size * sizeof(T));
            values[whole + (left > 0)] = padded + size;
        }
    }
};

// Asks for the keys and values of an item's heads [first_head, last_head): block by block, as they lie. A block that is not
// whole is asked for head by head.
INLINE void ask_for(
    const Batch& batch, const Layer& layer, const Cache& cache, const Item& item, int64_t first_head, int64_t last_head,
    int64_t element, Ahead& ahead) {
    const int32_t* table = batch.block_tables + item.seq * batch.table_stride;
    const int64_t row = layer.head_size * element, head = layer.block_size * row;
    for (int64_t key = item.key_begin, end; key < item.key_end; key = end) {
        end = std::min(key - key % layer.block_size + layer.block_size, item.key_end);
        const int64_t offset = table[key / layer.block_size] * cache.stride * element + key % layer.block_size * row;
        const bool is_whole = end - key == layer.block_size;
        for (const void* part : {cache.k, cache.v}) {
            const char* from = static_cast<const char*>(part) + offset + first_head * head;
            if (is_whole)
                ahead.add(from, (last_head - first_head) * head);
            else
                for (int64_t i = first_head; i < last_head; i++, from += head) ahead.add(from, (end - key) * row);
        }
    }
}

// Asks for `lines` of what is `ahead` meanwhile.
template <class T>
void decode(
    const Batch& batch, const Layer& layer, const T* q, int64_t q_stride, const Item& item, int64_t kv_head,
    Rows<T>& rows, Ahead& ahead, int64_t lines, float* partial, T* out) {
    const int64_t group = layer.num_heads / layer.num_kv_heads, head_size = layer.head_size;
    const int64_t words_of_head = PAIRS<T> ? (head_size + 1) / 2 : head_size;
    const int64_t num_words = (words_of_head + LANES - 1) / LANES * LANES;
    const int64_t width = (head_size + VALUE_STEP - 1) / VALUE_STEP * VALUE_STEP;
    const int64_t token = batch.query_start_loc[item.seq] + item.first, first_head = kv_head * group;
    const int64_t num_keys = item.key_end - item.key_begin, filled = (num_keys + KEY_STEP - 1) / KEY_STEP * KEY_STEP;
    uint32_t* queries = reinterpret_cast<uint32_t*>(scratch.of(4 * (PACKED_WORDS + group * (num_words + 2 * SPLIT + width))));
    uint32_t* packed = queries + group * num_words;
    uint32_t* probabilities = packed + PACKED_WORDS;
    float* scores = reinterpret_cast<float*>(probabilities + group * SPLIT);
    float* results = scores + group * SPLIT;
    for (int64_t row = 0; row < group; row++) {
        const T* from = q + token * q_stride + (first_head + row) * head_size;
        for (int64_t word = 0; word < num_words; word += LANES)
            store_raw(queries + row * num_words + word, load_words(from, word, head_size));
    }
    float maxima[MAX_DECODE_ROWS], sums[MAX_DECODE_ROWS];
    const int64_t score_lines = lines * SCORE_PERCENT / 100, soften_lines = lines * SOFTEN_PERCENT / 100;
    auto soften_rows = [&] {
        ahead.spread(soften_lines, group * (filled / (2 * LANES)));
        for (int64_t row = 0; row < group; row++) {
            maxima[row] = -INFINITY;
            sums[row] = 0;
            const float slope = layer.alibi_slopes ? layer.alibi_slopes[first_head + row] : 0.0f;
            const int64_t distance = batch.seq_lens[item.seq] - 1 - item.key_begin;
            soften<T>(
                layer, slope, scores + row * SPLIT, filled, 0, num_keys, distance, probabilities + row * SPLIT, maxima[row],
                sums[row], &ahead);
        }
    };
    auto finish_rows = [&] {
        for (int64_t row = 0; row < group; row++) {
            order_columns<T>(results + row * width, width);
            finish(layer, results + row * width, maxima[row], sums[row], token, first_head + row, partial, out);
        }
    };
#if HAS_BF16_DOT
    if (rows.is_in_chunks) {
        ahead.spread(score_lines, (group + 3) / 4 * (num_words / 16) * (num_keys + 15) / 16);
        score_matrices(rows.keys, num_keys, queries, num_words, group, head_size, packed, scores, ahead);
        soften_rows();
        rows.pad_values(head_size);
        ahead.spread(lines - score_lines - soften_lines, (head_size + 63) / 64 * (filled / 8));
        add_value_matrices(rows.values, filled, probabilities, group, head_size, packed, results, width, ahead);
        finish_rows();
        return;
    }
#endif
    ahead.spread(score_lines, group * num_words / LANES * filled / LANES);
    for (int64_t key = 0; key < filled; key += LANES)
        score_keys(rows.keys, key, queries, num_words, group, head_size, scores, ahead);
    soften_rows();
    ahead.spread(lines - score_lines - soften_lines, (group + 3) / 4 * (width / VALUE_STEP) * filled / (PAIRS<T> ? 2 : 1));
    memset(results, 0, group * width * sizeof(float));
    for (int64_t key = 0; key < filled; key += MAX_CHAIN) {
        const int64_t now = std::min(MAX_CHAIN, filled - key);
        const T* const* some = rows.values + key;
        for (int64_t row = 0; row < group; row += 4) {
            const uint32_t* from = probabilities + row * SPLIT + (PAIRS<T> ? key / 2 : key);
            float* to = results + row * width;
            switch (std::min<int64_t>(4, group - row)) {
                case 1: add_value_rows<T, 1>(some, now, from, head_size, to, width, ahead); break;
                case 2: add_value_rows<T, 2>(some, now, from, head_size, to, width, ahead); break;
                case 3: add_value_rows<T, 3>(some, now, from, head_size, to, width, ahead); break;
                default: add_value_rows<T, 4>(some, now, from, head_size, to, width, ahead);
            }
        }
    }
    finish_rows();
}
