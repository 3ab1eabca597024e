"""The Triton backend.

backend.py      what the backend is asked by name
depthwise.py, pointwise.py, stem.py   its implementations of the operators
kernels/        the kernels, which import triton
functions.py    the kernels as functions, imported at the first call
configs.py      the tile of each kernel by dtype, kernel size, width and architecture
precision.py    how float32 is multiplied: as PyTorch's settings say
support.py      whether a device can run them
"""
