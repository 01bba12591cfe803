// A decoder's layers in one call from Python, or what lies between two attention calls: the products, norms, rotary embedding
// and attention of the kernels beside it, one after the other. A step of one stream spends a fifth of its time in calls
// otherwise.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kv_cache.h"
#include "linear.h"
#include "scratch.h"

extern "C" {
void cf_linear(const Linear* packed, const void* x, int64_t rows, int64_t stride, void* out, int64_t num_threads);
void cf_linear_twice(
    const Linear* gate_up, const Linear* down, const void* x, int64_t rows, int64_t stride, void* inner, void* out,
    int64_t num_threads);
void cf_rms_norm(
    const void* x, int64_t x_stride, const void* weight, void* out, int64_t num_rows, int64_t size, float eps, int32_t dtype);
void cf_fused_add_rms_norm(
    void* x, int64_t x_stride, void* residual, int64_t residual_stride, const void* weight, int64_t num_rows, int64_t size,
    float eps, int32_t dtype);
void cf_add_rms_norm_row(
    const void* x, void* residual, const void* weight, void* out, int64_t size, float eps, int32_t dtype);
void cf_rotary(
    void* q, int64_t q_stride, int64_t q_heads, void* k, int64_t k_stride, int64_t k_heads, const int64_t* positions,
    const float* cos_sin, int64_t num_tokens, int64_t head_size, int64_t rotary_size, int32_t is_neox, int32_t dtype);
void cf_store_kv(
    const Layer* layer, const char* k, int64_t k_stride, const char* v, int64_t v_stride, char* k_cache, char* v_cache,
    int64_t block_stride, const int64_t* slots, int64_t num_tokens);
void cf_paged_attention(
    const Batch* batch, const Layer* layer, const void* q, int64_t q_stride, const void* k_cache, const void* v_cache,
    int64_t block_stride, void* out);
}

// Rows that a thread takes from one attention call to the next: the weights are read anew for each chunk. Medians of three
// runs, three times, with prompts of 512 tokens: 6,340, 6,381 and 6,112 prompt tokens/s with 512, 6,249, 6,586 and 6,359 with
// 1,024; 256 was slower. Below MIN_CHUNK threads share out columns instead. A prompt of 256 tokens took 41.5 and 41.8 ms with
// 128, 38.7 and 40.7 with 256, 50.0 and 51.5 with 64; 512 was as 256.
constexpr int64_t CHUNK = 1024, MIN_CHUNK = 256, TILE = 16;

// Rows from which on threads that share out columns stay together from one attention call to the next, and so many threads that
// then norm and lay out all rows each for itself. Not measured with more than two.
constexpr int64_t MIN_TOGETHER = 65, MAX_TOGETHER = 4;

struct DecoderLayer {
    const void *attention_norm, *mlp_norm;
    const Linear *qkv, *out, *gate_up, *down;  // gate_up is gated: its result is silu(gate) * up
};

struct Decoder {
    const void* norm;  // behind the last layer
    const float* cos_sin;
    int64_t num_heads, num_kv_heads, head_size, rotary_size, hidden_size;
    float eps;
    int32_t is_neox, dtype;
};

// A step's memory, rows contiguous: x and residual [rows, hidden_size], qkv [rows, q + k + v], inner [rows, MLP size].
struct DecoderStep {
    char *x, *residual, *qkv, *inner;
    const int64_t* positions;
    int64_t rows, num_threads;
};

// What attention of a whole step wants besides: the batch, and for each layer its particulars and where its keys and values
// lie.
struct DecoderAttention {
    const Batch* batch;
    const int64_t* slots;  // [rows]
    const Layer* const* layers;
    char *const *keys, *const *values;
    int64_t block_stride;  // elements
    char* out;             // [rows, q], contiguous
};

