// Attention of a prompt's chunk on the matrix unit, included by paged_attention_kernel.h. All of it is turned: scores are
// [keys, rows], keys as they lie times queries on their side, and so are results, values on their side times probabilities. A
// vector then holds 16 rows' scores of one key: greatest scores, sums and factors are vectors, and nothing is added across one.
//
// 16 rows at a time meet a block of MATRIX_KEYS keys. Vectors and the unit take turns, as they do not work at once: 8 products
// and 128 vectors of exponentials took 43 and 161 ns, 204 one after the other, and 257 product by product between them.

constexpr int TILE_WORDS = 16 * 16;  // a tile of the matrix unit: 16 rows of 64 bytes
constexpr int STEP_KEYS = 32;        // a tile of values or probabilities
// A row's reference, which its scores are taken relative to, follows its greatest score only when that is 2^8 times as much:
// results need not be multiplied by a factor for each new maximum, and floats lose nothing.
constexpr float MAX_ABOVE_REFERENCE = 8;

// Memory of one item, in tiles: each 16 rows of queries, keys and turned values lie as the unit reads them. Probabilities and
// scores are [keys, 16 rows].
struct TurnedTile {
    uint32_t *queries, *keys, *values, *probabilities;
    float *scores, *out, *references, *sums, *slopes;
    int32_t* positions;
};

INLINE TurnedTile turned_tile_of(int64_t row_tiles, int64_t key_parts, int64_t value_tiles) {
    const int64_t sizes[] = {row_tiles * key_parts * TILE_WORDS, MATRIX_KEYS / 16 * key_parts * TILE_WORDS,
                             MATRIX_KEYS / STEP_KEYS * value_tiles * TILE_WORDS, MATRIX_KEYS / STEP_KEYS * TILE_WORDS,
                             MATRIX_KEYS * 16, row_tiles * value_tiles * TILE_WORDS, row_tiles * 16, row_tiles * 16,
                             row_tiles * 16, row_tiles * 16};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    uint32_t* next = reinterpret_cast<uint32_t*>(scratch.of(4 * total));
    uint32_t* parts[10];
    for (int i = 0; i < 10; i++) parts[i] = next, next += sizes[i];
    auto floats = [&](int i) { return reinterpret_cast<float*>(parts[i]); };
    return {parts[0], parts[1], parts[2], parts[3], floats(4), floats(5), floats(6), floats(7), floats(8),
            reinterpret_cast<int32_t*>(parts[9])};
}

// Keys as they lie, 16 keys times 32 elements a tile.
INLINE void copy_keys(
    const BFloat16* const* rows, int64_t num_keys, int64_t head_size, int64_t key_parts, uint32_t* tiles) {
    for (int64_t key = 0; key < num_keys; key++) {
        uint32_t* to = tiles + key / 16 * key_parts * TILE_WORDS + key % 16 * 16;
        for (int64_t part = 0; part < key_parts; part++)
            store_raw(to + part * TILE_WORDS, load_words(rows[key], 16 * part, head_size));
    }
}

// Values on their side, 16 elements times 32 keys a tile.
INLINE void turn_values(
    const BFloat16* const* rows, int64_t num_keys, int64_t head_size, int64_t value_tiles, uint32_t* tiles) {
    for (int64_t key = 0; key < num_keys; key += STEP_KEYS) {
        for (int64_t tile = 0; tile < value_tiles; tile += 2) {
            Ints low[LANES], high[LANES];  // pairs of keys side by side, of elements 0 to 3, 8 to 11 ... and of the others
#pragma GCC unroll 16
            for (int pair = 0; pair < 16; pair++) {
                const auto even = (__m512i)load_words(rows[key + 2 * pair], 8 * tile, head_size);
                const auto odd = (__m512i)load_words(rows[key + 2 * pair + 1], 8 * tile, head_size);
                low[pair] = (Ints)_mm512_unpacklo_epi16(even, odd);
                high[pair] = (Ints)_mm512_unpackhi_epi16(even, odd);
            }
            transpose<1>(low);
            transpose<1>(high);
            uint32_t* to = tiles + (key / STEP_KEYS * value_tiles + tile) * TILE_WORDS;
            const int64_t elements = 16 * std::min<int64_t>(2, value_tiles - tile);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const int64_t element = i / 4 * 8 + i % 4;
                if (element >= elements) break;
                store_raw(to + element * 16, low[i]);
                store_raw(to + (element + 4) * 16, high[i]);
            }
        }
    }
}

