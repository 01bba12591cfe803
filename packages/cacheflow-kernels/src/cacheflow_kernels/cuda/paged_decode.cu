// Attention of sequences with one query token over a paged KV cache (PagedAttention, arXiv:2309.06180), split over the context.
// Other sequences are passed over.
//
// A block of threads takes one sequence, one KV head with up to 16 of its query heads, and one split: 512 positions that begin
// at a multiple of 512. Its warps go through the split's tiles of 16 positions in turn, each with its own ring of tiles in
// shared memory, so that they never wait for one another before the end. The query heads of a group are the rows of the
// matrices that the tensor cores multiply; smaller groups leave rows unused, which costs less than the memory that the kernel
// waits for (FlashAttention-2, arXiv:2307.08691, is the recurrence). A second kernel combines the splits.
//
// Where splits and tiles begin depends on positions alone, so a sequence's result is the same, bit for bit, in every batch.
//
// The cache is [num_blocks, num_kv_heads, block_size, head_size]:
//
//     block table of the sequence            one KV head's part of a block: contiguous
//     position / block_size -> block ------> [slot 0: head_size numbers][slot 1: ...]...[slot block_size - 1]

#include "primitives.h"

namespace {

constexpr int SPLIT = 512;
constexpr int TILE = 16;
constexpr int HEADS = 16;
// GPUs of 8.6, 8.9 and 12.0 give 99 KiB to a block of threads, 2 KiB of which hold block numbers.
constexpr int MAX_SHARED_BYTES = 96 * 1024;
constexpr float LOG2_E = 1.4426950408889634f;

struct Decode {
    const void* q;  // [num_rows, num_heads, head_size], rows q_stride apart
    const void* k_cache;
    const void* v_cache;
    void* out;          // [num_rows, num_heads, head_size]
    float* partial;     // [num_seqs, num_heads, max_splits, head_size]: each split's own result
    float* log_sums;    // [num_seqs, num_heads, max_splits]: log2 of the sum of 2^score over a split
    const int* block_tables;
    const int* seq_lens;
    const int* query_start_loc;  // null: every sequence has one row
    const float* alibi_slopes;   // null: none
    int64_t q_stride;
    int64_t k_block_stride;
    int64_t v_block_stride;
    int64_t table_stride;
    int num_heads;
    int num_kv_heads;
    int block_shift;
    int max_splits;
    int window;  // 0: none
    float scale;
    float soft_cap;  // 0: none
};

// The only query row of a sequence, and the positions that it attends to: from `begin` up to `end`.
struct Context {
    int64_t row;
    int begin;
    int end;

    __device__ int first_split() const { return begin / SPLIT; }
    __device__ int num_splits() const { return end > begin ? (end - 1) / SPLIT - first_split() + 1 : 0; }
};

// Returns whether the sequence has exactly one query row.
__device__ bool find_context(const Decode& a, int sequence, Context& context) {
    const int* starts = a.query_start_loc;
    if (starts != nullptr && starts[sequence + 1] - starts[sequence] != 1) return false;
    context.row = starts != nullptr ? starts[sequence] : sequence;
    context.end = a.seq_lens[sequence];
    context.begin = a.window > 0 && context.end > a.window ? context.end - a.window : 0;
    return true;
}

template <int HEAD_SIZE>
struct Layout {
    static constexpr int CHUNKS = HEAD_SIZE / 8;  // of 16 bytes
    // Eight rows of a matrix must lie in different banks: chunks are permuted where a row is a multiple of 128 bytes, and rows
    // are padded where it isn't.
    static constexpr bool IS_PERMUTED = HEAD_SIZE % 64 == 0;
    static constexpr int ROW = IS_PERMUTED ? HEAD_SIZE : HEAD_SIZE + 8;
    static constexpr int TILE_SIZE = TILE * ROW;
    static constexpr int WARPS = HEAD_SIZE > 192 ? 2 : 4;
    static constexpr int STAGE_BYTES = WARPS * 2 * TILE_SIZE * 2;
    static constexpr int STAGES = MAX_SHARED_BYTES / STAGE_BYTES < 4 ? MAX_SHARED_BYTES / STAGE_BYTES : 4;
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
    static_assert(STAGES >= 2, "one tile must arrive while another is used");
    static_assert(SHARED_BYTES >= WARPS * HEADS * (HEAD_SIZE + 2) * 4, "the warps' results reuse the tiles' memory");

