// What the loader asks about CUDA itself.

#include "primitives.h"

// CUDA's error number for the state of driver and devices, 0: usable.
EXPORT int cacheflow_device_error() {
    int count = 0;
    return cudaGetDeviceCount(&count);
}

EXPORT const char* cacheflow_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
