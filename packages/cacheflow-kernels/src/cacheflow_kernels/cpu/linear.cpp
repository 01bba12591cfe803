// Packed matrix products: x [rows][in_features] times a Linear, with bias and gated activation, on all cores.
//
// The activations are copied once, in the type that is multiplied, unless they have it and are few. Then threads share out the
// panels. Few rows meet a panel when it comes from memory, and what counts is that memory never waits; of more, each panel
// meets every tile of a block of rows while both are in its core's cache. Grouped integers meet bfloat16 rows as they are, and
// float32 rows dequantised into that cache, a panel at a time.
#include "linear.h"
#include "scratch.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <type_traits>
#include <utility>

#define SOURCE "linear_kernel.h"
#include "each_level.h"
#include "linear_matrix_unit.h"
#include "linear_round_rows.h"
#include "linear_many_rows.h"
#include "linear_many_bytes.h"

namespace {

thread_local Scratch row_scratch, scale_scratch, sum_scratch, own_scratch;

// Bytes of a block of activations: they stay in a core's cache of 2 MiB beside the panels that pass by. The four products of a
// layer of 576 with 2,048 rows took 12.2 ms without blocks, and 6.5 with blocks and without a copy of the rows.
constexpr int64_t BLOCK_BYTES = 768 << 10;

// Rows that threads share out to round them to bytes, though a single tile holds them. Gate and up of SmolLM2-135M ran 24 rows
// at 11 times the vectors' speed before, and at 13.4 times so.
constexpr int64_t MIN_SHARED_ROWS = 16;

// Of products that linear_many_rows.h has: more than a tile of the matrix unit. What SmolLM2-135M does between attention calls
// took 7.8 ms for 17 rows and 8.1 for 32, by it 8.5 and 8.2.
constexpr int64_t MIN_MANY_ROWS = amx::TILE_ROWS + 1;

// Rows that meet one strip of grouped integers while it is in the nearest cache.
constexpr int64_t GROUPED_ROWS = 64;

// Of the control register of vectors: numbers below the smallest normal one are zeros, as they are to the matrix unit.
constexpr unsigned FLUSHES_DENORMALS = 0x8040;

// One product: what it reads and writes, and how it is cut.
struct Product {
    const Linear& l;
    const LinearKernels& kernels;
    const char* x;
    int64_t stride_bytes;
    char* out;
    int64_t rows;
    const Tile* tiles = nullptr;  // by the rows of a tile, less one; null: the matrix unit multiplies
    int64_t tile_rows = 0;        // of the highest tile
    int64_t num_tiles = 0;
    int64_t items = 0;            // 4-byte items of a row, which end with zeros where k does not fill them
    int64_t stride = 0;           // of rows, in items
    int64_t steps = 0;            // of a tile's function
    int64_t panel_bytes = 0;      // of the weight as it is packed
    const int32_t* activations = nullptr;
    float* row_scales = nullptr;
    float* row_sums = nullptr;  // GROUPED_INT4 with bfloat16: [rows][num_groups]

    bool is_grouped() const { return l.form == GROUPED_INT8 || l.form == GROUPED_INT4; }
    bool sums_groups() const { return l.form == GROUPED_INT4 && takes_bfloat16(); }
    bool takes_bfloat16() const { return l.is_bfloat16 && l.form != DYNAMIC_INT8 && kernels.has_bfloat16_products; }
    int64_t padded_rows() const {
        if (tiles || is_streamed() || rows < amx::UNIT_ROWS) return rows;
        return (rows + amx::UNIT_ROWS - 1) / amx::UNIT_ROWS * amx::UNIT_ROWS;
    }

    // Nearly equal tiles keep the sums of each many; the matrix unit's are full as far as they can be.
    int64_t tile_start(int64_t i) const { return tiles ? rows * i / num_tiles : i < num_tiles ? i * tile_rows : rows; }

    // Whether x has the type that is multiplied.
    bool is_ready() const { return takes_bfloat16() || (!l.is_bfloat16 && l.form != DYNAMIC_INT8); }

    // Whether x can be read where it lies.
    bool is_in_place() const {
        return is_ready() && l.in_features * (l.is_bfloat16 ? 2 : 4) == items * 4 && stride_bytes % 4 == 0 &&
               num_tiles == 1;
    }

