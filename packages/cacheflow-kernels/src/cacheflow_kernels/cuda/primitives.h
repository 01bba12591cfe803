// What the kernels need beneath CUDA C++: number types, the instructions that the language has no word for, and the launch.
// It knows no operation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Numbers of the dtypes in the C interface.
enum DType { FLOAT16 = 0, BFLOAT16 = 1, FLOAT32 = 2 };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// `COUNT` numbers that are loaded and stored as one.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
    T values[COUNT];
};

// Two numbers of a matrix fragment, the first in the low half.
template <typename T>
__device__ inline uint32_t pack_pair(float low, float high) {
    const Pack<T, 2> pair{{from_float<T>(low), from_float<T>(high)}};
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// The dynamic shared memory of the block.
__device__ inline unsigned char* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

// Starts copying 16 bytes from global to shared memory; writes zeros, and reads nothing, when not `valid`.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

// Closes a group of this thread's copies.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `PENDING` of this thread's latest groups are unfinished.
template <int PENDING>
__device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8. Each lane gets, of every
// matrix, the elements (lane / 4, lane % 4 * 2 + {0, 1}).
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// The same with every matrix transposed.
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// c += a * b on the tensor cores, for a [16, 16] and b [16, 8] spread over the warp. With r = lane / 4 and s = lane % 4 * 2, a
// lane holds of a (r, s + {0, 1}), (r + 8, s + {0, 1}), (r, s + 8 + {0, 1}), (r + 8, s + 8 + {0, 1}), of b (s + {0, 1}, r) and
// (s + 8 + {0, 1}, r), of c (r, s + {0, 1}) and (r + 8, s + {0, 1}).
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The value of the lane whose number differs in the bits of `mask`.
__device__ inline float exchange(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Makes `device` current while it lives.
class OnDevice {
  public:
    explicit OnDevice(int device) : device_(device) {
        if (cudaGetDevice(&previous_) == cudaSuccess && previous_ != device_) cudaSetDevice(device_);
    }
    ~OnDevice() {
        if (previous_ != device_) cudaSetDevice(previous_);
    }

  private:
    int device_;
    int previous_ = 0;
};

// Launches a kernel; returns CUDA's error number, 0: none.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void* stream, Arguments... arguments) {
    if (shared_bytes > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return cudaGetLastError();
}
