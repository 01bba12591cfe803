// The peak of the matrix units in bfloat16: four sums, two tiles of each operand from the first cache, as a good kernel loads
// them; and what is left of it where rows and weights of a product lie in the second cache. roofline.py compiles and calls it
// where the processor has AMX.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static const Config config;

// Multiplies and adds 32 x 32 x 32 numbers `times` times on each thread; 0 if Linux does not lend the units.
extern "C" int probe_amx(int64_t times) {
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return 0;
#pragma omp parallel
    {
        alignas(64) static thread_local char tiles[4][1024], out[1024];
        asm volatile("ldtilecfg %0" ::"m"(config));
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < times; i++) {
            _tile_loadd(4, tiles[0], 64);
            _tile_loadd(6, tiles[1], 64);
            _tile_loadd(7, tiles[2], 64);
            _tile_loadd(5, tiles[3], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out, 64);
        _tile_release();
    }
    return 1;
}

// 256 rows of 576 numbers times 16 panels of 32 columns, `times` times on each thread: 884 KiB, of which a panel fits the first
// cache. Rows pass by it. Nothing is done with the sums.
extern "C" void probe_amx_second_cache(int64_t times) {
    constexpr int64_t ROW_BYTES = 576 * 2, ROWS = 256, PANEL_BYTES = 576 * 64, PANELS = 16;
#pragma omp parallel
    {
        alignas(64) static thread_local char rows[ROWS * ROW_BYTES], panels[PANELS * PANEL_BYTES], out[1024];
        asm volatile("ldtilecfg %0" ::"m"(config));
        for (int64_t i = 0; i < times * PANELS; i++) {
            const char* panel = panels + i % PANELS * PANEL_BYTES;
            for (int64_t row = 0; row < ROWS; row += 32) {
                const char* x = rows + row * ROW_BYTES;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int64_t k = 0; k < ROW_BYTES; k += 64) {
                    _tile_stream_loadd(4, x + k, ROW_BYTES);
                    _tile_loadd(6, panel + k * 32, 128);
                    _tile_loadd(7, panel + k * 32 + 64, 128);
                    _tile_stream_loadd(5, x + 16 * ROW_BYTES + k, ROW_BYTES);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, out, 64);
            }
        }
        _tile_release();
    }
}
