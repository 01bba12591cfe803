// Causal attention over a paged KV cache (PagedAttention, arXiv:2309.06180), blocked with an online softmax (FlashAttention-2,
// arXiv:2307.08691). One algorithm serves decodes and prompt chunks: a tile of query rows, which are some query tokens times
// all query heads of one KV head, meets the keys in blocks of KEYS. A block's keys and values are packed once, whatever their
// place in the cache, and multiply all rows of the tile from there, so the cache is streamed once per tile.
//
// A sequence's result depends on nothing but that sequence: tiles, blocks and splits lie at fixed positions in it.
// It does not know who stored the keys, nor anything of layers and steps.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "elements.h"
#include "kv_cache.h"

namespace {

constexpr int KEYS = 128;          // keys of one block: prompts took 18 % less time than with 64 on AMX, 3 % less without
constexpr int TILE_ROWS = 192;     // query rows of a prompt's tile: 2,048 tokens took 12 % less time than with 96
constexpr int SPLIT = 512;         // keys of one work item of a decode; fixed, so that batches change no result; not tuned
constexpr int MAX_HEAD_SIZE = 256;
constexpr double MIN_PARALLEL = 2e5;  // multiply-adds; estimated, not measured: below, starting the threads costs more

struct Cache {
    const void *k, *v;  // [num_blocks, num_kv_heads, block_size, head_size], blocks `stride` elements apart
    int64_t stride;
};

// Query tokens [first, last) of a sequence (counted from its first query token) against keys [key_begin, key_end).
struct Item {
    int64_t seq, first, last, key_begin, key_end;
    int64_t partial;  // where an unfinished result goes; -1: the item sees all keys and writes the output
};

// A decode whose keys were split: `count` unfinished results from number `partial` on.
struct Merge {
    int64_t token, partial, count;
};

struct Work {
    std::vector<Item> items;
    std::vector<Merge> merges;
    int64_t num_partials = 0;
    double multiply_adds = 0;
};

int64_t first_visible(int64_t position, int64_t window) { return window ? std::max<int64_t>(0, position - window + 1) : 0; }

Work divide(const Batch& batch, const Layer& layer) {
    Work work;
    const int64_t group = layer.num_heads / layer.num_kv_heads, tile = std::max<int64_t>(1, TILE_ROWS / group);
    auto add = [&](Item item) {
        work.items.push_back(item);
        const double pairs = double(item.last - item.first) * double(item.key_end - item.key_begin);
        work.multiply_adds += 2 * pairs * layer.num_heads * layer.head_size;
    };
    for (int64_t seq = 0; seq < batch.num_seqs; seq++) {
        const int64_t start = batch.query_start_loc[seq], count = batch.query_start_loc[seq + 1] - start;
        const int64_t before = batch.seq_lens[seq] - count;
        if (count == 1) {
            const int64_t begin = first_visible(before, layer.window), end = before + 1;
            const int64_t first_split = begin / SPLIT, num_splits = (end - 1) / SPLIT - first_split + 1;
            if (num_splits == 1) {
                add({seq, 0, 1, begin, end, -1});
                continue;
            }
            work.merges.push_back({start, work.num_partials, num_splits});
            for (int64_t split = first_split; split < first_split + num_splits; split++)
                add({seq, 0, 1, std::max(begin, split * SPLIT), std::min(end, (split + 1) * SPLIT), work.num_partials++});
            continue;
        }
        // The last tiles see the most keys: they go first, so that no thread is left with a long one.
        for (int64_t first = (count - 1) / tile * tile; first >= 0 && count; first -= tile) {
            const int64_t last = std::min(first + tile, count);
            add({seq, first, last, first_visible(before + first, layer.window), before + last, -1});
        }
    }
    return work;
}

// Memory of one thread that lives as long as the thread, aligned to cache lines; grows and never shrinks.
struct Scratch {
    char* data = nullptr;
    size_t size = 0;
    ~Scratch() { free(data); }
    char* of(size_t wanted) {
        if (wanted > size) {
            free(data);
            size = (wanted + 4095) / 4096 * 4096;
            data = static_cast<char*>(aligned_alloc(4096, size));
        }
        return data;
    }
};

thread_local Scratch scratch, partials;

alignas(64) const float ZEROS[MAX_HEAD_SIZE] = {};

}  // namespace

#define SOURCE "paged_attention_kernel.h"
#include "each_level.h"

// Shapes and dtypes have been checked by the caller. q rows are q_stride elements apart; out is contiguous.
extern "C" void cf_paged_attention(
    const Batch* batch, const Layer* layer, const void* q, int64_t q_stride, const void* k_cache, const void* v_cache,
    int64_t block_stride, void* out) {
    CALL_AT_LEVEL(paged_attention, layer->dtype, *batch, *layer, q, q_stride, Cache{k_cache, v_cache, block_stride}, out)
}
