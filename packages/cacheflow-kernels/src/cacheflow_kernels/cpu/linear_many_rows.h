// The products of linear.cpp for AMX where the rows are many. They are copied to where tiles lie one after the other, as the
// unit reads them; then each thread takes its panels, one at a time, past all tiles of a block of rows. A panel stays in the
// first cache meanwhile, the rows in the second, and vectors finish a tile while the unit multiplies the next.
#include <omp.h>

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8,prefer-vector-width=512")
namespace many_rows {

using amx::TILE_ROWS, amx::UNIT_ROWS;

// A line of a row is 64 bytes. A unit of the rows is 16 of them, one line of each; what a panel has for it is two of them.
constexpr int64_t LINE = 64, PAGE = 4096, UNIT = UNIT_ROWS * LINE, PANEL_UNIT = 2 * UNIT;

// Bytes of a block of rows, and of its span along k where MIN_BLOCK_ROWS are more than that: they stay in a core's second cache
// of 2 MiB beside the panels that pass by. Products of a layer of SmolLM2-135M, 512 rows on each of two threads: 1,815 us with
// 768 KiB, 1,790 with 1 MiB, 1,964 with 1.5; of one of Llama-3.2-1B, 768 rows: 74.8 ms (with 192 rows at least), 61.2 and 88.9.
constexpr int64_t BLOCK_BYTES = 1 << 20;

// Rows that a panel meets at least, as it comes from memory for each block: 512 rows by Llama-3.2-1B's down (k = 8,192) took
// 28.0 ms where a block was as small as its rows are long, 14.1 so.
constexpr int64_t MIN_BLOCK_ROWS = 256;

// Lines of a row, of which a panel's part stays in the first cache of 48 KiB while tiles pass by: 36 KiB. Down of SmolLM2-135M
// (k = 1,536), 256 rows on each of two threads: 203 us in three such parts, 294 in two, 268 in one.
constexpr int64_t PART_LINES = 18;

static thread_local Scratch tile_memory, scale_memory, sum_memory, turned_memory, byte_memory, inner_memory;

static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t lines_of(const Linear& l) { return divided_up(l.in_features * (l.form == DYNAMIC_INT8 ? 1 : 2), LINE); }

// Whether two panels fit the first cache, so that 16 rows meet both at once. Down of SmolLM2-135M (k = 1,536), in three parts,
// was slower so.
static bool has_pairs(const Linear& l) { return l.form == DYNAMIC_INT8 && l.is_bfloat16 && 2 * lines_of(l) <= PART_LINES; }

// Rows as the unit reads them: [rows / 16][lines][16][64].
struct Tiles {
    char* memory;
    int64_t lines;

    char* unit(int64_t row, int64_t line) const { return memory + (row / UNIT_ROWS * lines + line) * UNIT; }
    Tiles from(int64_t row) const { return {unit(row, 0), lines}; }
};

// Where results go: rows one behind the other, or tiles.
struct Results {
    char* memory;
    int64_t row_bytes, lines = 0;  // lines: of tiles