    __device__ static int at(int row, int chunk) { return row * ROW + (IS_PERMUTED ? chunk ^ (row & 7) : chunk) * 8; }
};

template <typename T, int HEAD_SIZE>
__global__ void __launch_bounds__(Layout<HEAD_SIZE>::WARPS * 32) paged_decode_split(const Decode a) {
    using L = Layout<HEAD_SIZE>;
    const int sequence = blockIdx.x, split = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = a.num_heads / a.num_kv_heads, groups = (group + HEADS - 1) / HEADS;
    const int kv_head = blockIdx.y / groups, first_in_group = blockIdx.y % groups * HEADS;
    const int first_head = kv_head * group + first_in_group;
    const int num_heads = group - first_in_group < HEADS ? group - first_in_group : HEADS;

    Context context;
    if (!find_context(a, sequence, context)) return;
    T* out = static_cast<T*>(a.out) + (context.row * a.num_heads + first_head) * HEAD_SIZE;
    const int begin = context.begin > split * SPLIT ? context.begin : split * SPLIT;
    const int end = context.end < (split + 1) * SPLIT ? context.end : (split + 1) * SPLIT;
    if (begin >= end) {
        if (split == 0 && context.end <= 0) {
            for (int i = threadIdx.x; i < num_heads * HEAD_SIZE; i += L::WARPS * 32) out[i] = from_float<T>(0.0f);
        }
        return;
    }

    __shared__ int blocks[SPLIT];
    const int first_block = begin >> a.block_shift, num_blocks = ((end - 1) >> a.block_shift) - first_block + 1;
    const int* table = a.block_tables + sequence * a.table_stride + first_block;
    for (int i = threadIdx.x; i < num_blocks; i += L::WARPS * 32) blocks[i] = table[i];
    __syncthreads();

    T* ring = reinterpret_cast<T*>(dynamic_shared()) + warp * L::STAGES * 2 * L::TILE_SIZE;
    const T* k_cache = static_cast<const T*>(a.k_cache);
    const T* v_cache = static_cast<const T*>(a.v_cache);
    const int first_tile = begin / TILE + warp;
    const int last_tile = (end - 1) / TILE;
    const int num_tiles = last_tile < first_tile ? 0 : (last_tile - first_tile) / L::WARPS + 1;
    const int slot_mask = (1 << a.block_shift) - 1;

    // Starts the copy of this warp's i-th tile. Positions outside the split become zeros: what lies there may be no number.
    auto stage = [&](int i) {
        if (i < num_tiles) {
            T* k_tile = ring + i % L::STAGES * 2 * L::TILE_SIZE;
            T* v_tile = k_tile + L::TILE_SIZE;
            const int first = (first_tile + i * L::WARPS) * TILE;
#pragma unroll
            for (int j = 0; j < TILE * L::CHUNKS / 32; ++j) {
                const int in_tile = (j * 32 + lane) / L::CHUNKS, chunk = (j * 32 + lane) % L::CHUNKS;
                const int position = first + in_tile;
                const bool valid = position >= begin && position < end;
                const int64_t block = valid ? blocks[(position >> a.block_shift) - first_block] : 0;
                const int slot = position & slot_mask;
                const int64_t inside = ((static_cast<int64_t>(kv_head) << a.block_shift) + slot) * HEAD_SIZE + chunk * 8;
                copy_async(k_tile + L::at(in_tile, chunk), k_cache + block * a.k_block_stride + inside, valid);
                copy_async(v_tile + L::at(in_tile, chunk), v_cache + block * a.v_block_stride + inside, valid);
            }
        }
        copy_async_commit();
    };
#pragma unroll
    for (int i = 0; i < L::STAGES - 1; ++i) stage(i);

    const int fragment_row = lane / 4, fragment_column = lane % 4 * 2;
    uint32_t queries[HEAD_SIZE / 16][4];
    float slopes[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int head = fragment_row + half * 8;
        const bool is_used = head < num_heads;
        const T* q = static_cast<const T*>(a.q) + context.row * a.q_stride + (first_head + head) * HEAD_SIZE + fragment_column;
#pragma unroll
        for (int i = 0; i < HEAD_SIZE / 16; ++i) {
            queries[i][half] = is_used ? *reinterpret_cast<const uint32_t*>(q + i * 16) : 0u;
            queries[i][half + 2] = is_used ? *reinterpret_cast<const uint32_t*>(q + i * 16 + 8) : 0u;
        }
        if (is_used && a.alibi_slopes != nullptr) slopes[half] = a.alibi_slopes[first_head + head];
    }

    float result[L::CHUNKS][4] = {};
    float largest[2] = {-INFINITY, -INFINITY};
    float sums[2] = {0.0f, 0.0f};  // of this lane's columns
    for (int i = 0; i < num_tiles; ++i) {
        stage(i + L::STAGES - 1);
        copy_async_wait<L::STAGES - 1>();
        __syncwarp();
        const T* k_tile = ring + i % L::STAGES * 2 * L::TILE_SIZE;
        const T* v_tile = k_tile + L::TILE_SIZE;

        float scores[2][4] = {};
#pragma unroll
        for (int j = 0; j < HEAD_SIZE / 16; ++j) {
            uint32_t keys[4];
            load_matrices(keys, k_tile + L::at((lane & 7) + (lane >> 4) * 8, 2 * j + (lane >> 3 & 1)));
            multiply_add<T>(scores[0], queries[j], keys[0], keys[1]);
            multiply_add<T>(scores[1], queries[j], keys[2], keys[3]);
        }

        float tops[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int position = (first_tile + i * L::WARPS) * TILE + n * 8 + fragment_column + (e & 1);
                float score = scores[n][e] * a.scale;
                if (a.soft_cap > 0.0f) score = a.soft_cap * tanhf(score / a.soft_cap);
                score -= slopes[e >> 1] * static_cast<float>(context.end - 1 - position);
                scores[n][e] = position >= begin && position < end ? score * LOG2_E : -INFINITY;
                tops[e >> 1] = fmaxf(tops[e >> 1], scores[n][e]);
            }
        }
        float factors[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            tops[half] = fmaxf(tops[half], exchange(tops[half], 1));
            tops[half] = fmaxf(tops[half], exchange(tops[half], 2));
            tops[half] = fmaxf(tops[half], largest[half]);
            factors[half] = exp2f(largest[half] - tops[half]);
            largest[half] = tops[half];
            sums[half] *= factors[half];
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                scores[n][e] = exp2f(scores[n][e] - largest[e >> 1]);
                sums[e >> 1] += scores[n][e];
            }
        }
        const uint32_t probabilities[4] = {
            pack_pair<T>(scores[0][0], scores[0][1]),
            pack_pair<T>(scores[0][2], scores[0][3]),
            pack_pair<T>(scores[1][0], scores[1][1]),
            pack_pair<T>(scores[1][2], scores[1][3]),
        };
#pragma unroll
        for (int j = 0; j < HEAD_SIZE / 16; ++j) {
            uint32_t values[4];
            load_matrices_transposed(values, v_tile + L::at(lane & 15, 2 * j + (lane >> 4)));
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) result[2 * j + n][e] *= factors[e >> 1];
                multiply_add<T>(result[2 * j + n], probabilities, values[2 * n], values[2 * n + 1]);
            }
        }
        __syncwarp();
    }
    copy_async_wait<0>();
    __syncthreads();

    float* results = reinterpret_cast<float*>(dynamic_shared());  // [WARPS, HEADS, HEAD_SIZE]
    float* all_largest = results + L::WARPS * HEADS * HEAD_SIZE;  // [WARPS, HEADS]
    float* all_sums = all_largest + L::WARPS * HEADS;             // [WARPS, HEADS]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int head = warp * HEADS + fragment_row + half * 8;
        sums[half] += exchange(sums[half], 1);
        sums[half] += exchange(sums[half], 2);
        if (fragment_column == 0) {
            all_largest[head] = largest[half];
            all_sums[head] = sums[half];
        }
