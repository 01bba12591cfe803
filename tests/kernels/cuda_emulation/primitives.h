// Stands in for the package's primitives.h so that g++ compiles the CUDA sources, unchanged, into code that runs on a CPU.
//
// Threads are fibers that change at barriers and warp operations, blocks run one after the other. It is strict where hardware
// is lenient: shared memory starts as NaN, and an asynchronous copy poisons its destination at once and delivers only when its
// thread waits for it. It shows that a kernel computes the right thing; it can't show data races, nor what an instruction
// really does.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

enum DType { FLOAT16 = 0, BFLOAT16 = 1, FLOAT32 = 2 };

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim;

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaMemcpyDefault = 4 };
inline int cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline int cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
    return memcpy(to, from, bytes), cudaSuccess;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

struct __half {
    _Float16 value;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(__half x) { return static_cast<float>(x.value); }
inline float to_float(__nv_bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

template <typename T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline __half from_float<__half>(float x) { return {static_cast<_Float16>(x)}; }
template <>
inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
    T values[COUNT];
};

template <typename T>
inline uint32_t pack_pair(float low, float high) {
    const Pack<T, 2> pair{{from_float<T>(low), from_float<T>(high)}};
    uint32_t out;
    memcpy(&out, &pair, 4);
    return out;
}

struct Copy {
    void* shared;
    const void* global;
    bool valid;
};

struct Barrier {
    int size = 0, arrived = 0, generation = 0;
};

// What the lanes of a warp show one another in one operation; two operations alternate, so that one barrier each is enough.
struct Exchange {
    uint32_t words[32][6];
    const void* rows[32];
};

struct Warp {
    Barrier barrier;
    Exchange exchanges[2];
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    static constexpr size_t STACK_BYTES = 256 * 1024;
    bool is_finished = false;
    int num_exchanges = 0;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barrier;
    std::vector<char> shared;
    std::function<void()> body;
    ucontext_t main;
    int current = 0;
};
inline Block* block = nullptr;

inline Fiber& fiber() { return block->fibers[block->current]; }
inline Warp& warp_of_fiber() { return block->warps[block->current / 32]; }

// Goes on with the next unfinished fiber.
inline void yield() {
    const int self = block->current, count = static_cast<int>(block->fibers.size());
    int next = (self + 1) % count;
    while (block->fibers[next].is_finished && next != self) next = (next + 1) % count;
    if (next != self) {
        block->current = next;
        swapcontext(&block->fibers[self].context, &block->fibers[next].context);
    }
    block->current = self;
    threadIdx.x = self;
}

inline void wait_at(Barrier& barrier) {
    const int generation = barrier.generation;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.generation;
    } else {
        while (barrier.generation == generation) yield();
    }
}

inline void __syncthreads() { wait_at(block->barrier); }
inline void __syncwarp() { wait_at(warp_of_fiber().barrier); }

inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(block->shared.data()); }

inline void copy_async(void* shared, const void* global, bool valid) {
    memset(shared, 0xff, 16);
    fiber().open.push_back({shared, global, valid});
}

inline void copy_async_commit() {
    fiber().groups.push_back(std::move(fiber().open));
    fiber().open.clear();
}

template <int PENDING>
inline void copy_async_wait() {
    auto& groups = fiber().groups;
    while (groups.size() > PENDING) {
        for (const Copy& copy : groups.front()) {
            if (copy.valid) memcpy(copy.shared, copy.global, 16);
            else memset(copy.shared, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

// Shows this lane's words and row to its warp, and returns what all lanes show.
inline const Exchange& show(std::initializer_list<uint32_t> words, const void* row = nullptr) {
    Exchange& exchange = warp_of_fiber().exchanges[fiber().num_exchanges++ % 2];
    const int lane = block->current % 32;
    int i = 0;
    for (const uint32_t word : words) exchange.words[lane][i++] = word;
    exchange.rows[lane] = row;
    __syncwarp();
    return exchange;
}

inline void load_matrices(uint32_t (&out)[4], const void* row) {
    const Exchange& all = show({}, row);
    const int lane = block->current % 32;
    for (int m = 0; m < 4; ++m) memcpy(&out[m], static_cast<const char*>(all.rows[m * 8 + lane / 4]) + lane % 4 * 4, 4);
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    const Exchange& all = show({}, row);
    const int lane = block->current % 32;
    for (int m = 0; m < 4; ++m) {
        for (int i = 0; i < 2; ++i) {
            const char* source = static_cast<const char*>(all.rows[m * 8 + lane % 4 * 2 + i]) + lane / 4 * 2;
            memcpy(reinterpret_cast<char*>(&out[m]) + i * 2, source, 2);
        }
    }
}

template <typename T>
inline float half_of(uint32_t word, int i) {
    T value;
    memcpy(&value, reinterpret_cast<const char*>(&word) + i * 2, 2);
    return to_float(value);
}

template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const Exchange& all = show({a[0], a[1], a[2], a[3], b0, b1});
    const int lane = block->current % 32;
    for (int e = 0; e < 4; ++e) {
        const int row = lane / 4, column = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; ++k) {
            const int owner = k % 8 / 2;
            c[e] += half_of<T>(all.words[row * 4 + owner][e / 2 + k / 8 * 2], k % 2) *
                    half_of<T>(all.words[column * 4 + owner][4 + k / 8], k % 2);
        }
    }
}

inline float exchange(float x, int mask) {
    uint32_t word;
    memcpy(&word, &x, 4);
    const Exchange& all = show({word});
    memcpy(&x, &all.words[block->current % 32 ^ mask][0], 4);
    return x;
}

struct OnDevice {
    explicit OnDevice(int) {}
};

inline void run_fiber() {
    threadIdx.x = block->current;
    block->body();
    fiber().is_finished = true;
    // The last one to finish goes back to the launch.
    for (size_t i = 0; i < block->fibers.size(); ++i) {
        if (!block->fibers[i].is_finished) {
            block->current = static_cast<int>(i);
            setcontext(&block->fibers[i].context);
        }
    }
    setcontext(&block->main);
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void*, Arguments... arguments) {
    Block running;
    block = &running;
    blockDim = dim3(threads);
    running.fibers = std::vector<Fiber>(threads);
    running.body = [=] { kernel(arguments...); };
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                running.shared.assign(shared_bytes, static_cast<char>(0xff));
                running.warps.assign((threads + 31) / 32, Warp{});
                for (auto& warp : running.warps) warp.barrier.size = 32;
                running.barrier = Barrier{threads};
                for (auto& each : running.fibers) {
                    each.is_finished = false;
                    each.num_exchanges = 0;
                    getcontext(&each.context);
                    each.context.uc_stack.ss_sp = each.stack.get();
                    each.context.uc_stack.ss_size = Fiber::STACK_BYTES;
                    makecontext(&each.context, run_fiber, 0);
                }
                running.current = 0;
                swapcontext(&running.main, &running.fibers[0].context);
            }
        }
    }
    block = nullptr;
    return cudaSuccess;
}