// Queries on their side, 32 elements (pairs side by side) times 16 rows a tile; zeros behind the last row.
INLINE void turn_queries(
    const BFloat16* q, int64_t q_stride, int64_t group, int64_t head_size, int64_t rows, int64_t key_parts, uint32_t* tiles) {
    for (int64_t first = 0, head = 0; first < rows; first += 16, tiles += key_parts * TILE_WORDS) {
        const BFloat16* from[16];
        for (int64_t i = 0; i < 16; i++) {
            from[i] = first + i < rows ? q + head * head_size : reinterpret_cast<const BFloat16*>(ZEROS);
            if (++head == group) head = 0, q += q_stride;
        }
        for (int64_t part = 0; part < key_parts; part++) {
            Ints square[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) square[i] = load_words(from[i], 16 * part, head_size);
            transpose<1>(square);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) store_raw(tiles + part * TILE_WORDS + i * 16, square[i]);
        }
    }
}

// scores [keys, 16 rows] of a block's first `key_tiles` times 16 keys. A sum waits 52 cycles for the one before it: four are
// under way.
INLINE void score_tiles(
    const uint32_t* queries, const uint32_t* keys, int64_t key_tiles, int64_t key_parts, float* scores) {
    const int64_t stride = key_parts * TILE_WORDS;
    for (; key_tiles > 0; key_tiles -= 4, keys += 4 * stride, scores += 4 * TILE_WORDS) {
        const bool is_wide = key_tiles > 2;  // there are always two
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t part = 0; part < key_parts; part++) {
            const uint32_t* from = keys + part * TILE_WORDS;
            _tile_loadd(6, queries + part * TILE_WORDS, 64);
            _tile_loadd(4, from, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, from + stride, 64);
            _tile_dpbf16ps(1, 5, 6);
            if (is_wide) {
                _tile_loadd(4, from + 2 * stride, 64);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(5, from + 3 * stride, 64);
                _tile_dpbf16ps(3, 5, 6);
            }
        }
        _tile_stored(0, scores, 64);
        _tile_stored(1, scores + TILE_WORDS, 64);
        if (is_wide) _tile_stored(2, scores + 2 * TILE_WORDS, 64);
        if (is_wide) _tile_stored(3, scores + 3 * TILE_WORDS, 64);
    }
}

// out [elements, 16 rows], `count` (up to 4) tiles of it, = what it was (nothing, if it is fresh) + values times probabilities.
INLINE void add_value_tiles(
    const uint32_t* values, const uint32_t* probabilities, int64_t steps, int64_t count, int64_t value_tiles, bool is_fresh,
    float* out) {
    if (is_fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, out, 64);
        if (count > 1) _tile_loadd(1, out + TILE_WORDS, 64);
        if (count > 2) _tile_loadd(2, out + 2 * TILE_WORDS, 64);
        if (count > 3) _tile_loadd(3, out + 3 * TILE_WORDS, 64);
    }
    for (; steps; steps--, values += value_tiles * TILE_WORDS, probabilities += TILE_WORDS) {
        _tile_loadd(6, probabilities, 64);
        _tile_loadd(4, values, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (count > 1) {
            _tile_loadd(5, values + TILE_WORDS, 64);
            _tile_dpbf16ps(1, 5, 6);
        }
        if (count > 2) {
            _tile_loadd(4, values + 2 * TILE_WORDS, 64);
            _tile_dpbf16ps(2, 4, 6);
        }
        if (count > 3) {
            _tile_loadd(5, values + 3 * TILE_WORDS, 64);
            _tile_dpbf16ps(3, 5, 6);
        }
    }
    _tile_stored(0, out, 64);
    if (count > 1) _tile_stored(1, out + TILE_WORDS, 64);
    if (count > 2) _tile_stored(2, out + 2 * TILE_WORDS, 64);
    if (count > 3) _tile_stored(3, out + 3 * TILE_WORDS, 64);
}

