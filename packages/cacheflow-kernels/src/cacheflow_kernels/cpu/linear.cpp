// Packed matrix products: x [rows][in_features] times a Linear, with bias and gated activation, on all cores.
//
// The activations are copied once, in the type that is multiplied, unless they are few and have it. Then threads share out the
// panels, and each panel meets every tile of rows while it is in its core's cache. Grouped integers are dequantised into that
// cache, a panel at a time.
#include "linear.h"

#include <cstdlib>
#include <utility>

#define SOURCE "linear_kernel.h"
#include "each_level.h"
#include "linear_matrix_unit.h"

namespace {

// Memory that a thread keeps from call to call.
class Scratch {
public:
    ~Scratch() { std::free(memory_); }

    char* get(int64_t num_bytes) {
        if (num_bytes > size_) {
            std::free(memory_);
            size_ = (num_bytes + 4095) / 4096 * 4096;
            memory_ = std::aligned_alloc(64, (size_t)size_);
            if (!memory_) std::abort();
        }
        return (char*)memory_;
    }

private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

thread_local Scratch row_scratch, scale_scratch, own_scratch;

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

    bool is_grouped() const { return l.form == GROUPED_INT8 || l.form == GROUPED_INT4; }
    bool takes_bfloat16() const { return l.is_bfloat16 && l.form != DYNAMIC_INT8 && kernels.has_bfloat16_products; }
    int64_t padded_rows() const {
        return tiles || rows < amx::UNIT_ROWS ? rows : (rows + amx::UNIT_ROWS - 1) / amx::UNIT_ROWS * amx::UNIT_ROWS;
    }

    // Nearly equal tiles keep the sums of each many; the matrix unit's are full as far as they can be.
    int64_t tile_start(int64_t i) const { return tiles ? rows * i / num_tiles : i < num_tiles ? i * tile_rows : rows; }

    Tile tile_of(int64_t height) const {
        if (tiles) return tiles[height - 1];
        const bool has_two = height > amx::UNIT_ROWS;
        if (l.form == DYNAMIC_INT8) return has_two ? amx::tile<true, true> : amx::tile<true, false>;
        return has_two ? amx::tile<false, true> : amx::tile<false, false>;
    }

    // Whether x has the type that is multiplied.
    bool is_ready() const { return takes_bfloat16() || (!l.is_bfloat16 && l.form != DYNAMIC_INT8); }

    // Whether x can be read where it lies: one tile, which needs no padding.
    bool is_in_place() const {
        return num_tiles == 1 && is_ready() && l.in_features * (l.is_bfloat16 ? 2 : 4) == items * 4 && stride_bytes % 4 == 0 &&
               (tiles || rows <= amx::UNIT_ROWS);
    }

    void copy_row(int64_t row, int32_t* activations) const {
        const int64_t k = l.in_features, row_bytes = k * (l.is_bfloat16 ? 2 : 4);
        const char* from = x + row * stride_bytes;
        char* to = (char*)(activations + row * stride);
        int64_t written = row_bytes;
        if (is_ready()) {
            memcpy(to, from, row_bytes);
        } else if (l.form == DYNAMIC_INT8) {
            float* wide = (float*)own_scratch.get(k * 4);
            if (l.is_bfloat16)
                kernels.widen_row(from, k, wide);
            else
                memcpy(wide, from, k * 4);
            row_scales[row] = kernels.quantise_row(wide, k, (uint8_t*)to);
            written = k;
        } else {
            kernels.widen_row(from, k, (float*)to);
            written = k * 4;
        }
        memset(to + written, 0, items * 4 - written);
    }

    void multiply_panel(int64_t p) const {
        const char* panel = (const char*)l.weight + p * panel_bytes;
        const char* next = panel + panel_bytes;
        if (is_grouped()) {
            char* unpacked = own_scratch.get(steps * PANEL * 4);
            const bool is_int4 = l.form == GROUPED_INT4;
            (takes_bfloat16() ? kernels.unpack_to_bfloat16[is_int4] : kernels.unpack_to_float32[is_int4])(l, p, unpacked);
            panel = unpacked;
        }
        alignas(64) float c[amx::TILE_ROWS * PANEL];
        const int64_t next_step = panel_bytes / (num_tiles * steps);
        for (int64_t i = 0; i < num_tiles; i++) {
            const int64_t start = tile_start(i), height = tile_start(i + 1) - start;
            tile_of(height)(activations + start * stride, stride, panel, steps, c, next + panel_bytes * i / num_tiles, next_step);
            if (l.form == DYNAMIC_INT8) kernels.scale(l, p, height, row_scales + start, c);
            kernels.finish(l, p, height, c, out + start * l.out_features * (l.is_bfloat16 ? 2 : 4));
        }
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
        product.tile_rows = amx::TILE_ROWS;
    }
    product.num_tiles = (rows + product.tile_rows - 1) / product.tile_rows;
    product.row_scales = (float*)scale_scratch.get(rows * 4);
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
    // Below that, starting the other threads takes longer than they save.
    const bool is_large = rows * k * l.num_panels * PANEL >= 1 << 17;
    // A single tile's rows are copied sooner than threads can wait for each other.
    if (copy && product.num_tiles == 1)
        for (int64_t row = 0; row < rows; row++) product.copy_row(row, copy);
#pragma omp parallel num_threads(is_large ? (int)num_threads : 1)
    {
        if (product.num_tiles > 1) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++) product.copy_row(row, copy);
        }
        if (!product.tiles) amx::begin(rows);
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < l.num_panels; p++) product.multiply_panel(p);
        if (!product.tiles) amx::end();
    }
}
