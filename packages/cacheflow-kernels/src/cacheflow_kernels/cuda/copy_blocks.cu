// Copies whole blocks within many caches in one launch, and between two caches on any two devices.

#include "primitives.h"

namespace {

constexpr int MAX_CACHES = 128;  // their addresses travel as a kernel parameter, of which there are 4 KiB

struct Caches {
    char* addresses[MAX_CACHES];
};

// Block (x, y) of threads copies pair x of cache y.
__global__ void copy_blocks(const Caches caches, const int64_t* pairs, int64_t block_bytes) {
    char* cache = caches.addresses[blockIdx.y];
    const uint4* source = reinterpret_cast<const uint4*>(cache + pairs[2 * blockIdx.x] * block_bytes);
    uint4* destination = reinterpret_cast<uint4*>(cache + pairs[2 * blockIdx.x + 1] * block_bytes);
    for (int64_t i = threadIdx.x; i < block_bytes / 16; i += blockDim.x) destination[i] = source[i];
}

}  // namespace

// No destination may be a source as well. `caches`: addresses, in host memory; `pairs`: [num_pairs, 2], on the device.
EXPORT int cacheflow_copy_blocks(void* const* caches, int num_caches, const int64_t* pairs, int num_pairs, int64_t block_bytes,
                                 int device, void* stream) {
    if (num_pairs == 0) return 0;
    const OnDevice guard(device);
    for (int first = 0; first < num_caches; first += MAX_CACHES) {
        const int count = num_caches - first < MAX_CACHES ? num_caches - first : MAX_CACHES;
        Caches addresses{};
        for (int i = 0; i < count; ++i) addresses.addresses[i] = static_cast<char*>(caches[first + i]);
        const int error = launch(copy_blocks, dim3(num_pairs, count), 256, 0, stream, addresses, pairs, block_bytes);
        if (error != 0) return error;
    }
    return 0;
}

// Addresses and `pairs`, [num_pairs, 2], are in host memory. Runs of consecutive blocks are copied as one. Returns when all is
// copied: host memory may then be read and reused.
EXPORT int cacheflow_swap_blocks(const void* const* sources, void* const* destinations, int num_caches, const int64_t* pairs,
                                 int num_pairs, int64_t block_bytes, int device, void* stream) {
    const OnDevice guard(device);
    for (int cache = 0; cache < num_caches; ++cache) {
        const char* source = static_cast<const char*>(sources[cache]);
        char* destination = static_cast<char*>(destinations[cache]);
        for (int first = 0, last; first < num_pairs; first = last) {
            for (last = first + 1; last < num_pairs; ++last) {
                if (pairs[2 * last] != pairs[2 * last - 2] + 1 || pairs[2 * last + 1] != pairs[2 * last - 1] + 1) break;
            }
            const cudaError_t error =
                cudaMemcpyAsync(destination + pairs[2 * first + 1] * block_bytes, source + pairs[2 * first] * block_bytes,
                                (last - first) * block_bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream));
            if (error != cudaSuccess) return error;
        }
    }
    return cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
}
