// The products of linear_many_rows.h for DYNAMIC_INT8 with rows of bfloat16. Where two panels of bytes fit the first cache, 16
// rows, which come from the second, meet 64 columns at once: half as many lines for a product as with 32 rows and 32 columns.
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

}  // namespace many_rows
#pragma GCC pop_options
