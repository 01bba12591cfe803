// The gated products of feed-forward layers, activation(first half) * second half (arXiv:2002.05202), for SiLU and both forms
// of GELU.
//
// A block of threads takes one row; a thread computes COUNT consecutive numbers at a time.

#include "primitives.h"

namespace {

struct Silu {
    __device__ static float of(float x) { return x / (1.0f + expf(-x)); }
};

struct Gelu {
    __device__ static float of(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f)); }
};

struct GeluTanh {
    __device__ static float of(float x) {
        return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    }
};

template <typename T, typename Activation, int COUNT>
__global__ void activate_and_mul(const T* x, T* out, int64_t x_stride, int size) {
    using Numbers = Pack<T, COUNT>;
    x += blockIdx.x * x_stride;
    out += static_cast<int64_t>(blockIdx.x) * size;
    for (int i = threadIdx.x * COUNT; i < size; i += blockDim.x * COUNT) {
        const Numbers gates = *reinterpret_cast<const Numbers*>(x + i);
        Numbers products = *reinterpret_cast<const Numbers*>(x + size + i);
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            products.values[j] = from_float<T>(Activation::of(to_float(gates.values[j])) * to_float(products.values[j]));
        }
        *reinterpret_cast<Numbers*>(out + i) = products;
    }
}

template <typename T, typename Activation>
int activate(const void* x, void* out, int64_t x_stride, int num_rows, int size, void* stream) {
    constexpr int COUNT = 16 / sizeof(T);
    const bool is_wide = size % COUNT == 0 && x_stride % COUNT == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(out) % 16 == 0;
    const int work = (size + COUNT - 1) / COUNT, threads = work < 512 ? (work + 31) / 32 * 32 : 512;
    const auto kernel = is_wide ? activate_and_mul<T, Activation, COUNT> : activate_and_mul<T, Activation, 1>;
    return launch(kernel, dim3(num_rows), threads, 0, stream, static_cast<const T*>(x), static_cast<T*>(out), x_stride, size);
}

template <typename T>
int activate_with(int activation, const void* x, void* out, int64_t x_stride, int num_rows, int size, void* stream) {
    const auto function = activation == 0 ? activate<T, Silu> : activation == 1 ? activate<T, Gelu> : activate<T, GeluTanh>;
    return function(x, out, x_stride, num_rows, size, stream);
}

}  // namespace

// `activation`: 0 SiLU, 1 GELU by the error function, 2 GELU by the hyperbolic tangent.
EXPORT int cacheflow_activate_and_mul(const void* x, void* out, int64_t x_stride, int num_rows, int size, int activation,
                                      int dtype, int device, void* stream) {
    if (num_rows == 0) return 0;
    const OnDevice guard(device);
    const auto function =
        dtype == FLOAT16 ? activate_with<__half> : dtype == BFLOAT16 ? activate_with<__nv_bfloat16> : activate_with<float>;
    return function(activation, x, out, x_stride, num_rows, size, stream);
}