#pragma unroll
        for (int j = 0; j < L::CHUNKS; ++j) {
            float* target = results + head * HEAD_SIZE + j * 8 + fragment_column;
            target[0] = result[j][half * 2];
            target[1] = result[j][half * 2 + 1];
        }
    }
    __syncthreads();

    const bool is_whole = context.num_splits() == 1;
    for (int i = threadIdx.x; i < num_heads * HEAD_SIZE; i += L::WARPS * 32) {
        const int head = i / HEAD_SIZE, element = i % HEAD_SIZE;
        float top = -INFINITY, sum = 0.0f, value = 0.0f;
        for (int w = 0; w < L::WARPS; ++w) top = fmaxf(top, all_largest[w * HEADS + head]);
        for (int w = 0; w < L::WARPS; ++w) {
            const float factor = exp2f(all_largest[w * HEADS + head] - top);  // 0 for a warp that had no tile
            sum += factor * all_sums[w * HEADS + head];
            value += factor * results[(w * HEADS + head) * HEAD_SIZE + element];
        }
        value /= sum;
        if (is_whole) {
            out[i] = from_float<T>(value);
        } else {
            const int64_t place = (static_cast<int64_t>(sequence) * a.num_heads + first_head + head) * a.max_splits + split;
            a.partial[place * HEAD_SIZE + element] = value;
            if (element == 0) a.log_sums[place] = top + log2f(sum);
        }
    }
}

