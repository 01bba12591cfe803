// Which instruction sets this machine has, and which of them the kernels are to use.
#include "level.h"

#include <sys/syscall.h>
#include <unistd.h>

// Linux lends the registers of the matrix unit to processes that ask.
static bool may_use_matrix_unit() {
    const int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

extern "C" int cf_machine_level() {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return NONE;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl")))
        return AVX2;
    if (!(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))) return AVX512;
    const bool has_amx =
        __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8");
    return has_amx && may_use_matrix_unit() ? AMX : AVX512BF16;
}

int cf_current_level = cf_machine_level();

// Takes a level up to the machine's; kernels that are called from now on use it.
extern "C" void cf_set_level(int wanted) { cf_current_level = wanted; }
