"""Static facts of the GPU kernels: machine code compiled without a GPU, and simulated counts.

One module a kernel: how it is compiled ahead of time, what its machine code contains, and the bars
it is held to. `triton_static.py` and `cuda_static.py` in the folder above write the tables.
"""
