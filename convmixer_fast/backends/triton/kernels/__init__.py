"""The Triton kernels: one for each half of a block, one for the stem.

    depthwise.py    depthwise k x k, activation, BatchNorm and residual in one pass
    pointwise.py    the 1x1 convolution, a GEMM, with activation and BatchNorm as its epilogue
    stem.py         the patch embedding, from any layout and from uint8
    after_product.py  activation and BatchNorm after a GEMM of PyTorch's
    operands.py     the operands that both GEMMs take
    epilogue.py     the epilogue of a tile of both
    activation.py   the activations, as they are computed inside a kernel
    launch.py       launches, and launches with all operands bound

Importing this package imports none of them: the modules import triton, which a machine without a
GPU need not have. They take and return plain tensors and know nothing of operators, autograd or
modules.
"""