    char* at(int64_t row, int64_t bytes) const {
        if (!lines) return memory + row * row_bytes + bytes;
        return Tiles{memory, lines}.unit(row, bytes / LINE) + bytes % LINE;
    }
    // From the 16th row of a unit to the first of the next, beyond what it is from the 15th to the 16th.
    int64_t jump() const { return lines ? lines * UNIT - UNIT_ROWS * LINE : 0; }
};

// A block of rows, and where its product goes.
struct Block {
    const Linear& l;
    Tiles tiles;
    int64_t rows;
    float* row_scales;  // DYNAMIC_INT8
    Results results;
};

// Writes row `row` of the block: x in the type that is multiplied, with zeros behind it.
static void copy_row(const Block& b, const char* x, int64_t row) {
    const int64_t k = b.l.in_features;
    int64_t size = 2 * k;
    if (b.l.form == DYNAMIC_INT8) {
        char* rounded = byte_memory.get(k);
        b.row_scales[row] =
            avx512bf16::LINEAR_KERNELS.quantise_row[b.l.is_bfloat16](x, k, (float*)turned_memory.get(k * 4), (uint8_t*)rounded);
        x = rounded;
        size = k;
    }
    char* to = b.tiles.unit(row, 0) + row % UNIT_ROWS * LINE;
    for (int64_t at = 0; at < b.tiles.lines * LINE; at += LINE, to += UNIT) {
        const int64_t left = size - at;
        const __mmask64 exist = left >= LINE ? ~(__mmask64)0 : left > 0 ? ((__mmask64)1 << left) - 1 : 0;
        _mm512_store_si512(to, _mm512_maskz_loadu_epi8(exist, x + at));
    }
}

// Whether the matrix unit rounds rows, 16 at once, to signed bytes.
static bool rounds_units(const Linear& l) { return l.form == DYNAMIC_INT8 && l.is_bfloat16; }

// Writes up to 16 rows of the block, from `row`.
static void round_rows(const Block& b, const amx::RowsToRound& from, int64_t row) {
    const int64_t rows = std::min(UNIT_ROWS, b.rows - row);
    amx::round_rows<0>(from, rows, b.l.in_features, (uint8_t*)b.tiles.unit(row, 0), LINE, UNIT, b.row_scales + row);
}

// Weights that a thread reads one after the other.
struct Piece {
    const char* begin = nullptr;
    int64_t bytes = 0;
};

// Weights that are asked for, evenly over the steps that come: the first line of each page, then the second of each. The
// processor goes on by itself where lines follow one another, and does so in all these pages. A model's products of 128 rows:
// 16.5 ms with one line behind the other, 13.0 so. Of longer panels so many pages at once: 64 rows took layers of the 1B shape
// (32 and 128 pages) 29.6 ms with all of them, 23.5 so.
constexpr int64_t PAGES_AT_ONCE = 9;

struct Fetching {
    const char *pages, *pages_end, *first, *next, *end;
    int64_t step, due = 0;  // bytes

    Fetching(const Piece& piece, int64_t steps)
        : end(piece.begin + piece.bytes), step(steps ? piece.bytes / steps : 0) {
        begin_pages(piece.begin);
    }

    __attribute__((always_inline)) void begin_pages(const char* begin) {
        pages = first = next = begin;
        pages_end = std::min(begin + PAGES_AT_ONCE * PAGE, end);
    }

    __attribute__((always_inline)) void go_on() {
        for (due += step; due >= LINE; due -= LINE) {
            _mm_prefetch(next, _MM_HINT_T1);
            next += PAGE;
            if (next < pages_end) continue;
            next = first += LINE;
            if (first == pages + PAGE) begin_pages(pages_end);
        }
    }
};

// Up to 32 rows times a part of a panel, `lines` long. Registers 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights. Where
// `goes_on`, c holds what was summed before. Calls meanwhile() at each step.
template <bool IS_INTEGER, bool IS_SIGNED, bool HAS_TWO, class Meanwhile>
static inline __attribute__((always_inline)) void multiply_tile(
    const char* upper, const char* lower, const char* panel, int64_t lines, bool goes_on, float* c, Fetching& fetching,
    const Meanwhile& meanwhile) {
    constexpr int64_t PANEL_BYTES = PANEL * 4;
    amx::begin_sums<HAS_TWO>(c, goes_on);
    for (int64_t line = 0; line < lines; line++, upper += UNIT, lower += UNIT, panel += PANEL_UNIT) {
        fetching.go_on();
        _tile_stream_loadd(4, upper, LINE);
        _tile_loadd(6, panel, PANEL_BYTES);
        _tile_loadd(7, panel + LINE, PANEL_BYTES);
        if (HAS_TWO) _tile_stream_loadd(5, lower, LINE);
        if constexpr (IS_SIGNED) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            if (HAS_TWO) {
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
        } else {
            amx::add_to_sums<IS_INTEGER, HAS_TWO>();
        }
        meanwhile();
    }
    amx::store_sums<HAS_TWO>(c);
}

// Integers are of signed bytes where rounds_units.
template <class T, bool IS_INTEGER>
constexpr bool IS_SIGNED = IS_INTEGER && std::is_same_v<T, BFloat16>;

// Rows whose sums are complete and whose results are not written yet.
template <class T, bool IS_INTEGER, bool IS_GATED>
struct Unfinished {
    avx512bf16::PanelEnd<T, IS_INTEGER, IS_SIGNED<T, IS_INTEGER> ? 0 : avx512bf16::BYTE_OFFSET> end;
    const float *sums = nullptr, *row_scales = nullptr;
    char* out = nullptr;
    int64_t row_bytes = 0, jump = 0, num_columns = 0, done = 0, rows = 0;