// Two to the power of x, and half of the last digit that a bfloat16 of it has: where the other digits are cut off, it is
// rounded. The same cubic as in `power`.
INLINE Floats power_to_cut(Floats x) {
    const Floats f = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Floats y = splat(0.07802452f) * f + 0.22606716f;
    y = y * f + 0.69583353f;
    y = y * f + (0.99992522f + 0x1p-8f);
    return (Floats)_mm512_scalef_ps((__m512)y, (__m512)x);
}

// Probabilities of a step, pairs of keys side by side, as the unit reads them.
INLINE void soften_step(
    const float* scores, uint32_t* probabilities, float scale, Floats reference, Floats& sum, Floats& also) {
    const auto ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; pair++) {
        const Floats even = power_to_cut(load_raw<Floats>(scores + 32 * pair) * scale - reference);
        const Floats odd = power_to_cut(load_raw<Floats>(scores + 32 * pair + 16) * scale - reference);
        const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)even, 16), (__m512i)odd);
        store_raw(probabilities + 16 * pair, both);
        Floats& to = pair % 2 ? also : sum;
        to = (Floats)_mm512_dpbf16_ps((__m512)to, (__m512bh)both, ones);
    }
}

// Scores of 16 rows with cap and slopes, in exponents of 2; those that are hidden, minus infinity; and the rows' greatest.
INLINE Floats look_over(
    const Layer& layer, float* scores, int64_t num_keys, int64_t begin, const int32_t* row_positions, const float* row_slopes,
    float& scale) {
    const int64_t first_position = row_positions[0], last_position = row_positions[15];
    const auto positions = load_raw<Ints>(row_positions);
    const auto slopes = load_raw<Floats>(row_slopes);
    scale = layer.scale * LOG2_E;
    if (layer.soft_cap || layer.alibi_slopes || scale <= 0) {
        for (int64_t key = 0; key < num_keys; key++) {
            Floats score = load_raw<Floats>(scores + 16 * key) * layer.scale;
            if (layer.soft_cap) score = bent(score, layer.soft_cap);
            if (layer.alibi_slopes) score += slopes * __builtin_convertvector(int32_t(begin + key) - positions, Floats);
            store_raw(scores + 16 * key, score * LOG2_E);
        }
        scale = 1;
    }
    Floats largest[4];
    for (Floats& each : largest) each = splat(-INFINITY);
    for (int64_t step = 0; step < num_keys; step += STEP_KEYS) {
        const bool is_late = begin + step + STEP_KEYS - 1 > first_position;
        const bool is_early = layer.window && begin + step <= last_position - layer.window;
        if (is_late || is_early) {
            for (int64_t key = step; key < step + STEP_KEYS; key++) {
                Ints is_visible = positions >= int32_t(begin + key);
                if (is_early) is_visible &= positions - int32_t(layer.window) < int32_t(begin + key);
                store_raw(scores + 16 * key, is_visible ? load_raw<Floats>(scores + 16 * key) : splat(-INFINITY));
            }
        }
#pragma GCC unroll 32
        for (int64_t i = 0; i < STEP_KEYS; i++)
            largest[i % 4] = larger(largest[i % 4], load_raw<Floats>(scores + 16 * (step + i)));
    }
    return larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])) * scale;
}

