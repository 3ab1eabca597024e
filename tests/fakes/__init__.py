"""Fakes: PyTorch on the CPU instead of Triton's kernels, the CUDA extension, and `torch.cuda`."""
