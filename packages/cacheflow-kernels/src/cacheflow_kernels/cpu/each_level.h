// Compiles the file named SOURCE once per instruction set, each time in a namespace of the set's name and with LANES, the
// floats of one vector. SOURCE includes this header and guards its kernels by `#ifdef LANES`. One binary then holds every
// level, whatever machine it is built on, and the caller says which one runs.
#include "elements.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#define LANES 8
#define HAS_BF16_DOT 0
#include "vectors.h"
#include SOURCE
#undef LANES
#undef HAS_BF16_DOT
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
#define LANES 16
#define HAS_BF16_DOT 0
#include "vectors.h"
#include SOURCE
#undef LANES
#undef HAS_BF16_DOT
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,amx-tile,amx-bf16,prefer-vector-width=512")
namespace avx512bf16 {
#define LANES 16
#define HAS_BF16_DOT 1
#include "vectors.h"
#include SOURCE
#undef LANES
#undef HAS_BF16_DOT
}
#pragma GCC pop_options
