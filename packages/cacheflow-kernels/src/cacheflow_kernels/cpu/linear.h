// A packed matrix, and what each level of instruction sets has for it. linear.cpp and linear_kernel.h agree on this.
#pragma once
#include <cstdint>

// Output columns of a panel. A panel holds every k of its columns, k outermost; columns past the last are zeros.
constexpr int PANEL = 32;
constexpr int STRIP = 16;
constexpr int MAX_TILE_ROWS = 12;

// Bytes between a line of weights that is asked for, into the second cache, and the one that is multiplied, where weights come
// from memory. All products of SmolLM2-135M for one row, on two threads with huge pages: 8.3 ms with 1 KiB at level avx512bf16,
// 7.8 with 2, 7.4 with 6; into the first cache 8.3, 8.1 and 8.6. With AMX 2 to 16 KiB differ by less than the noise.
constexpr int64_t STREAM_AHEAD = 6 << 10;

// Likewise of scales and of minimums, of which int4 has a line for 512 bytes of weights; other distances were not measured.
constexpr int64_t SCALES_AHEAD = 768;

// How a panel lies in memory: in 4-byte items, of which each is a column's float32, pair of k in bfloat16, or four k in bytes.
// Grouped integers lie in strips of 16 columns, two to a panel. GROUPED_INT8 is bytes, [k][16]. GROUPED_INT4 is [k / 8][16]
// items of 8 k, each from 0 to 15: four even k in the low 16 bits, the lowest in the lowest, and the odd ones in the high.
// DYNAMIC_INT8 is of weights that were turned as quantise_row turns activations: see reference.py, rotate_blocks.
enum Form : int32_t { PLAIN_FLOAT32 = 0, PLAIN_BFLOAT16 = 1, GROUPED_INT8 = 2, GROUPED_INT4 = 3, DYNAMIC_INT8 = 4 };

// Items of k numbers of which each item holds so many: padded with zeros to a multiple of 16, which fits every level.
static inline int64_t padded_items(int64_t k, int64_t numbers) { return (k + 16 * numbers - 1) / (16 * numbers) * 16; }

struct Linear {
    const void* weight;    // [num_panels] panels
    const void* scales;    // grouped: [num_panels][2][groups of padded k][16] float16; DYNAMIC_INT8: [num_panels][32] float32
    const void* minimums;  // GROUPED_INT4: like scales, what a 0 stands for
    const int32_t* sums;   // DYNAMIC_INT8: [num_panels][32], each column's sum over k
    const float* bias;     // [num_panels][32], or null
    int64_t num_panels;
    int64_t in_features;   // k
    int64_t out_features;  // columns of the result
    int64_t group_size;    // grouped: k that share a scale, a multiple of 32
    int32_t form;
    int32_t is_bfloat16;   // activations and result; otherwise they are float32
    int32_t is_gated;      // a panel holds 16 gates and the 16 ups that belong to them; the result is silu(gate) * up
};

// The threads that share out a product's panels: which of them calls, and how many there are.
struct Team {
    int64_t index, size;

    void wait() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
};

// Rows of activations: at(row) is one of them, until the thread asks for another.
struct Rows {
    const void* (*at_row)(const void* source, int64_t row);
    const void* source;

    const char* at(int64_t row) const { return (const char*)at_row(source, row); }
};

// Products for threads that are in a team already. Each lays out all rows for itself, so that it waits for nobody before it
// multiplies, and no row comes from another core's cache then.
namespace shared_products {

// Whether there are such products.
bool exist(const Linear& l);
bool exist(const Linear& gate_up, const Linear& down);

// A thread's columns of the product: out [rows][out_features].
void multiply(const Linear& l, const Rows& x, int64_t rows, void* out, const Team& team);

// Memory of the calling thread for the rows between gate_up and down, which the team shares.
char* inner_memory(const Linear& gate_up, const Linear& down, int64_t rows);

// Its columns of both products, of down times (gate_up times x).
void multiply_both(
    const Linear& gate_up, const Linear& down, const Rows& x, int64_t rows, char* inner, void* out, const Team& team);

}  // namespace shared_products

// Of the padded k.
static inline int64_t num_groups(const Linear& l) {
    return (2 * padded_items(l.in_features, 2) + l.group_size - 1) / l.group_size;
}

// The product of a few rows of activations, `stride` 4-byte items apart, and a panel, into c [rows][32]. Products are added in
// the order of k, whatever the number of rows, so that a row's result does not depend on the others. Meanwhile the tile fetches
// its share of what comes next: it begins at `next`, and a step's part is next_step bytes.
using Tile =
    void (*)(const void* rows, int64_t stride, const void* panel, int64_t steps, float* c, const char* next, int64_t next_step);

// The product of a few rows of bfloat16 and a strip of grouped integers, likewise. Integers are multiplied as they are, and a
// group's sum by its scale; row_sums [rows][groups] are those of the activations, which the minimums multiply.
using GroupedTile = void (*)(
    const Linear&, int64_t panel, int strip, const int32_t* rows, int64_t stride, const float* row_sums, const char* unpacked,
    float* c);

// One level's versions. A tile's function is found by its rows, less one.
struct LinearKernels {
    Tile float32[MAX_TILE_ROWS];
    Tile bfloat16[MAX_TILE_ROWS];
    Tile integer[MAX_TILE_ROWS];
    GroupedTile grouped[2][MAX_TILE_ROWS];  // of bytes, of 4 bits; where has_bfloat16_products
    void (*sum_groups)(const void* row, int64_t size, int64_t group_size, float* out);  // there too
    void (*unpack_to_float32[2])(const Linear&, int64_t panel, float* out);
    void (*widen_row)(const void* x, int64_t size, float* out);
    float (*quantise_row[2])(const void* x, int64_t size, float* turned, uint8_t* out);  // of float32, of bfloat16
    void (*finish)(const Linear&, int64_t panel, int64_t rows, const float* row_scales, const float* c, void* out);
    int64_t tile_rows;           // of the highest tile whose sums fit the registers
    bool has_bfloat16_products;  // the bfloat16 tile takes pairs of bfloat16 activations; otherwise float32 ones
};

// What the matrix unit has for grouped integers.
struct MatrixUnitKernels {
    GroupedTile grouped[2][16];
    void (*grouped_stream[2][16])(
        const Linear&, int64_t begin, int64_t end, const int32_t* rows, int64_t stride, const float* row_sums, void* out);
    void (*grouped_row[2])(const Linear&, int64_t begin, int64_t end, const float* row, const float* row_sums, void* out);
    void (*unpack[2])(const Linear&, int64_t panel, char* out);
};