// Results of 16 rows (null: there is none): divided by their sums, turned and rounded, 32 elements at a time.
INLINE void write_rows(
    const float* results, Floats sums, int64_t value_tiles, int64_t head_size, BFloat16* const* out) {
    const Floats factors = 1.0f / sums;
    typedef uint16_t Halves __attribute__((vector_size(4 * LANES)));
    Halves pairs;  // of elements side by side
    for (int i = 0; i < 2 * LANES; i++) pairs[i] = i / 2 + (i & 1) * LANES;
    for (int64_t tile = 0; tile < value_tiles; tile += 2, results += 2 * TILE_WORDS) {
        Ints square[LANES];
        const bool is_whole = tile + 1 < value_tiles;
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            if (i >= 8 && !is_whole) {
                square[i] = Ints{};
                continue;
            }
            const Floats even = load_raw<Floats>(results + 32 * i) * factors;
            const Floats odd = load_raw<Floats>(results + 32 * i + 16) * factors;
            const auto both = (Halves)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
            square[i] = (Ints)__builtin_shuffle(both, pairs);
        }
        transpose<1>(square);
        const int64_t count = std::min<int64_t>(32, head_size - 16 * tile);
        const __mmask32 mask = count == 32 ? ~0u : (1u << count) - 1;
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            if (out[i]) _mm512_mask_storeu_epi16(out[i] + 16 * tile, mask, (__m512i)square[i]);
        }
    }
}

