// What the kernels on a paged KV cache are told; cacheflow_kernels.cpu.attention mirrors these structures.
#pragma once

#include <cstdint>

// One step's batch.
struct Batch {
    const int32_t* query_start_loc;  // [num_seqs + 1]
    const int32_t* seq_lens;         // [num_seqs]
    const int32_t* block_tables;     // [num_seqs, table_stride]
    int64_t table_stride;
    int64_t num_seqs;
};

// One layer.
struct Layer {
    const float* alibi_slopes;  // [num_heads], or null
    int64_t num_heads, num_kv_heads, head_size, block_size;
    int64_t window;  // 0: none
    float scale;
    float soft_cap;  // 0: none
    int32_t dtype;
};
