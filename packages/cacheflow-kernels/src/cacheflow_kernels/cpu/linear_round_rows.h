// Rows of bfloat16 for DYNAMIC_INT8, as quantise_row of linear_kernel.h makes them, but 16 at once, turned by the matrix unit.
// All such rows of a machine that has it are made so, as it adds in another order.
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8,prefer-vector-width=512")
namespace amx {

// The Hadamard matrix over 64 is that over 32 in three of its quarters, and less than nothing in the fourth: this is a quarter,
// over 8, as two tiles of pairs.
struct alignas(64) Turning {
    uint16_t tiles[2][16][16][2] = {};
    constexpr Turning() {
        for (int k = 0; k < 32; k++)
            for (int column = 0; column < 32; column++) {
                int common = k & column, odd = 0;
                for (; common; common &= common - 1) odd ^= 1;
                tiles[column / 16][k / 2][column % 16][k % 2] = odd ? 0xbe00 : 0x3e00;
            }
    }
};
static constexpr Turning TURNING;

static thread_local Scratch turned_memory;

// 64 columns of 16 rows are four tiles: A and B, whose sum and difference are the turned numbers. Each tile is 16 rows of 16.
constexpr int64_t TURNED_TILE = UNIT_ROWS * 16, TURNED_BLOCK = 4 * TURNED_TILE;

// Where 16 rows of x lie: the next row is `row_bytes` away, and the next 64 bytes of a row `line_bytes`.
struct RowsToRound {
    const char* x;
    int64_t row_bytes, line_bytes;

    const char* line(int64_t row, int64_t i) const { return x + row * row_bytes + i * line_bytes; }
};

static inline __m512i magnitude_bits(__m512 value) {
    return _mm512_and_si512((__m512i)value, _mm512_set1_epi32(0x7fffffff));
}

// The greatest magnitudes of a block's rows, into those that there are. As integers: the bits of a NaN are larger than those of
// any number, so that a NaN makes the scale a NaN.
static inline void keep_greatest(const float* block, int64_t rows, __m512i* tops) {
    for (int64_t row = 0; row < rows; row++, block += 16) {
        // Of |a + b| and |a - b| the greater is |a| + |b|.
        const auto sum = [&](int i) __attribute__((always_inline)) {
            const __m512i a = magnitude_bits(_mm512_load_ps(block + i * TURNED_TILE));
            const __m512i b = magnitude_bits(_mm512_load_ps(block + (i + 2) * TURNED_TILE));
            return (__m512i)((__m512)a + (__m512)b);
        };
        tops[row] = _mm512_max_epi32(tops[row], _mm512_max_epi32(sum(0), sum(1)));
    }
}

// Turns up to 16 rows into blocks, and finds the greatest magnitudes meanwhile. A tile is stored while the next are multiplied,
// and read some time after.
static void turn_rows(const RowsToRound& from, int64_t rows, int64_t num_blocks, float* to, __m512i* tops) {
    const auto turn = [&](int64_t line, auto is_second) __attribute__((always_inline)) {
        if (is_second.value) {
            _tile_loadd(5, from.line(0, line), from.row_bytes);
            _tile_zero(2);
            _tile_zero(3);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_loadd(4, from.line(0, line), from.row_bytes);
            _tile_zero(0);
            _tile_zero(1);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
    };
    _tile_loadd(6, TURNING.tiles[0], 64);
    _tile_loadd(7, TURNING.tiles[1], 64);
    if (num_blocks) turn(0, std::false_type{});
    for (int64_t block = 0; block < num_blocks; block++, to += TURNED_BLOCK) {
        turn(2 * block + 1, std::true_type{});
        _tile_stored(0, to, 64);
        _tile_stored(1, to + TURNED_TILE, 64);
        if (block + 1 < num_blocks) turn(2 * block + 2, std::false_type{});
        if (block) keep_greatest(to - TURNED_BLOCK, rows, tops);
        _tile_stored(2, to + 2 * TURNED_TILE, 64);
        _tile_stored(3, to + 3 * TURNED_TILE, 64);
    }
    if (num_blocks) keep_greatest(to - TURNED_BLOCK, rows, tops);
}

// The bytes, OFFSET too large, of 64 numbers times `factor`.
template <int OFFSET, class Numbers>
static inline __attribute__((always_inline)) __m512i bytes_of(const Numbers& numbers, __m512 factor) {
    const auto whole = [&](int i) __attribute__((always_inline)) { return _mm512_cvtps_epi32(numbers(i) * factor); };
    const __m512i low = _mm512_packs_epi32(whole(0), whole(1)), high = _mm512_packs_epi32(whole(2), whole(3));
    // Packing has taken four numbers of each vector in turn.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
    return OFFSET ? _mm512_add_epi8(bytes, _mm512_set1_epi8((char)OFFSET)) : bytes;
}

// Up to 16 rows of k, whose last k % 64 lie one after the other: row i as bytes, OFFSET too large, from out + i * row_bytes, a
// line of 64 after the other, `line_bytes` apart. Sets the unit's registers up for as many rows.
template <int OFFSET>
static void round_rows(
    const RowsToRound& from, int64_t rows, int64_t k, uint8_t* out, int64_t row_bytes, int64_t line_bytes, float* row_scales) {
    const int64_t num_blocks = k / 64, rest = k % 64;
    float* turned = (float*)turned_memory.get(num_blocks * TURNED_BLOCK * 4);
    __m512i tops[UNIT_ROWS] = {};
    begin(rows);
    turn_rows(from, rows, num_blocks, turned, tops);
    for (int64_t row = 0; row < rows; row++, out += row_bytes, turned += 16) {
        __m512 last[4];
        for (int i = 0; i < (rest ? 4 : 0); i++) {
            const int64_t left = rest - 16 * i;
            const __mmask16 exist = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
            const __m256i bits = _mm256_maskz_loadu_epi16(exist, from.line(row, 2 * num_blocks) + 32 * i);
            const __m512i wide = _mm512_cvtepu16_epi32(bits);
            last[i] = (__m512)_mm512_slli_epi32(wide, 16);
            tops[row] = _mm512_max_epi32(tops[row], magnitude_bits(last[i]));
        }
        const int32_t bits = _mm512_reduce_max_epi32(tops[row]);
        float top;
        memcpy(&top, &bits, 4);
        row_scales[row] = top / 127.0f;
        const __m512 factor = _mm512_set1_ps(top == 0.0f ? 0.0f : 127.0f / top);
        const float* block = turned;
        uint8_t* to = out;
        for (int64_t i = 0; i < num_blocks; i++, block += TURNED_BLOCK, to += line_bytes) {
            const auto number = [&](int j) __attribute__((always_inline)) {
                const __m512 a = _mm512_load_ps(block + j % 2 * TURNED_TILE);
                const __m512 b = _mm512_load_ps(block + (j % 2 + 2) * TURNED_TILE);
                return j < 2 ? a + b : a - b;
            };
            _mm512_storeu_si512(to, bytes_of<OFFSET>(number, factor));
        }
        if (rest) _mm512_storeu_si512(to, bytes_of<OFFSET>([&](int i) { return last[i]; }, factor));
    }
}

}  // namespace amx
#pragma GCC pop_options
