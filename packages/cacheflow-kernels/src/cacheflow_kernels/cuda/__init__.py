"""The operations in CUDA C++: compiled when the package is installed, and called through ctypes."""
