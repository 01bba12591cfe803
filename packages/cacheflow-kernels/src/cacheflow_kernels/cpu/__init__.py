"""The CPU kernels, written in C++: compiled when the package is installed, and called through ctypes."""
