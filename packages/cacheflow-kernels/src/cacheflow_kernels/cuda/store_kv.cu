// Writes a step's keys and values at their slots of the paged cache, [num_blocks, num_kv_heads, block_size, head_size].
//
// A block of threads takes one token; a thread copies a word of its key and of its value at a time: 16 bytes, or 2 where
// addresses or strides are no multiples of 16.

#include "primitives.h"

namespace {

struct Store {
    const char* k;  // [num_tokens, num_kv_heads, head_size]
    const char* v;
    char* k_cache;
    char* v_cache;
    const int64_t* slot_mapping;
    int64_t k_stride, k_head_stride, v_stride, v_head_stride, k_block_stride, v_block_stride;  // bytes
    int num_kv_heads, block_size, head_bytes;
};

template <typename Word>
__global__ void store_kv(const Store a) {
    const int64_t token = blockIdx.x, place = a.slot_mapping[token];
    if (place < 0) return;
    const int64_t block = place / a.block_size, slot = place % a.block_size;
    const int words = a.head_bytes / static_cast<int>(sizeof(Word));
    for (int i = threadIdx.x; i < a.num_kv_heads * words; i += blockDim.x) {
        const int head = i / words, offset = i % words * static_cast<int>(sizeof(Word));
        const int64_t inside = (head * static_cast<int64_t>(a.block_size) + slot) * a.head_bytes + offset;
        *reinterpret_cast<Word*>(a.k_cache + block * a.k_block_stride + inside) =
            *reinterpret_cast<const Word*>(a.k + token * a.k_stride + head * a.k_head_stride + offset);
        *reinterpret_cast<Word*>(a.v_cache + block * a.v_block_stride + inside) =
            *reinterpret_cast<const Word*>(a.v + token * a.v_stride + head * a.v_head_stride + offset);
    }
}

}  // namespace

EXPORT int cacheflow_store_kv(const void* k, const void* v, void* k_cache, void* v_cache, const int64_t* slot_mapping,
                              int64_t k_stride, int64_t k_head_stride, int64_t v_stride, int64_t v_head_stride,
                              int64_t k_block_stride, int64_t v_block_stride, int num_tokens, int num_kv_heads, int block_size,
                              int head_bytes, int device, void* stream) {
    if (num_tokens == 0) return 0;
    const Store arguments{static_cast<const char*>(k), static_cast<const char*>(v), static_cast<char*>(k_cache),
                          static_cast<char*>(v_cache), slot_mapping, k_stride, k_head_stride, v_stride, v_head_stride,
                          k_block_stride, v_block_stride, num_kv_heads, block_size, head_bytes};
    int64_t bits = k_stride | k_head_stride | v_stride | v_head_stride | k_block_stride | v_block_stride | head_bytes;
    for (const void* address : {k, v, static_cast<const void*>(k_cache), static_cast<const void*>(v_cache)}) {
        bits |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(address));
    }
    const bool is_wide = bits % 16 == 0;
    const int work = num_kv_heads * (head_bytes / (is_wide ? 16 : 2)), threads = work < 512 ? (work + 31) / 32 * 32 : 512;
    const OnDevice guard(device);
    return launch(is_wide ? store_kv<uint4> : store_kv<uint16_t>, dim3(num_tokens), threads, 0, stream, arguments);
}