    __attribute__((always_inline)) void finish(int64_t at_most) {
        for (const int64_t last = std::min(rows, done + at_most); done < last;) {
            end.template finish_row<IS_GATED>(sums, IS_INTEGER ? *row_scales : 1.0f, num_columns, (T*)out);
            sums += PANEL;
            out += row_bytes;
            if (IS_INTEGER) row_scales++;
            if (++done == UNIT_ROWS) out += jump;
        }
    }
};

// How a product's panels are shared out and cut: a thread takes its share of them, span after span, to each of which belong so
// many lines of all panels.
struct Cut {
    const Linear& l;
    int64_t lines, num_spans, begin, end;

    // The whole block along k if it fits the second cache.
    Cut(const Linear& l, int64_t rows, const Team& team)
        : l(l), lines(lines_of(l)), num_spans(divided_up(lines * rows * LINE, BLOCK_BYTES)),
          begin(l.num_panels * team.index / team.size), end(l.num_panels * (team.index + 1) / team.size) {}

    int64_t first_line(int64_t span) const { return lines * span / num_spans; }

    Piece piece(int64_t span, int64_t panel) const {
        if (begin == end) return {};
        const int64_t first = first_line(span);
        return {(const char*)l.weight + (panel * lines + first) * PANEL_UNIT, (first_line(span + 1) - first) * PANEL_UNIT};
    }
    Piece start() const { return piece(0, begin); }
    // What is read behind a piece, until all is.
    Piece behind(int64_t span, int64_t panel) const {
        if (panel + 1 < end) return piece(span, panel + 1);
        return span + 1 < num_spans ? piece(span + 1, begin) : Piece{};
    }
};

// The block times a thread's share of the panels. Meanwhile it asks for what follows, in the end for `following`.
template <class T, bool IS_INTEGER, bool IS_GATED>
static void multiply_panels(const Block& b, const Team& team, const Piece& following) {
    const Linear& l = b.l;
    constexpr int64_t COLUMNS = IS_GATED ? PANEL / 2 : PANEL, TILE_SUMS = TILE_ROWS * PANEL;
    const Cut cut(l, b.rows, team);
    const int64_t num_tiles = divided_up(b.rows, TILE_ROWS), lines = cut.lines, num_spans = cut.num_spans, begin = cut.begin;
    const bool has_parts = lines > PART_LINES || num_spans > 1;
    // A tile's and the next one's; of all tiles where they are parts; of all panels, too, where those come in spans.
    const int64_t num_sums = (num_spans > 1 ? cut.end - begin : 1) * (has_parts ? num_tiles : 2) * TILE_SUMS;
    float* sums = (float*)sum_memory.get(num_sums * 4);
    Unfinished<T, IS_INTEGER, IS_GATED> unfinished;
    int64_t number = 0;
    for (int64_t span = 0; span < num_spans; span++) {
        const int64_t span_first = cut.first_line(span), span_lines = cut.first_line(span + 1) - span_first;
        const int64_t num_parts = divided_up(span_lines, PART_LINES);
        for (int64_t p = begin; p < cut.end; p++) {
            const char* panel = (const char*)l.weight + p * lines * PANEL_UNIT;
            const bool is_last = span == num_spans - 1 && p == cut.end - 1;
            Fetching fetching(is_last ? following : cut.behind(span, p), span_lines * num_tiles);
            for (int64_t part = 0; part < num_parts; part++) {
                const int64_t first = span_first + span_lines * part / num_parts;
                const int64_t last = span_first + span_lines * (part + 1) / num_parts;
                const auto meanwhile = [&, at_once = divided_up(TILE_ROWS, last - first)]()
                                           __attribute__((always_inline)) { unfinished.finish(at_once); };
                for (int64_t tile = 0; tile < num_tiles; tile++, number++) {
                    const int64_t row = tile * TILE_ROWS, rows = std::min(TILE_ROWS, b.rows - row);
                    const int64_t kept = (num_spans > 1 ? p - begin : 0) * num_tiles + tile;
                    float* c = sums + (has_parts ? kept : number % 2) * TILE_SUMS;
                    const auto multiply = [&](auto has_two) __attribute__((always_inline)) {
                        multiply_tile<IS_INTEGER, IS_SIGNED<T, IS_INTEGER>, has_two.value>(
                            b.tiles.unit(row, first), b.tiles.unit(row + UNIT_ROWS, first), panel + first * PANEL_UNIT,
                            last - first, first > 0, c, fetching, meanwhile);
                    };
                    if (rows > UNIT_ROWS)
                        multiply(std::true_type{});
                    else
                        multiply(std::false_type{});
                    if (last < lines) continue;
                    unfinished.finish(TILE_ROWS);
                    if (tile == 0) unfinished.end = {l, p};
                    unfinished.num_columns = l.out_features - p * COLUMNS;
                    unfinished.sums = c;
                    unfinished.row_scales = b.row_scales + row;
                    unfinished.out = b.results.at(row, p * COLUMNS * (int64_t)sizeof(T));
                    unfinished.row_bytes = b.results.row_bytes;
                    unfinished.jump = b.results.jump();
                    unfinished.done = 0;
                    unfinished.rows = rows;
                }
            }
        }
    }
    unfinished.finish(TILE_ROWS);
}

// As multiply_panels, where has_pairs: in linear_many_bytes.h.
static void multiply_pairs(const Block& b, const Team& team, const Piece& following);

static void multiply_share(const Block& b, const Team& team, const Piece& following = {}) {
    const bool is_gated = b.l.is_gated;
    if (b.l.form != DYNAMIC_INT8)
        (is_gated ? multiply_panels<BFloat16, false, true> : multiply_panels<BFloat16, false, false>)(b, team, following);
    else if (has_pairs(b.l))
        multiply_pairs(b, team, following);
    else if (b.l.is_bfloat16)
        (is_gated ? multiply_panels<BFloat16, true, true> : multiply_panels<BFloat16, true, false>)(b, team, following);
    else
        (is_gated ? multiply_panels<float, true, true> : multiply_panels<float, true, false>)(b, team, following);
}

// Rows of equal blocks of so many lines a row.
static int64_t block_rows(int64_t rows, int64_t lines) {
    const int64_t at_most = std::max(MIN_BLOCK_ROWS, BLOCK_BYTES / (lines * LINE) / TILE_ROWS * TILE_ROWS);
    return divided_up(divided_up(rows, divided_up(rows, at_most)), TILE_ROWS) * TILE_ROWS;
}

// Calls then(block) on each thread for each block of `at_once` rows of x, which begin each `x_bytes`, once it is copied.
template <class Then>
static void for_each_block(
    const Linear& l, const char* x, int64_t rows, int64_t at_once, int64_t x_bytes, int64_t num_threads, const Then& then) {
    const int64_t lines = lines_of(l);
    const Tiles tiles{tile_memory.get(at_once * lines * LINE), lines};
    float* row_scales = (float*)scale_memory.get(at_once * 4);
#pragma omp parallel num_threads((int)num_threads)
    {
        const Team team{omp_get_thread_num(), omp_get_num_threads()};
        for (int64_t first = 0; first < rows; first += at_once) {
            const Block block{l, tiles, std::min(at_once, rows - first), row_scales, {}};
            // Meanwhile for the panel that comes first.
            const int64_t units = divided_up(block.rows, UNIT_ROWS);
            const int64_t begin = units * team.index / team.size, end = units * (team.index + 1) / team.size;
            Fetching fetching(Cut(l, block.rows, team).start(), end - begin);
            for (int64_t unit = begin; unit < end; unit++) {
                fetching.go_on();
                const int64_t row = unit * UNIT_ROWS, last = std::min(row + UNIT_ROWS, block.rows);
                const char* from = x + (first + row) * x_bytes;
                if (rounds_units(l))
                    round_rows(block, {from, x_bytes, LINE}, row);
                else
                    for (int64_t i = row; i < last; i++, from += x_bytes) copy_row(block, from, i);
            }
#pragma omp barrier
            amx::begin(UNIT_ROWS);
            then(block, first, team);
#pragma omp barrier
        }
        amx::end();
    }
}

// As cf_linear, for PLAIN_BFLOAT16 and DYNAMIC_INT8.
static void multiply(const Linear& l, const void* x, int64_t rows, int64_t x_bytes, void* out, int64_t num_threads) {
    const int64_t row_bytes = l.out_features * (l.is_bfloat16 ? 2 : 4);
    const int64_t at_once = block_rows(rows, lines_of(l));
    for_each_block(l, (const char*)x, rows, at_once, x_bytes, num_threads, [&](Block block, int64_t first, const Team& team) {
        block.results = {(char*)out + first * row_bytes, row_bytes};
        multiply_share(block, team);
    });
}

// Whether multiply_both can do it: what lies between the two needs no padding.
static bool can_be_one(const Linear& gate_up, const Linear& down) {
    if (gate_up.form != down.form || gate_up.out_features != down.in_features || !down.is_bfloat16) return false;
    return down.form == PLAIN_BFLOAT16 ? down.in_features % 32 == 0 : down.form == DYNAMIC_INT8 && down.in_features % 64 == 0;
}

// Of the bfloat16 rows between two products.
static int64_t inner_lines(const Linear& down) { return divided_up(down.in_features * 2, LINE); }

// As many rows in bytes as in bfloat16: they are bfloat16 between the products.
static int64_t rows_of_both(const Linear& gate_up, int64_t rows) { return block_rows(rows, inner_lines(gate_up)); }

static int64_t inner_bytes(const Linear& gate_up, const Linear& down, int64_t rows) {
    // As tiles of bfloat16 and of bytes, and the scales of these.
    return rows_of_both(gate_up, rows) * ((inner_lines(down) + lines_of(down)) * LINE + 4);
}

// A thread's panels of gate_up times a block, whose result stays in tiles, and of down times that.
static void multiply_both_share(
    Block block, const Linear& down, char* inner, int64_t first, char* out, const Team& team) {
    const int64_t lines = lines_of(down), row_bytes = down.out_features * 2, at_once = block_rows(block.rows, lines);
    const Tiles between{inner, inner_lines(down)};
    block.results = {inner, LINE, between.lines};
    multiply_share(block, team, Cut(down, std::min(block.rows, at_once), team).start());
    team.wait();
    Block all{down, between, block.rows, nullptr, {out + first * row_bytes, row_bytes}};
    if (rounds_units(down)) {
        const int64_t units = divided_up(block.rows, UNIT_ROWS);
        all.tiles = {between.unit(units * UNIT_ROWS, 0), lines};
        all.row_scales = (float*)all.tiles.unit(units * UNIT_ROWS, 0);
        for (int64_t unit = units * team.index / team.size; unit < units * (team.index + 1) / team.size; unit++)
            round_rows(all, {between.unit(unit * UNIT_ROWS, 0), LINE, UNIT}, unit * UNIT_ROWS);
        amx::begin(UNIT_ROWS);
        team.wait();
    }
    for (int64_t row = 0; row < block.rows; row += at_once)
        multiply_share(
            {down, all.tiles.from(row), std::min(at_once, block.rows - row), all.row_scales + row,
             {all.results.memory + row * row_bytes, row_bytes}}, team);
}

// Both products; what lies between stays in tiles.
static void multiply_both(
    const Linear& gate_up, const Linear& down, const void* x, int64_t rows, int64_t x_bytes, void* out, int64_t num_threads) {
    char* inner = inner_memory.get(inner_bytes(gate_up, down, rows));
    for_each_block(
        gate_up, (const char*)x, rows, rows_of_both(gate_up, rows), x_bytes, num_threads,
        [&](const Block& block, int64_t first, const Team& team) {
            multiply_both_share(block, down, inner, first, (char*)out, team);
        });
}

// Calls then(block) for each block of `at_once` rows of x, once this thread has them in tiles of its own.
template <class Then>
static void for_each_own_block(
    const Linear& l, const Rows& x, int64_t rows, int64_t at_once, const Team& team, const Then& then) {
    const int64_t lines = lines_of(l), x_bytes = l.in_features * 2;
    const Tiles tiles{tile_memory.get(at_once * lines * LINE), lines};
    float* row_scales = (float*)scale_memory.get(at_once * 4);
    for (int64_t first = 0; first < rows; first += at_once) {
        const Block block{l, tiles, std::min(at_once, rows - first), row_scales, {}};
        Fetching fetching(Cut(l, block.rows, team).start(), block.rows);
        char* unit = rounds_units(l) ? byte_memory.get(UNIT_ROWS * x_bytes) : nullptr;
        for (int64_t row = 0; row < block.rows; row++) {
            fetching.go_on();
            if (!unit) {
                copy_row(block, x.at(first + row), row);
                continue;
            }
            const int64_t within = row % UNIT_ROWS;
            memcpy(unit + within * x_bytes, x.at(first + row), x_bytes);
            if (within == UNIT_ROWS - 1 || row == block.rows - 1) round_rows(block, {unit, x_bytes, LINE}, row - within);
        }
        amx::begin(UNIT_ROWS);
        then(block, first);
    }
    amx::end();
}

}  // namespace many_rows
#pragma GCC pop_options
