// The instruction sets that a kernel may use, lowest first. Each level includes those below it.
#pragma once

enum Level { NONE = 0, AVX2 = 1, AVX512 = 2, AVX512BF16 = 3, AMX = 4 };

// What is in use: the machine's level, or a lower one that cf_set_level chose.
extern int cf_current_level;

// The level of vector instructions: AMX adds none.
static inline int level() { return cf_current_level < AVX512BF16 ? cf_current_level : AVX512BF16; }

static inline bool has_matrix_unit() { return cf_current_level >= AMX; }
