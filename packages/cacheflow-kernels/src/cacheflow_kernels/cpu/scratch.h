// Memory that a thread keeps from call to call.
#pragma once
#include <cstdint>
#include <cstdlib>

class Scratch {
public:
    ~Scratch() { std::free(memory_); }

    char* get(int64_t num_bytes) {
        if (num_bytes > size_) {
            std::free(memory_);
            size_ = (num_bytes + 4095) / 4096 * 4096;
            memory_ = std::aligned_alloc(64, (size_t)size_);
            if (!memory_) std::abort();
        }
        return (char*)memory_;
    }

private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};