template <typename T>
__global__ void paged_decode_combine(const Decode a) {
    const int sequence = blockIdx.x, head = blockIdx.y, head_size = blockDim.x, element = threadIdx.x;
    Context context;
    if (!find_context(a, sequence, context)) return;
    const int num_splits = context.num_splits();
    if (num_splits <= 1) return;
    const int64_t first = (static_cast<int64_t>(sequence) * a.num_heads + head) * a.max_splits + context.first_split();
    float top = -INFINITY, sum = 0.0f, value = 0.0f;
    for (int i = 0; i < num_splits; ++i) top = fmaxf(top, a.log_sums[first + i]);
    for (int i = 0; i < num_splits; ++i) {
        const float weight = exp2f(a.log_sums[first + i] - top);
        sum += weight;
        value += weight * a.partial[(first + i) * head_size + element];
    }
    static_cast<T*>(a.out)[(context.row * a.num_heads + head) * head_size + element] = from_float<T>(value / sum);
}

template <typename T, int HEAD_SIZE>
int decode(const Decode& a, int num_seqs, void* stream) {
    using L = Layout<HEAD_SIZE>;
    const int group = a.num_heads / a.num_kv_heads;
    const dim3 grid(num_seqs, a.num_kv_heads * ((group + HEADS - 1) / HEADS), a.max_splits);
    const int error = launch(paged_decode_split<T, HEAD_SIZE>, grid, L::WARPS * 32, L::SHARED_BYTES, stream, a);
    if (error != 0 || a.max_splits == 1) return error;
    return launch(paged_decode_combine<T>, dim3(num_seqs, a.num_heads), HEAD_SIZE, 0, stream, a);
}

template <typename T>
int decode_of_size(const Decode& a, int num_seqs, int head_size, void* stream) {
    switch (head_size) {
        case 32: return decode<T, 32>(a, num_seqs, stream);
        case 64: return decode<T, 64>(a, num_seqs, stream);
        case 80: return decode<T, 80>(a, num_seqs, stream);
        case 96: return decode<T, 96>(a, num_seqs, stream);
        case 128: return decode<T, 128>(a, num_seqs, stream);
        case 160: return decode<T, 160>(a, num_seqs, stream);
        case 192: return decode<T, 192>(a, num_seqs, stream);
        case 256: return decode<T, 256>(a, num_seqs, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

// Positions of one split: how many splits a caller makes room for follows from it.
EXPORT int cacheflow_split_size() { return SPLIT; }

EXPORT int cacheflow_paged_decode(const void* q, const void* k_cache, const void* v_cache, void* out, float* partial,
                                  float* log_sums, const int* block_tables, const int* seq_lens, const int* query_start_loc,
                                  const float* alibi_slopes, int64_t q_stride, int64_t k_block_stride, int64_t v_block_stride,
                                  int64_t table_stride, int num_seqs, int num_heads, int num_kv_heads, int head_size,
                                  int block_size, int max_splits, int window, float scale, float soft_cap, int dtype,
                                  int device, void* stream) {
    if (num_seqs == 0) return 0;
    int block_shift = 0;
    while ((1 << block_shift) < block_size) ++block_shift;
    const Decode arguments{q, k_cache, v_cache, out, partial, log_sums, block_tables, seq_lens, query_start_loc, alibi_slopes,
                           q_stride, k_block_stride, v_block_stride, table_stride, num_heads, num_kv_heads, block_shift,
                           max_splits, window, scale, soft_cap};
    const OnDevice guard(device);
    if (dtype == FLOAT16) return decode_of_size<__half>(arguments, num_seqs, head_size, stream);
    return decode_of_size<__nv_bfloat16>(arguments, num_seqs, head_size, stream);
}
