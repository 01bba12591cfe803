// Causal attention over a paged KV cache (PagedAttention, arXiv:2309.06180).
//
// A prompt chunk is blocked with an online softmax (FlashAttention-2, arXiv:2307.08691): a tile of query rows, which are some
// query tokens times all query heads of one KV head, meets the keys in blocks of KEYS. A block's keys and values are packed
// once, whatever their place in the cache, and multiply all rows of the tile: the cache is streamed once per tile. With a
// matrix unit blocks have MATRIX_KEYS, and all of it is turned (paged_prompt_kernel.h).
//
// A decode (one query token) is split into items of SPLIT keys, which are read where they lie; what comes next is asked for
// meanwhile.
//
// A sequence's result depends on nothing but that sequence: tiles, blocks and splits lie at fixed positions in it.
// It does not know who stored the keys, nor anything of layers and steps.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <omp.h>
#include <vector>

#include "elements.h"
#include "kv_cache.h"

namespace {

// Measured with bfloat16 on two threads of a Xeon with AMX. Prompts: 512 and 2,048 tokens, 32/8 and 8/8 heads x 128, 9/3 x 64.
constexpr int KEYS = 256;       // keys of a prompt's block: prompts took 1 to 12 % less time than with 128
// Words between rows of packed keys, scores and probabilities: an odd number of cache lines, or 16 rows share 4 sets of
// a cache. Prompts of 128 to 2,048 tokens (9/3 heads x 64) took 1 to 2 % less time.
constexpr int KEY_STRIDE = KEYS + 16;
constexpr int TILE_ROWS = 384;  // query rows of a prompt's tile: 1 to 15 % less time than with 192
constexpr int CHUNK_ROWS = 32;  // of them are worked on at once. Keys that none sees are skipped
// Keys of a prompt's block where there is a matrix unit: with their values they fill a third of the first cache. 512 and 2,048
// tokens (9/3 heads x 64) on one thread took 413 us and 5.8 ms, 417 and 5.9 with 128, 441 and 6.6 with 256.
constexpr int MATRIX_KEYS = 64;
// Keys of one work item of a decode; fixed, so that batches change no result. 16 sequences of 2,000 tokens (9/3 heads x 64, 30
// layers), whose blocks lay anywhere, took 32.3 ms with 384 and 320, and 35.3 with 512, as what is asked for fills too much
// of the second cache; in consecutive blocks 31.3, 31.4 and 31.7. 8,192 tokens of 8/8 x 128: 20.1, 20.0 and 20.5.
constexpr int SPLIT = 384;
// Keys that the matrix unit takes at a time: a decode finds them by one address. An item of 302 keys and 3 query rows took
// 3.1 us from L2, 0.85 of them to write an address for every key; 2.4 us now.
constexpr int CHUNK_KEYS = 16;
constexpr int MAX_DECODE_ROWS = 8;  // query heads of a KV head up to which a decode reads the cache in place; not tuned
constexpr int MAX_HEAD_SIZE = 256;
// Keys and values that a thread takes at once, and asks for while it works on those before: both fit its second cache (2 MiB).
// They come in larger pieces than those of one head: 64 sequences of 302 tokens (9/3 heads x 64, 30 layers) took 18.6 ms with
// 3 heads at once and 22.4 with one. More do not pay: 8,192 tokens (32/8 x 128, 16 layers) took 23.1 ms with one head of
// 256 KiB and 27.2 with two.
constexpr int64_t UNIT_BYTES = 288 << 10;
// Lines that are asked for in one go, and the shares of a unit's that are asked for while scores are computed and softened; the
// others are while values are added up. 64 sequences as above took 18.1 to 18.4 ms with 8 or 16 lines and 25 to 42 % during
// scores, 19.0 with 60 %, 18.8 with 4 lines; 20.1 with 32 lines where 16 took 19.2.
constexpr int ASKED_AT_ONCE = 16;
constexpr int SCORE_PERCENT = 30, SOFTEN_PERCENT = 15;
// Multiply-adds. One and two threads took the same time at 0.7e5 (8.0 and 8.1 us); at 1.3e5 it was 10.9 and 10.1 us, at 2.9e5
// 13.0 and 11.6.
constexpr double MIN_PARALLEL = 1e5;

struct Cache {
    const void *k, *v;  // [num_blocks, num_kv_heads, block_size, head_size], blocks `stride` elements apart
    int64_t stride;
};

// Query tokens [first, last) of a sequence (counted from its first query token) against keys [key_begin, key_end).
struct Item {
    int64_t seq, first, last, key_begin, key_end;
    int64_t partial;  // where an unfinished result goes; -1: the item sees all keys and writes the output
};

// What a thread takes at once: heads of items, counted from the first item's first.
struct Unit {
    int64_t first, last;
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
