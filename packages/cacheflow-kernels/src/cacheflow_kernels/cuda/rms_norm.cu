// RMSNorm (arXiv:1910.07467), alone and behind the addition of a residual: computed in float32, rounded to the dtype of x, then
// multiplied by the weight.
//
// A block of threads takes one row. How many threads depends on the row's size alone, and with it the order of the sum.

#include "primitives.h"

namespace {

// Without `residual`, a row of `x` is normalised into `out`. With it, `x + residual` replaces the residual and is normalised.
// A thread handles COUNT consecutive numbers at a time.
template <typename T, int COUNT>
__global__ void rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t x_stride, int64_t residual_stride, int size,
                         float eps) {
    using Numbers = Pack<T, COUNT>;
    const int64_t row = blockIdx.x;
    x += row * x_stride;
    out += row * size;
    if (residual != nullptr) residual += row * residual_stride;
    const T* total = residual != nullptr ? residual : x;

    float sum = 0.0f;
    for (int i = threadIdx.x * COUNT; i < size; i += blockDim.x * COUNT) {
        Numbers numbers = *reinterpret_cast<const Numbers*>(x + i);
        if (residual != nullptr) {
            const Numbers others = *reinterpret_cast<const Numbers*>(residual + i);
#pragma unroll
            for (int j = 0; j < COUNT; ++j) {
                numbers.values[j] = from_float<T>(to_float(numbers.values[j]) + to_float(others.values[j]));
            }
            *reinterpret_cast<Numbers*>(residual + i) = numbers;
        }
#pragma unroll
        for (int j = 0; j < COUNT; ++j) sum += to_float(numbers.values[j]) * to_float(numbers.values[j]);
    }

    __shared__ float sums[32];
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += exchange(sum, mask);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0.0f;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += exchange(sum, mask);
    const float factor = rsqrtf(sum / size + eps);

    for (int i = threadIdx.x * COUNT; i < size; i += blockDim.x * COUNT) {
        Numbers numbers = *reinterpret_cast<const Numbers*>(total + i);
        const Numbers weights = *reinterpret_cast<const Numbers*>(weight + i);
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            const float normal = to_float(from_float<T>(to_float(numbers.values[j]) * factor));
            numbers.values[j] = from_float<T>(normal * to_float(weights.values[j]));
        }
        *reinterpret_cast<Numbers*>(out + i) = numbers;
    }
}

bool is_aligned(const void* address, int64_t stride_bytes) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride_bytes % 16 == 0;
}

template <typename T>
int norm(const void* x, void* residual, const void* weight, void* out, int64_t x_stride, int64_t residual_stride, int num_rows,
         int size, float eps, void* stream) {
    constexpr int COUNT = 16 / sizeof(T);
    const bool is_wide = size % COUNT == 0 && is_aligned(x, x_stride * sizeof(T)) && is_aligned(weight, 0) &&
                         is_aligned(out, 0) && is_aligned(residual, residual_stride * sizeof(T));
    const int work = (size + COUNT - 1) / COUNT, threads = work < 1024 ? (work + 31) / 32 * 32 : 1024;
    const auto kernel = is_wide ? rms_norm<T, COUNT> : rms_norm<T, 1>;
    return launch(kernel, dim3(num_rows), threads, 0, stream, static_cast<const T*>(x), static_cast<T*>(residual),
                  static_cast<const T*>(weight), static_cast<T*>(out), x_stride, residual_stride, size, eps);
}

}  // namespace

EXPORT int cacheflow_rms_norm(const void* x, void* residual, const void* weight, void* out, int64_t x_stride,
                              int64_t residual_stride, int num_rows, int size, float eps, int dtype, int device, void* stream) {
    if (num_rows == 0) return 0;
    const OnDevice guard(device);
    const auto function = dtype == FLOAT16 ? norm<__half> : dtype == BFLOAT16 ? norm<__nv_bfloat16> : norm<float>;
    return function(x, residual, weight, out, x_stride, residual_stride, num_rows, size, eps, stream);
}
