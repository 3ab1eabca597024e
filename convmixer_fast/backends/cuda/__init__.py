"""The compiled CUDA kernels."""
