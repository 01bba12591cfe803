// Writes a step's keys and values to their slots in the cache.
#include <cstring>

#include "elements.h"
#include "kv_cache.h"

namespace {

// Of keys. The slots of a step's tokens are in no cache: with one and two threads 8 tokens of 384 bytes took 7.0 and 6.9 us, 16
// 9.5 and 8.2, 32 15.8 and 11.4, 64 28.9 and 17.6.
constexpr int64_t MIN_PARALLEL_BYTES = 1 << 12;

}  // namespace

// k and v: [num_tokens, num_kv_heads, head_size], tokens {k,v}_stride elements apart, heads contiguous. The caches are
// [num_blocks, num_kv_heads, block_size, head_size], blocks block_stride elements apart. A negative slot is padding.
extern "C" void cf_store_kv(
    const Layer* layer, const char* k, int64_t k_stride, const char* v, int64_t v_stride, char* k_cache, char* v_cache,
    int64_t block_stride, const int64_t* slots, int64_t num_tokens) {
    const int64_t size = layer->dtype == FLOAT32 ? 4 : 2, row = layer->head_size * size, block_size = layer->block_size;
#pragma omp parallel for schedule(static) if (num_tokens * layer->num_kv_heads * row >= MIN_PARALLEL_BYTES)
    for (int64_t token = 0; token < num_tokens; token++) {
        if (slots[token] < 0) continue;
        const int64_t offset = slots[token] / block_size * block_stride * size + slots[token] % block_size * row;
        for (int64_t head = 0; head < layer->num_kv_heads; head++) {
            const int64_t to = offset + head * block_size * row;
            memcpy(k_cache + to, k + token * k_stride * size + head * row, row);
            memcpy(v_cache + to, v + token * v_stride * size + head * row, row);
        }
    }
}
