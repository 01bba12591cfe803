// The element types of tensors and the instruction sets, as the Python side numbers them. Knows no operation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "level.h"

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Calls FUNCTION<T>(...) of one level's namespace with the element type that `dtype` names.
#define CALL_BY_DTYPE(NAMESPACE, FUNCTION, dtype, ...)                      \
    switch (dtype) {                                                        \
        case FLOAT32: NAMESPACE::FUNCTION<float>(__VA_ARGS__); break;       \
        case BFLOAT16: NAMESPACE::FUNCTION<BFloat16>(__VA_ARGS__); break;   \
        default: NAMESPACE::FUNCTION<Float16>(__VA_ARGS__);                 \
    }

// Calls the version of FUNCTION<T> that was compiled for the level in use.
#define CALL_AT_LEVEL(FUNCTION, dtype, ...)                                            \
    switch (level()) {                                                                 \
        case AVX512BF16: CALL_BY_DTYPE(avx512bf16, FUNCTION, dtype, __VA_ARGS__) break; \
        case AVX512: CALL_BY_DTYPE(avx512, FUNCTION, dtype, __VA_ARGS__) break;         \
        default: CALL_BY_DTYPE(avx2, FUNCTION, dtype, __VA_ARGS__)                      \
    }