INLINE void attend_turned(
    const Batch& batch, const Layer& layer, const BFloat16* q, int64_t q_stride, const Cache& cache, const Item& item,
    int64_t kv_head, float* partial, BFloat16* out) {
    const int64_t group = layer.num_heads / layer.num_kv_heads, rows = (item.last - item.first) * group;
    const int64_t head_size = layer.head_size, key_parts = (head_size + 31) / 32, value_tiles = (head_size + 15) / 16;
    const int64_t row_tiles = (rows + 15) / 16;
    const int64_t token = batch.query_start_loc[item.seq] + item.first, first_head = kv_head * group;
    const int64_t num_queries = batch.query_start_loc[item.seq + 1] - batch.query_start_loc[item.seq];
    const int64_t position = batch.seq_lens[item.seq] - num_queries + item.first;
    const TurnedTile tile = turned_tile_of(row_tiles, key_parts, value_tiles);
    turn_queries(q + token * q_stride + first_head * head_size, q_stride, group, head_size, rows, key_parts, tile.queries);
    for (int64_t i = 0, at = position, head = 0; i < 16 * row_tiles; i++) {
        tile.positions[i] = std::min(at, item.key_end - 1);
        tile.slopes[i] = layer.alibi_slopes ? layer.alibi_slopes[first_head + head] : 0.0f;
        if (++head == group) head = 0, at++;
        tile.references[i] = -INFINITY;
        tile.sums[i] = 0;
    }
    const BFloat16 *keys[2][MATRIX_KEYS], *values[2][MATRIX_KEYS];
    locate_each(batch, layer, cache, item.seq, kv_head, item.key_begin, item.key_end, MATRIX_KEYS, keys[0], values[0]);
    take_matrices();
    for (int64_t begin = item.key_begin, now = 0; begin < item.key_end; begin += MATRIX_KEYS, now ^= 1) {
        const int64_t next = now ^ 1, end = begin + MATRIX_KEYS;
        locate_each(batch, layer, cache, item.seq, kv_head, end, item.key_end, MATRIX_KEYS, keys[next], values[next]);
        const int64_t num_steps = (std::min<int64_t>(MATRIX_KEYS, item.key_end - begin) + STEP_KEYS - 1) / STEP_KEYS;
        copy_keys(keys[now], num_steps * STEP_KEYS, head_size, key_parts, tile.keys);
        turn_values(values[now], num_steps * STEP_KEYS, head_size, value_tiles, tile.values);
        // Steps that 16 rows see of the block: up to the last one's position.
        const auto steps_of = [&](int64_t i) {
            if (i >= row_tiles || first_visible(tile.positions[16 * i], layer.window) >= end) return int64_t(0);
            const int64_t seen = tile.positions[16 * i + 15] + 1 - begin;
            return seen <= 0 ? int64_t(0) : std::min(num_steps, (seen + STEP_KEYS - 1) / STEP_KEYS);
        };
        int64_t first = 0;
        while (first < row_tiles && !steps_of(first)) first++;
        const auto score = [&](int64_t i) __attribute__((always_inline)) {
            asm volatile("" : : : "memory");  // nor does gcc know that tiles are loaded from memory
            score_tiles(tile.queries + i * key_parts * TILE_WORDS, tile.keys, 2 * steps_of(i), key_parts, tile.scores);
        };
        // The next block is asked for bit by bit: in one go it would take as long as it takes to come.
        int64_t num_asked = 0;
        const int64_t asked_at_once = (MATRIX_KEYS + row_tiles - first - 1) / (row_tiles - first);
        score(first);
        for (int64_t i = first, steps; (steps = steps_of(i)); i++) {
            float* results = tile.out + i * value_tiles * TILE_WORDS;
            asm volatile("" : : : "memory");
            float scale;
            const Floats largest = look_over(
                layer, tile.scores, steps * STEP_KEYS, begin, tile.positions + 16 * i, tile.slopes + 16 * i, scale);
            Floats reference = load_raw<Floats>(tile.references + 16 * i), sum = load_raw<Floats>(tile.sums + 16 * i);
            const bool is_fresh = first_visible(tile.positions[16 * i], layer.window) >= begin;  // the first block they see
            const Ints is_above = largest > reference + MAX_ABOVE_REFERENCE;
            if (bits_of(is_above)) {
                const Floats before = reference;
                reference = is_above ? largest : before;
                store_raw(tile.references + 16 * i, reference);
                if (!is_fresh) {
                    const Floats factor = is_above ? power<BFloat16>(before - reference) : splat(1.0f);
                    sum *= factor;
                    for (int64_t j = 0; j < value_tiles * TILE_WORDS; j += 16)
                        store_raw(results + j, load_raw<Floats>(results + j) * factor);
                }
            }
            // Nothing visible so far: any finite reference turns the hidden keys into zeros.
            reference = reference == -INFINITY ? Floats{} : reference;
            const int64_t now_asked = std::min(asked_at_once, MATRIX_KEYS - num_asked);
            prefetch(keys[next] + num_asked, now_asked, head_size);
            prefetch(values[next] + num_asked, now_asked, head_size);
            num_asked += now_asked;
            Floats also{};
            for (int64_t step = 0; step < steps; step++)
                soften_step(
                    tile.scores + 2 * step * TILE_WORDS, tile.probabilities + step * TILE_WORDS, scale, reference, sum, also);
            store_raw(tile.sums + 16 * i, sum + also);
            score(i + 1);
            for (int64_t done = 0; done < value_tiles; done += 4)
                add_value_tiles(
                    tile.values + done * TILE_WORDS, tile.probabilities, steps, std::min<int64_t>(4, value_tiles - done),
                    value_tiles, is_fresh, results + done * TILE_WORDS);
        }
        asm volatile("" : : : "memory");
    }
    for (int64_t i = 0, at = token, head = 0; i < row_tiles; i++) {
        const float* results = tile.out + i * value_tiles * TILE_WORDS;
        BFloat16* to[16];
        for (int64_t row = 16 * i; row < 16 * i + 16; row++) {
            to[row % 16] = row < rows ? out + (at * layer.num_heads + first_head + head) * head_size : nullptr;
            if (partial && row < rows) {
                float result[MAX_HEAD_SIZE];
                for (int64_t element = 0; element < head_size; element++) result[element] = results[element * 16 + row % 16];
                finish(layer, result, tile.references[row], tile.sums[row], at, first_head + head, partial, out);
            }
            if (++head == group) head = 0, at++;
        }
        if (!partial) write_rows(results, load_raw<Floats>(tile.sums + 16 * i), value_tiles, head_size, to);
    }
}