    void copy_row(int64_t row, int32_t* activations) const {
        const int64_t k = l.in_features, row_bytes = k * (l.is_bfloat16 ? 2 : 4);
        const char* from = x + row * stride_bytes;
        char* to = (char*)(activations + row * stride);
        int64_t written = row_bytes;
        if (is_ready()) {
            memcpy(to, from, row_bytes);
        } else if (l.form == DYNAMIC_INT8) {
            float* turned = (float*)own_scratch.get(k * 4);
            row_scales[row] = kernels.quantise_row[l.is_bfloat16](from, k, turned, (uint8_t*)to);
            written = k;
        } else {
            kernels.widen_row(from, k, (float*)to);
            written = k * 4;
        }
        memset(to + written, 0, items * 4 - written);
    }

    // Whether the matrix unit turns rows while they are rounded: all rows of a type, or their bits would differ.
    bool is_rounded_by_unit() const { return !tiles && l.form == DYNAMIC_INT8 && l.is_bfloat16; }

    void round_rows(int64_t first, int64_t count, int32_t* activations) const {
        amx::round_rows<avx512bf16::BYTE_OFFSET>(
            {x + first * stride_bytes, stride_bytes, 64}, count, l.in_features, (uint8_t*)(activations + first * stride), stride * 4, 64,
            row_scales + first);
    }

    void sum_row(int64_t row) const {
        kernels.sum_groups(activations + row * stride, 2 * items, l.group_size, row_sums + row * num_groups(l));
    }

    // The panel and rows of the tiles from `begin` to before `end`.
    void multiply_panel(int64_t p, int64_t begin, int64_t end) const {
        const char* panel = (const char*)l.weight + p * panel_bytes;
        const char* next = panel + panel_bytes;
        const bool is_int4 = l.form == GROUPED_INT4, has_units = !tiles;
        char* unpacked = nullptr;
        if (is_grouped() && !takes_bfloat16()) {
            panel = own_scratch.get(steps * PANEL * 4);
            kernels.unpack_to_float32[is_int4](l, p, (float*)panel);
        } else if (is_grouped() && has_units) {
            unpacked = own_scratch.get(steps * PANEL * 4);
            avx512bf16::MATRIX_UNIT_KERNELS.unpack[is_int4](l, p, unpacked);
        }
        alignas(64) float c[GROUPED_ROWS * PANEL];
        if (is_grouped() && takes_bfloat16()) {
            const GroupedTile* grouped = has_units ? avx512bf16::MATRIX_UNIT_KERNELS.grouped[is_int4] : kernels.grouped[is_int4];
            const int64_t tiles_at_once = GROUPED_ROWS / tile_rows;
            for (int64_t i = begin; i < end; i += tiles_at_once) {
                const int64_t first = tile_start(i), last = std::min(i + tiles_at_once, end);
                for (int strip = 0; strip < 2; strip++)
                    for (int64_t j = i; j < last; j++) {
                        const int64_t start = tile_start(j);
                        grouped[tile_start(j + 1) - start - 1](
                            l, p, strip, activations + start * stride, stride, row_sums + start * num_groups(l), unpacked,
                            c + (start - first) * PANEL);
                    }
                finish(p, first, tile_start(last), c);
            }
            return;
        }
        const bool is_alone = end - begin == 1;
        const int64_t next_step = panel_bytes / ((end - begin) * steps);
        for (int64_t i = begin; i < end; i++) {
            const int64_t start = tile_start(i), height = tile_start(i + 1) - start;
            const char* fetched = is_alone ? panel + STREAM_AHEAD : next + panel_bytes * (i - begin) / (end - begin);
            tiles[height - 1](activations + start * stride, stride, panel, steps, c, fetched, next_step);
            finish(p, start, start + height, c);
        }
    }

    // Whether all rows are a single tile of the matrix unit, which meets a panel when it comes from memory.
    bool is_streamed() const { return !tiles && num_tiles == 1; }

    // The panels from `begin` to before `end`, where is_streamed.
    void stream_panels(int64_t begin, int64_t end) const {
        if (is_grouped()) {
            const MatrixUnitKernels& unit = avx512bf16::MATRIX_UNIT_KERNELS;
            const bool is_int4 = l.form == GROUPED_INT4;
            if (rows > 1) return unit.grouped_stream[is_int4][rows - 1](l, begin, end, activations, stride, row_sums, out);
            float* row = (float*)own_scratch.get(items * 8);
            kernels.widen_row(activations, 2 * items, row);
            return unit.grouped_row[is_int4](l, begin, end, row, row_sums, out);
        }
        const auto choose = [&](auto is_integer) {
            constexpr bool I = is_integer.value;
            if (rows > amx::UNIT_ROWS)
                stream_tile<I, true>(begin, end);
            else
                stream_tile<I, false>(begin, end);
        };
        if (l.form == DYNAMIC_INT8)
            choose(std::true_type{});
        else
            choose(std::false_type{});
    }