namespace {

thread_local Scratch row_memory, residual_memory;

int64_t element_size(const Decoder& d) { return d.dtype ? 2 : 4; }

int64_t begin_of(int64_t rows, const Team& team) { return rows * team.index / team.size; }

// The rows from `first` on.
DecoderStep part_of(const Decoder& d, const DecoderStep& s, const DecoderLayer& any, int64_t first, int64_t rows) {
    const auto row = [&](char* from, int64_t size) { return from + first * size * element_size(d); };
    return {
        row(s.x, d.hidden_size), row(s.residual, d.hidden_size), row(s.qkv, any.qkv->out_features),
        row(s.inner, any.down->in_features), s.positions + first, rows, 1};
}

void turn(const Decoder& d, const DecoderStep& s, const DecoderLayer& layer) {
    const int64_t row = layer.qkv->out_features, q_bytes = d.num_heads * d.head_size * element_size(d);
    cf_rotary(
        s.qkv, row, d.num_heads, s.qkv + q_bytes, row, d.num_kv_heads, s.positions, d.cos_sin, s.rows, d.head_size,
        d.rotary_size, d.is_neox, d.dtype);
}

void run(
    const Decoder& d, const DecoderStep& s, const DecoderLayer* done, const char* attended, int64_t stride,
    const DecoderLayer* next) {
    const int64_t size = d.hidden_size;
    const auto add_norm = [&](const void* weight) {
        cf_fused_add_rms_norm(s.x, size, s.residual, size, weight, s.rows, size, d.eps, d.dtype);
    };
    if (done) {
        cf_linear(done->out, attended, s.rows, stride, s.x, s.num_threads);
        add_norm(done->mlp_norm);
        cf_linear_twice(done->gate_up, done->down, s.x, s.rows, size, s.inner, s.x, s.num_threads);
        add_norm(next ? next->attention_norm : d.norm);
    } else {
        cf_rms_norm(s.residual, size, next->attention_norm, s.x, s.rows, size, d.eps, d.dtype);
    }
    if (!next) return;
    cf_linear(next->qkv, s.x, s.rows, size, s.qkv, s.num_threads);
    turn(d, s, *next);
}

// Whether run_together can do it, of which all layers are alike.
bool can_be_together(const DecoderLayer& layer) {
    using shared_products::exist;
    return exist(*layer.qkv) && exist(*layer.out) && exist(*layer.gate_up, *layer.down);
}

// Rows of x, added to those of the residual, and the norm of that.
struct Normed {
    const Decoder& d;
    const char* x;  // null: there is nothing to add
    char* residual;
    const void* weight;

    Rows rows() const {
        return {
            [](const void* source, int64_t row) -> const void* {
                const Normed& n = *(const Normed*)source;
                const int64_t size = n.d.hidden_size, bytes = size * element_size(n.d), at = row * bytes;
                char* out = row_memory.get(bytes);
                cf_add_rms_norm_row(n.x ? n.x + at : nullptr, n.residual + at, n.weight, out, size, n.d.eps, n.d.dtype);
                return out;
            },
            this};
    }
};

struct Strided {
    const char* first;
    int64_t bytes;

    Rows rows() const {
        return {
            [](const void* source, int64_t row) -> const void* {
                const Strided& s = *(const Strided*)source;
                return s.first + row * s.bytes;
            },
            this};
    }
};

// As run, for a thread of a team, which has all of the residual for itself. Without `next` x is its rows of the result.
void run_together(
    const Decoder& d, const DecoderStep& s, const DecoderLayer* done, const char* attended, int64_t stride,
    const DecoderLayer* next, const Team& team, char* residual, char* inner) {
    const auto norm = [&](const char* x, const void* weight) { return Normed{d, x, residual, weight}; };
    if (done) {
        const Strided given{attended, stride * element_size(d)};
        shared_products::multiply(*done->out, given.rows(), s.rows, s.x, team);
        team.wait();
        const Normed normed = norm(s.x, done->mlp_norm);
        shared_products::multiply_both(*done->gate_up, *done->down, normed.rows(), s.rows, inner, s.x, team);
        team.wait();
    }
    const int64_t first = begin_of(s.rows, team), rows = begin_of(s.rows, {team.index + 1, team.size}) - first;
    const int64_t at = first * d.hidden_size * element_size(d);
    if (!next)
        return cf_fused_add_rms_norm(
            s.x + at, d.hidden_size, residual + at, d.hidden_size, d.norm, rows, d.hidden_size, d.eps, d.dtype);
    const Normed normed = norm(done ? s.x : nullptr, next->attention_norm);
    shared_products::multiply(*next->qkv, normed.rows(), s.rows, s.qkv, team);
    team.wait();
    turn(d, part_of(d, s, *next, first, rows), *next);
}

// Rows do not meet: each thread takes its own through all of it, without waiting for the others in between.
void run_chunks(
    const Decoder& d, const DecoderStep& s, const DecoderLayer* done, const char* attended, int64_t stride,
    const DecoderLayer* next) {
    const DecoderLayer& any = done ? *done : *next;
    const bool is_together = can_be_together(any);
    const int64_t at_once = CHUNK * s.num_threads, rounds = s.rows < at_once ? 1 : (s.rows + at_once / 2) / at_once;
    const int64_t count = rounds * s.num_threads;
    const int64_t chunk = ((s.rows + count - 1) / count + TILE - 1) / TILE * TILE;
#pragma omp parallel for schedule(static) num_threads((int)s.num_threads)
    for (int64_t i = 0; i < count; i++) {
        const int64_t first = i * chunk, rows = std::min(chunk, s.rows - first);
        if (rows <= 0) continue;
        const DecoderStep part = part_of(d, s, any, first, rows);
        const char* from = done ? attended + first * stride * element_size(d) : nullptr;
        if (is_together)
            run_together(
                d, part, done, from, stride, next, {0, 1}, part.residual,
                shared_products::inner_memory(*any.gate_up, *any.down, rows));
        else
            run(d, part, done, from, stride, next);
    }
}

}  // namespace

