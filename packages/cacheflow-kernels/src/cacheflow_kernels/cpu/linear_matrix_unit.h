// The tiles of linear.cpp for AMX: up to 32 rows of activations, one after the other, times a panel. The panels are those of
// the other levels, as their layout is what the matrix unit takes.

#pragma GCC push_options
#pragma GCC target("avx512f,amx-tile,amx-bf16,amx-int8")
namespace amx {

constexpr int64_t UNIT_ROWS = 16, TILE_ROWS = 2 * UNIT_ROWS;

// Registers have rows of 64 bytes: those of the weights 16, the others as many as there are activations, the first 16 and the
// rest.
struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16];
    constexpr Config(uint8_t n) : Config(n > 16 ? 16 : n, n > 16 ? n - 16 : n) {}
    constexpr Config(uint8_t upper, uint8_t lower) : rows{upper, upper, lower, lower, upper, lower, 16, 16} {}
};
// Not a local variable: gcc is told that the instruction reads 8 bytes of it, and leaves out the others.
static constexpr Config CONFIGS[TILE_ROWS] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16,
                                              17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32};

// For tiles of so many rows. Other code in the process may use the unit between two products.
static void begin(int64_t tile_rows) { _tile_loadconfig(&CONFIGS[tile_rows - 1]); }

static void end() { _tile_release(); }

// Registers 0 to 3, of sums, from c or as zeros.
template <bool HAS_TWO>
static inline __attribute__((always_inline)) void begin_sums(const float* c, bool goes_on) {
    constexpr int64_t C_BYTES = PANEL * 4;
    if (goes_on) {
        _tile_loadd(0, c, C_BYTES);
        _tile_loadd(1, c + 16, C_BYTES);
        if (HAS_TWO) {
            _tile_loadd(2, c + UNIT_ROWS * PANEL, C_BYTES);
            _tile_loadd(3, c + UNIT_ROWS * PANEL + 16, C_BYTES);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (HAS_TWO) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
}

// Adds the products of registers 4 and 5, of activations, and 6 and 7, of weights.
template <bool IS_INTEGER, bool HAS_TWO>
static inline __attribute__((always_inline)) void add_to_sums() {
    if (IS_INTEGER) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if (HAS_TWO) {
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
    } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (HAS_TWO) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

template <bool HAS_TWO>
static inline __attribute__((always_inline)) void store_sums(float* c) {
    constexpr int64_t C_BYTES = PANEL * 4;
    _tile_stored(0, c, C_BYTES);
    _tile_stored(1, c + 16, C_BYTES);
    if (HAS_TWO) {
        _tile_stored(2, c + UNIT_ROWS * PANEL, C_BYTES);
        _tile_stored(3, c + UNIT_ROWS * PANEL + 16, C_BYTES);
    }
}

// As a Tile, for rows so few that a single tile holds them and meets a panel when it comes from memory. Registers 0 to 3 are
// sums, 4 and 5 activations, 6 and 7 weights. Lines of weights are asked for in the order in which memory holds them, evenly
// among the other work and across a panel's end: `next` is the first of those that this tile asks for, as many as it reads.
// While the unit multiplies, meanwhile(from, to) is called for parts of [0, height), one after the other: for what vectors have
// to do with an earlier tile.
template <bool IS_INTEGER, bool HAS_TWO, class Meanwhile>
static void stream(
    const void* rows, int64_t stride, int64_t height, const char* panel, int64_t steps, float* c, const char* next,
    const Meanwhile& meanwhile) {
    const int64_t row_bytes = stride * 4, panel_row_bytes = PANEL * 4;
    const char *upper = (const char*)rows, *lower = upper + UNIT_ROWS * row_bytes;
    begin_sums<HAS_TWO>(c, false);
    // A quarter of a step's lines.
    const auto fetch = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int line = 0; line < 8; line++) _mm_prefetch(next + line * 64, _MM_HINT_T1);
        next += 8 * 64;
    };
    const int64_t part = (height * 16 + steps - 1) / steps;
    int64_t done = 0;
    for (int64_t step = 0; step < steps; step += 16) {
        const char* columns = panel + step * panel_row_bytes;
        _tile_loadd(4, upper + step * 4, row_bytes);
        fetch();
        // What is read once should not take the first cache's place from what is read again.
        _tile_stream_loadd(6, columns, panel_row_bytes);
        fetch();
        _tile_stream_loadd(7, columns + 64, panel_row_bytes);
        fetch();
        if (HAS_TWO) _tile_loadd(5, lower + step * 4, row_bytes);
        fetch();
        add_to_sums<IS_INTEGER, HAS_TWO>();
        if (done < height) {
            const int64_t from = done;
            done = from + part < height ? from + part : height;
            meanwhile(from, done);
        }
    }
    store_sums<HAS_TWO>(c);
}

}  // namespace amx
#pragma GCC pop_options
