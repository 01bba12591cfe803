// Copies whole blocks within a cache, all sources being read before any destination is written.
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

// One thread took 4.6 us for 64 KiB and two 5.2; for 128 KiB it was 6.9 and 5.7 us, for 512 KiB 24.2 and 13.8.
constexpr int64_t MIN_PARALLEL_BYTES = 1 << 17;

}  // namespace

// pairs: [num_pairs, 2], source and destination.
extern "C" void cf_copy_blocks(char* cache, int64_t block_bytes, const int64_t* pairs, int64_t num_pairs) {
    const std::unique_ptr<char[]> read(new char[num_pairs * block_bytes]);
    const bool is_large = num_pairs * block_bytes >= MIN_PARALLEL_BYTES;
#pragma omp parallel for schedule(static) if (is_large)
    for (int64_t i = 0; i < num_pairs; i++) memcpy(&read[i * block_bytes], cache + pairs[2 * i] * block_bytes, block_bytes);
#pragma omp parallel for schedule(static) if (is_large)
    for (int64_t i = 0; i < num_pairs; i++) memcpy(cache + pairs[2 * i + 1] * block_bytes, &read[i * block_bytes], block_bytes);
}
