// Rotary position embedding (RoFormer, arXiv:2104.09864), in place: cosines and sines are rounded to the dtype of q, and the
// products and sums are taken in it.
//
// A block of threads takes one token; a thread turns one pair of numbers at a time, for all heads of q and then of k.

#include "primitives.h"

namespace {

template <typename T>
__device__ float rounded(float x) {
    return to_float(from_float<T>(x));
}

template <typename T>
__global__ void rotary(T* q, T* k, const int64_t* positions, const float* cos_sin, int64_t q_stride, int64_t k_stride,
                       int64_t cos_sin_stride, int num_heads, int num_kv_heads, int head_size, int half_size, bool is_neox) {
    const int64_t token = blockIdx.x;
    const float* cosines = cos_sin + positions[token] * cos_sin_stride;
    const float* sines = cosines + half_size;
    for (int i = threadIdx.x; i < (num_heads + num_kv_heads) * half_size; i += blockDim.x) {
        const int head = i / half_size, pair = i % half_size;
        T* numbers = head < num_heads ? q + token * q_stride + head * head_size
                                      : k + token * k_stride + (head - num_heads) * head_size;
        T& first = numbers[is_neox ? pair : 2 * pair];
        T& second = numbers[is_neox ? pair + half_size : 2 * pair + 1];
        const float cosine = rounded<T>(cosines[pair]), sine = rounded<T>(sines[pair]);
        const float a = to_float(first), b = to_float(second);
        first = from_float<T>(rounded<T>(a * cosine) - rounded<T>(b * sine));
        second = from_float<T>(rounded<T>(b * cosine) + rounded<T>(a * sine));
    }
}

}  // namespace

EXPORT int cacheflow_rotary(void* q, void* k, const int64_t* positions, const float* cos_sin, int64_t q_stride,
                            int64_t k_stride, int64_t cos_sin_stride, int num_tokens, int num_heads, int num_kv_heads,
                            int head_size, int half_size, int is_neox, int dtype, int device, void* stream) {
    if (num_tokens == 0) return 0;
    const OnDevice guard(device);
    const int work = (num_heads + num_kv_heads) * half_size, threads = work < 512 ? (work + 31) / 32 * 32 : 512;
    const auto turn = [&](auto kernel, auto* typed_q) {
        return launch(kernel, dim3(num_tokens), threads, 0, stream, typed_q, static_cast<decltype(typed_q)>(k), positions,
                      cos_sin, q_stride, k_stride, cos_sin_stride, num_heads, num_kv_heads, head_size, half_size, is_neox != 0);
    };
    if (dtype == FLOAT16) return turn(rotary<__half>, static_cast<__half*>(q));
    if (dtype == BFLOAT16) return turn(rotary<__nv_bfloat16>, static_cast<__nv_bfloat16*>(q));
    return turn(rotary<float>, static_cast<float*>(q));
}