    // Vectors finish a tile while the unit multiplies the next one, so that memory does not wait for them. A model's products
    // of 32 rows took 9.8 ms with each finished before the next, and 8.7 so.
    template <bool IS_INTEGER, bool HAS_TWO>
    void stream_tile(int64_t begin, int64_t end) const {
        alignas(64) float sums[2][amx::TILE_ROWS * PANEL];
        for (int64_t p = begin; p < end; p++) {
            const char* panel = (const char*)l.weight + p * panel_bytes;
            amx::stream<IS_INTEGER, HAS_TWO>(
                activations, stride, rows, panel, steps, sums[p % 2], panel + STREAM_AHEAD, [&](int64_t from, int64_t to) {
                    if (p > begin) finish(p - 1, from, to, sums[(p - 1) % 2] + from * PANEL);
                });
        }
        finish(end - 1, 0, rows, sums[(end - 1) % 2]);
    }

    void finish(int64_t p, int64_t start, int64_t end, const float* c) const {
        kernels.finish(l, p, end - start, row_scales + start, c, out + start * l.out_features * (l.is_bfloat16 ? 2 : 4));
    }
};

const LinearKernels& kernels_in_use() {
    switch (level()) {
        case AVX512BF16: return avx512bf16::LINEAR_KERNELS;
        case AVX512: return avx512::LINEAR_KERNELS;
        default: return avx2::LINEAR_KERNELS;
    }
}

}  // namespace

// out [rows][out_features] = x times the packed matrix. Rows of x are `stride` elements apart; there is at least one.
extern "C" void cf_linear(
    const Linear* packed, const void* x, int64_t rows, int64_t stride, void* out, int64_t num_threads) {
    const Linear& l = *packed;
    const LinearKernels& kernels = kernels_in_use();
    Product product{l, kernels, (const char*)x, stride * (l.is_bfloat16 ? 2 : 4), (char*)out, rows};
    const int64_t k = l.in_features, ones = padded_items(k, 1), pairs = padded_items(k, 2), fours = padded_items(k, 4);
    switch (l.form) {
        case PLAIN_FLOAT32:
            product.tiles = kernels.float32;
            product.items = product.steps = ones;
            product.panel_bytes = ones * PANEL * 4;
            break;
        case PLAIN_BFLOAT16:
            product.tiles = kernels.bfloat16;
            product.items = product.takes_bfloat16() ? pairs : 2 * pairs;
            product.steps = pairs;
            product.panel_bytes = pairs * PANEL * 4;
            break;
        case DYNAMIC_INT8:
            product.tiles = kernels.integer;
            product.items = product.steps = fours;
            product.panel_bytes = fours * PANEL * 4;
            break;
        default:
            product.tiles = product.takes_bfloat16() ? kernels.bfloat16 : kernels.float32;
            product.items = product.steps = product.takes_bfloat16() ? pairs : 2 * pairs;
            product.panel_bytes = pairs * PANEL * (l.form == GROUPED_INT4 ? 1 : 2);
    }
    product.tile_rows = kernels.tile_rows;
    if (has_matrix_unit() && (product.takes_bfloat16() || l.form == DYNAMIC_INT8)) {
        product.tiles = nullptr;
        product.tile_rows = product.is_grouped() ? amx::UNIT_ROWS : amx::TILE_ROWS;
    }
    if (!product.tiles && !product.is_grouped() && rows >= MIN_MANY_ROWS)
        return many_rows::multiply(l, x, rows, product.stride_bytes, out, num_threads);
    product.num_tiles = (rows + product.tile_rows - 1) / product.tile_rows;
    product.row_scales = (float*)scale_scratch.get(rows * 4);
    if (product.sums_groups()) product.row_sums = (float*)sum_scratch.get(rows * num_groups(l) * 4);
    int32_t* copy = nullptr;
    if (product.is_in_place()) {
        product.activations = (const int32_t*)x;
        product.stride = product.stride_bytes / 4;
    } else {
        // An odd number of cache lines, or rows would lie in the same set of the cache where k is a power of two.
        product.stride = (product.items / 16 | 1) * 16;
        copy = (int32_t*)row_scratch.get(product.padded_rows() * product.stride * 4);
        product.activations = copy;
        memset(copy + rows * product.stride, 0, (product.padded_rows() - rows) * product.stride * 4);
    }
    const int64_t block = std::max<int64_t>(1, BLOCK_BYTES / (product.tile_rows * product.items * 4));
    // Below that, starting the other threads takes longer than they save.
    const bool is_large = rows * k * l.num_panels * PANEL >= 1 << 17;
    // Threads get rows in pieces of 16 if the matrix unit rounds them.
    const int64_t at_once = product.is_rounded_by_unit() ? amx::UNIT_ROWS : 1;
    const auto prepare = [&](int64_t row) {
        if (product.is_rounded_by_unit())
            product.round_rows(row, std::min(at_once, rows - row), copy);
        else if (copy)
            product.copy_row(row, copy);
        if (product.sums_groups()) product.sum_row(row);
    };
    // A single tile's rows are copied sooner than threads can wait for each other; rounding them to bytes takes longer.
    const bool is_shared = product.num_tiles > 1 || (l.form == DYNAMIC_INT8 && rows >= MIN_SHARED_ROWS);
    if (!is_shared)
        for (int64_t row = 0; row < rows; row += at_once) prepare(row);
#pragma omp parallel num_threads(is_large ? (int)num_threads : 1)
    {
        if (is_shared && (copy || product.row_sums)) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row += at_once) prepare(row);
        }
        if (!product.tiles) amx::begin(std::min(rows, product.tile_rows));
        // For those rows that vectors multiply in its place.
        const unsigned control = _mm_getcsr();
        if (product.is_grouped() && !product.tiles) _mm_setcsr(control | FLUSHES_DENORMALS);
        if (product.is_streamed()) {
            const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
            const int64_t begin = l.num_panels * i / n, end = l.num_panels * (i + 1) / n;
            if (begin < end) product.stream_panels(begin, end);
        } else {
            for (int64_t first = 0; first < product.num_tiles; first += block) {
                const int64_t last = std::min(first + block, product.num_tiles);
#pragma omp for schedule(static) nowait
                for (int64_t p = 0; p < l.num_panels; p++) product.multiply_panel(p, first, last);
            }
        }
        _mm_setcsr(control);
        if (!product.tiles) amx::end();
    }
}