// From the output of attention of the layer `done` (rows `stride` elements apart) to the queries, keys and values of `next`.
// Without `done` the step begins: residual holds the embeddings. Without `next` it ends: x is the normed result.
extern "C" void cf_decoder(
    const Decoder* decoder, const DecoderStep* step, const DecoderLayer* done, const void* attended, int64_t stride,
    const DecoderLayer* next) {
    (step->rows < MIN_CHUNK * step->num_threads ? run : run_chunks)(*decoder, *step, done, (const char*)attended, stride, next);
}

// All of a step: as many layers as `layers` has, and the norm behind them.
extern "C" void cf_whole_decoder(
    const Decoder* decoder, const DecoderStep* step, const DecoderLayer* layers, int64_t num_layers,
    const DecoderAttention* attention) {
    const Decoder& d = *decoder;
    const DecoderStep& s = *step;
    const DecoderAttention& a = *attention;
    const int64_t q_size = d.num_heads * d.head_size, k_size = d.num_kv_heads * d.head_size, row = q_size + 2 * k_size;
    const int64_t element = element_size(d), residual_bytes = s.rows * d.hidden_size * element;
    const bool has_chunks = s.rows >= MIN_CHUNK * s.num_threads;
    // Each thread keeps its residual from region to region, which want as many threads then.
    const bool is_together = !has_chunks && s.rows >= MIN_TOGETHER && s.num_threads <= MAX_TOGETHER && !omp_get_dynamic() &&
                             can_be_together(*layers);
    char *residuals = nullptr, *inner = nullptr;
    if (is_together) {
        residuals = residual_memory.get((s.num_threads - 1) * residual_bytes);
        inner = shared_products::inner_memory(*layers->gate_up, *layers->down, s.rows);
    }
    const auto store = [&](int64_t i, int64_t first, int64_t rows) {
        const char *k = s.qkv + (first * row + q_size) * element, *v = k + k_size * element;
        cf_store_kv(a.layers[i], k, row, v, row, a.keys[i], a.values[i], a.block_stride, a.slots + first, rows);
    };
    for (int64_t i = 0; i <= num_layers; i++) {
        const DecoderLayer *done = i > 0 ? layers + i - 1 : nullptr, *next = i < num_layers ? layers + i : nullptr;
        if (is_together) {
#pragma omp parallel num_threads((int)s.num_threads)
            {
                const Team team{omp_get_thread_num(), omp_get_num_threads()};
                char* residual = team.index ? residuals + (team.index - 1) * residual_bytes : s.residual;
                if (!done && team.index) memcpy(residual, s.residual, residual_bytes);
                run_together(d, s, done, a.out, q_size, next, team, residual, inner);
                const int64_t first = begin_of(s.rows, team), last = begin_of(s.rows, {team.index + 1, team.size});
                if (next) store(i, first, last - first);
            }
        } else {
            (has_chunks ? run_chunks : run)(d, s, done, a.out, q_size, next);
            if (next) store(i, 0, s.rows);
        }
        if (next) cf_paged_attention(a.batch, a.layers[i], s.qkv, row, a.keys[i], a.values[i], a.block_stride, a.out);
    }
}
