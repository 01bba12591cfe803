// The least code that reaches a CPU's peak in bfloat16 products, to measure the machine by: weights packed in panels of 32
// columns with pairs of k interleaved, a register tile of up to 12 rows times two vectors, float32 out, no bias, no tails.
// bench_linear.py compiles and calls it. It needs AVX512_BF16, an even k and a multiple of 32 columns.
#include <immintrin.h>

#include <cstdint>

template <int ROWS>
static void tile(const uint16_t* x, const char* w, int64_t k, float* out, int64_t n) {
    __m512 sum[ROWS][2] = {};
    for (int64_t i = 0; i < k; i += 2, w += 128) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w), w1 = (__m512bh)_mm512_loadu_si512(w + 64);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(x + row * k + i));
            sum[row][0] = _mm512_dpbf16_ps(sum[row][0], w0, pair);
            sum[row][1] = _mm512_dpbf16_ps(sum[row][1], w1, pair);
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++) {
        _mm512_storeu_ps(out + row * n, sum[row][0]);
        _mm512_storeu_ps(out + row * n + 16, sum[row][1]);
    }
}

extern "C" void probe_linear(const uint16_t* x, const char* weight, int64_t m, int64_t k, int64_t n, float* out) {
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < n / 32; p++) {
        const char* panel = weight + p * k * 64;
        int64_t row = 0;
        for (; row + 12 <= m; row += 12) tile<12>(x + row * k, panel, k, out + row * n + p * 32, n);
        for (; row + 8 <= m; row += 8) tile<8>(x + row * k, panel, k, out + row * n + p * 32, n);
        for (; row + 4 <= m; row += 4) tile<4>(x + row * k, panel, k, out + row * n + p * 32, n);
        for (; row < m; row++) tile<1>(x + row * k, panel, k, out + row * n + p * 32, n);
    }
}

// Reads memory as fast as it can be read: the sum of the words, so that nothing is left out.
extern "C" int64_t probe_read(const char* memory, int64_t num_bytes) {
    int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t start = 0; start < num_bytes; start += 4096) {
        __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int64_t i = start; i < start + 4096; i += 64) sum = _mm512_add_epi64(sum, _mm512_loadu_si512(memory + i));
        total += _mm512_reduce_add_epi64(sum);
    }
    return total;
}
