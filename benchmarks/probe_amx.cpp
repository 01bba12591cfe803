// The peak of the matrix units in bfloat16: four sums, two tiles of each operand from the first cache, as a good kernel loads
// them. roofline.py compiles and calls it where the processor has AMX.
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