// Two products, one after the other: out [rows][out_features of down] = down times (gate_up times x). `inner` is memory for the
// rows between them.
extern "C" void cf_linear_twice(
    const Linear* gate_up, const Linear* down, const void* x, int64_t rows, int64_t stride, void* inner, void* out,
    int64_t num_threads) {
    if (has_matrix_unit() && rows >= MIN_MANY_ROWS && many_rows::can_be_one(*gate_up, *down))
        return many_rows::multiply_both(*gate_up, *down, x, rows, stride * 2, out, num_threads);
    cf_linear(gate_up, x, rows, stride, inner, num_threads);
    cf_linear(down, inner, rows, down->in_features, out, num_threads);
}

bool shared_products::exist(const Linear& l) {
    return has_matrix_unit() && (l.form == PLAIN_BFLOAT16 || l.form == DYNAMIC_INT8) && l.is_bfloat16;
}

bool shared_products::exist(const Linear& gate_up, const Linear& down) {
    return has_matrix_unit() && many_rows::can_be_one(gate_up, down);
}

char* shared_products::inner_memory(const Linear& gate_up, const Linear& down, int64_t rows) {
    return many_rows::inner_memory.get(many_rows::inner_bytes(gate_up, down, rows));
}

void shared_products::multiply(const Linear& l, const Rows& x, int64_t rows, void* out, const Team& team) {
    const int64_t row_bytes = l.out_features * 2;
    const int64_t at_once = many_rows::block_rows(rows, many_rows::lines_of(l));
    many_rows::for_each_own_block(l, x, rows, at_once, team, [&](many_rows::Block block, int64_t first) {
        block.results = {(char*)out + first * row_bytes, row_bytes};
        many_rows::multiply_share(block, team);
    });
}

void shared_products::multiply_both(
    const Linear& gate_up, const Linear& down, const Rows& x, int64_t rows, char* inner, void* out, const Team& team) {
    const int64_t at_once = many_rows::rows_of_both(gate_up, rows);
    many_rows::for_each_own_block(gate_up, x, rows, at_once, team, [&](const many_rows::Block& block, int64_t first) {
        many_rows::multiply_both_share(block, down, inner, first, (char*)out, team);
        // The next block's rows lie in the same memory.
        if (first + block.rows < rows) team.wait();
    });
}
