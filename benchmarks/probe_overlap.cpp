// Which work overlaps with reading memory: 256 MiB are streamed into tile registers by two threads, asked for 24 KiB ahead, with
// extra work of one kind for each 2 KiB; the same where all of it is in the first cache.
//
//     g++ -O2 -fopenmp -march=sapphirerapids benchmarks/probe_overlap.cpp -o probe_overlap && ./probe_overlap
#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

constexpr int64_t STEP = 2048, AHEAD = 24 << 10, BYTES = 256 << 20, HUGE_PAGE = 2 << 20, THREADS = 2, RUNS = 5;
constexpr int64_t NEAR = 4096, FAR = 512 << 10;  // bytes of what is read besides: in the first cache, in the second

enum Kind { NOTHING, NEAR_TILES, FAR_TILES, PRODUCTS, NEAR_VECTORS, FMAS };

struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static const Config CONFIG;

// Streams `bytes` from `memory`, or the first 32 KiB of it again and again.
template <Kind KIND, int COUNT>
void stream(const char* memory, int64_t bytes, bool is_near, const char* besides) {
    _tile_loadconfig(&CONFIG);
    __m512 sums[8] = {}, one = _mm512_set1_ps(1.0f), read;
    int64_t place = 0;
    for (int64_t at = 0; at < bytes; at += STEP) {
        const char* from = memory + (is_near ? at % (16 * STEP) : at);
        for (int line = 0; line < 32; line++) _mm_prefetch(from + (is_near ? 0 : AHEAD) + line * 64, _MM_HINT_T1);
        _tile_stream_loadd(6, from, 128);
        _tile_stream_loadd(7, from + 64, 128);
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; i++) {
            if (KIND == NEAR_TILES || KIND == FAR_TILES) {
                _tile_loadd(4, besides + place, 64);
                place = (place + 1024) % (KIND == NEAR_TILES ? NEAR : FAR);
            }
            if (KIND == PRODUCTS) {
                if (i % 4 == 0) _tile_dpbf16ps(0, 4, 5);
                if (i % 4 == 1) _tile_dpbf16ps(1, 4, 5);
                if (i % 4 == 2) _tile_dpbf16ps(2, 4, 5);
                if (i % 4 == 3) _tile_dpbf16ps(3, 4, 5);
            }
            if (KIND == NEAR_VECTORS) asm volatile("vmovdqa64 %1, %0" : "=v"(read) : "m"(*(const __m512*)(besides + i % 64 * 64)));
            if (KIND == FMAS) asm volatile("vfmadd231ps %1, %1, %0" : "+v"(sums[i % 8]) : "v"(one));
        }
    }
    _tile_release();
}

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <Kind KIND, int COUNT>
void measure(const char* name, const char* memory, const char* besides) {
    double medians[2];
    for (bool is_near : {false, true}) {
        std::vector<double> times;
        for (int run = 0; run < RUNS; run++) {
            const double start = now();
#pragma omp parallel num_threads(THREADS)
            {
                const int64_t thread = omp_get_thread_num();
                stream<KIND, COUNT>(memory + thread * (BYTES / THREADS), BYTES / THREADS, is_near, besides + thread * FAR);
            }
            times.push_back(1e3 * (now() - start));
        }
        std::sort(times.begin(), times.end());
        medians[is_near] = times[RUNS / 2];
    }
    std::printf("%-34s x %3d: %5.1f ms from memory, %5.1f in the first cache\n", name, COUNT, medians[0], medians[1]);
}

int main() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return std::puts("There is no AMX here."), 1;
    char* memory = (char*)std::aligned_alloc(HUGE_PAGE, BYTES + HUGE_PAGE);
    char* besides = (char*)std::aligned_alloc(HUGE_PAGE, HUGE_PAGE);
    madvise(memory, BYTES + HUGE_PAGE, MADV_HUGEPAGE);
    std::memset(memory, 0, BYTES + HUGE_PAGE);
    std::memset(besides, 0, HUGE_PAGE);
    measure<NOTHING, 0>("nothing", memory, besides);
    measure<NEAR_TILES, 8>("tiles of the first cache", memory, besides);
    measure<FAR_TILES, 4>("tiles of the second cache", memory, besides);
    measure<FAR_TILES, 8>("tiles of the second cache", memory, besides);
    measure<PRODUCTS, 8>("products", memory, besides);
    measure<PRODUCTS, 12>("products", memory, besides);
    measure<NEAR_VECTORS, 128>("vectors of the first cache", memory, besides);
    measure<FMAS, 128>("multiplications and additions", memory, besides);
    measure<FMAS, 256>("multiplications and additions", memory, besides);
}
