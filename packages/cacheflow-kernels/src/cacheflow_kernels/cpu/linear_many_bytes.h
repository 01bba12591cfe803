// The products of linear_many_rows.h for DYNAMIC_INT8 with rows of bfloat16. Where two panels of bytes fit the first cache, 16
// rows, which come from the second, meet 64 columns at once: half as many lines for a product as with 32 rows and 32 columns.
// Rows so few that they fit it meet 16 columns at once, and each line of weights is read once.
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8,prefer-vector-width=512")
namespace many_rows {

// Floats of 16 rows times a panel.
constexpr int64_t UNIT_SUMS = UNIT_ROWS * PANEL;

// Up to 16 rows whose sums for two panels are complete and whose results are not written yet.
template <bool IS_GATED>
struct UnfinishedUnit {
    static constexpr int64_t COLUMNS = IS_GATED ? PANEL / 2 : PANEL;
    avx512bf16::PanelEnd<BFloat16, true, 0> ends[2];
    const float *sums = nullptr, *row_scales = nullptr;
    char* out[2] = {};
    int64_t num_columns[2] = {}, row_bytes = 0, done = 0, rows = 0;

    __attribute__((always_inline)) void finish(int64_t at_most) {
        for (const int64_t last = std::min(rows, done + at_most); done < last; done++) {
            const float* row = sums + done * PANEL;
            const int64_t place = done * row_bytes;
            ends[0].template finish_row<IS_GATED>(row, row_scales[done], num_columns[0], (BFloat16*)(out[0] + place));
            if (num_columns[1] > 0)
                ends[1].template finish_row<IS_GATED>(
                    row + UNIT_SUMS, row_scales[done], num_columns[1], (BFloat16*)(out[1] + place));
        }
    }
};

// 16 rows times two panels. Registers 0 to 3 are sums, 4 activations, 5 to 7 weights. Calls meanwhile() at each step.
template <class Meanwhile>
static inline __attribute__((always_inline)) void multiply_unit(
    const char* x, const char* first, const char* second, int64_t lines, float* c, Fetching& fetching,
    const Meanwhile& meanwhile) {
    constexpr int64_t PANEL_BYTES = PANEL * 4;
    amx::begin_sums<true>(c, false);
    for (int64_t line = 0; line < lines; line++, x += UNIT, first += PANEL_UNIT, second += PANEL_UNIT) {
        fetching.go_on();
        _tile_stream_loadd(4, x, LINE);
        _tile_loadd(5, first, PANEL_BYTES);
        _tile_dpbssd(0, 4, 5);
        _tile_loadd(6, first + LINE, PANEL_BYTES);
        _tile_dpbssd(1, 4, 6);
        _tile_loadd(7, second, PANEL_BYTES);
        _tile_dpbssd(2, 4, 7);
        _tile_loadd(5, second + LINE, PANEL_BYTES);
        _tile_dpbssd(3, 4, 5);
        meanwhile();
    }
    amx::store_sums<true>(c);
}

// The block times a thread's share of the panels, two at a time.
template <bool IS_GATED>
static void multiply_pairs(const Block& b, const Team& team, const Piece& following) {
    using Unfinished = UnfinishedUnit<IS_GATED>;
    const Linear& l = b.l;
    const Cut cut(l, b.rows, team);
    const int64_t num_units = divided_up(b.rows, UNIT_ROWS), lines = cut.lines, panel_bytes = lines * PANEL_UNIT;
    alignas(64) float sums[2][2 * UNIT_SUMS];
    Unfinished unfinished;
    int64_t number = 0;
    const auto meanwhile = [&, at_once = divided_up(UNIT_ROWS, lines)]()
                               __attribute__((always_inline)) { unfinished.finish(at_once); };
    for (int64_t p = cut.begin; p < cut.end; p += 2) {
        const char* panel = (const char*)l.weight + p * panel_bytes;
        // A last one alone meets the rows twice, and is written once.
        const bool has_two = p + 1 < cut.end;
        const int64_t num_next = std::min<int64_t>(2, cut.end - p - 2);
        const Piece next = num_next > 0 ? Piece{panel + 2 * panel_bytes, num_next * panel_bytes} : following;
        Fetching fetching(next, num_units * lines);
        for (int64_t unit = 0; unit < num_units; unit++, number++) {
            const int64_t row = unit * UNIT_ROWS;
            float* c = sums[number % 2];
            multiply_unit(b.tiles.unit(row, 0), panel, panel + (has_two ? panel_bytes : 0), lines, c, fetching, meanwhile);
            unfinished.finish(UNIT_ROWS);
            for (int64_t i = 0; i < (has_two ? 2 : 1); i++) {
                if (unit == 0) unfinished.ends[i] = {l, p + i};
                unfinished.out[i] = b.results.at(row, (p + i) * Unfinished::COLUMNS * (int64_t)sizeof(BFloat16));
                unfinished.num_columns[i] = l.out_features - (p + i) * Unfinished::COLUMNS;
            }
            if (!has_two) unfinished.num_columns[1] = 0;
            unfinished.sums = c;
            unfinished.row_scales = b.row_scales + row;
            unfinished.row_bytes = b.results.row_bytes;
            unfinished.done = 0;
            unfinished.rows = std::min(UNIT_ROWS, b.rows - row);
        }
    }
    unfinished.finish(UNIT_ROWS);
}

static void multiply_pairs(const Block& b, const Team& team, const Piece& following) {
    (b.l.is_gated ? multiply_pairs<true> : multiply_pairs<false>)(b, team, following);
}

// 33 to 64 rows, which stay in the first cache, times 16 columns of a part of a panel. Registers 0 to 3 are sums, 4 and 5
// activations, 6 and 7 weights.
template <bool HAS_FOUR, class Meanwhile>
static inline __attribute__((always_inline)) void multiply_strip(
    const char* x, int64_t unit_bytes, const char* strip, int64_t lines, bool goes_on, float* c, Fetching& fetching,
    const Meanwhile& meanwhile) {
    constexpr int64_t C_BYTES = PANEL * 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (goes_on) {
        _tile_loadd(0, c, C_BYTES);
        _tile_loadd(1, c + UNIT_SUMS, C_BYTES);
        _tile_loadd(2, c + 2 * UNIT_SUMS, C_BYTES);
        if (HAS_FOUR) _tile_loadd(3, c + 3 * UNIT_SUMS, C_BYTES);
    }
    for (int64_t line = 0; line < lines; line++, x += UNIT, strip += PANEL_UNIT) {
        _tile_stream_loadd(6, strip, C_BYTES);
        fetching.go_on();
        _tile_loadd(4, x, LINE);
        _tile_dpbssd(0, 4, 6);
        fetching.go_on();
        _tile_loadd(5, x + unit_bytes, LINE);
        _tile_dpbssd(1, 5, 6);
        fetching.go_on();
        _tile_loadd(4, x + 2 * unit_bytes, LINE);
        _tile_dpbssd(2, 4, 6);
        fetching.go_on();
        if (HAS_FOUR) {
            _tile_loadd(5, x + 3 * unit_bytes, LINE);
            _tile_dpbssd(3, 5, 6);
        }
        meanwhile();
    }
    _tile_stored(0, c, C_BYTES);
    _tile_stored(1, c + UNIT_SUMS, C_BYTES);
    _tile_stored(2, c + 2 * UNIT_SUMS, C_BYTES);
    if (HAS_FOUR) _tile_stored(3, c + 3 * UNIT_SUMS, C_BYTES);
}

// A block of 33 to 64 rows times a thread's share of the panels, which come from memory: each line of weights meets all rows at
// once. Longer rows come in parts that fit the first cache, and the sums of all panels wait in the second.
template <bool IS_GATED, bool HAS_FOUR>
static void stream_strips(const Block& b, const Team& team) {
    constexpr int64_t COLUMNS = IS_GATED ? PANEL / 2 : PANEL, PANEL_SUMS = 4 * UNIT_SUMS;
    const Linear& l = b.l;
    const Cut cut(l, b.rows, team);
    const int64_t lines = cut.lines, num_parts = divided_up(lines, PART_LINES / 2), num_panels = cut.end - cut.begin;
    float* sums = (float*)sum_memory.get((num_parts > 1 ? num_panels : 2) * PANEL_SUMS * 4);
    Unfinished<BFloat16, true, IS_GATED> unfinished;
    for (int64_t part = 0; part < num_parts; part++) {
        const int64_t first = lines * part / num_parts, last = lines * (part + 1) / num_parts, size = last - first;
        const auto meanwhile = [&, at_once = divided_up(b.rows, 2 * size)]()
                                   __attribute__((always_inline)) { unfinished.finish(at_once); };
        for (int64_t p = cut.begin; p < cut.end; p++) {
            const char* panel = (const char*)l.weight + (p * lines + first) * PANEL_UNIT;
            Piece next{panel + lines * PANEL_UNIT, size * PANEL_UNIT};
            if (p + 1 == cut.end) {
                const int64_t next_size = lines * (part + 2) / num_parts - last;
                next = {};
                if (last < lines)
                    next = {(const char*)l.weight + (cut.begin * lines + last) * PANEL_UNIT, next_size * PANEL_UNIT};
            }
            Fetching fetching(next, 8 * size);
            float* c = sums + (num_parts > 1 ? p - cut.begin : p % 2) * PANEL_SUMS;
            for (int64_t strip = 0; strip < 2; strip++)
                multiply_strip<HAS_FOUR>(
                    b.tiles.unit(0, first), lines * UNIT, panel + strip * LINE, size, part > 0, c + strip * STRIP, fetching,
                    meanwhile);
            if (last < lines) continue;
            unfinished.finish(b.rows);
            unfinished.end = {l, p};
            unfinished.num_columns = l.out_features - p * COLUMNS;
            unfinished.sums = c;
            unfinished.row_scales = b.row_scales;
            unfinished.out = b.results.at(0, p * COLUMNS * (int64_t)sizeof(BFloat16));
            unfinished.row_bytes = b.results.row_bytes;
            unfinished.done = 0;
            unfinished.rows = b.rows;
        }
    }
    unfinished.finish(b.rows);
}

// As cf_linear, for DYNAMIC_INT8 with 33 to 64 rows of bfloat16.
static void multiply_strips(const Linear& l, const void* x, int64_t rows, int64_t x_bytes, void* out, int64_t num_threads) {
    for_each_block(l, (const char*)x, rows, 4 * UNIT_ROWS, x_bytes, num_threads, [&](Block block, int64_t, const Team& team) {
        block.results = {(char*)out, l.out_features * 2};
        const bool has_four = rows > 3 * UNIT_ROWS;
        if (l.is_gated)
            (has_four ? stream_strips<true, true> : stream_strips<true, false>)(block, team);
        else
            (has_four ? stream_strips<false, true> : stream_strips<false, false>)(block, team);
    });
}

}  // namespace many_rows
#pragma GCC pop_options
