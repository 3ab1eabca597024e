"""What runs on a GPU? One Triton kernel for each half of a block, one for the stem.

    depthwise.py    depthwise k x k, activation, BatchNorm and residual in one pass
    pointwise.py    the 1x1 convolution, a matrix product, with activation and BatchNorm after it
    stem.py         the patch embedding, from any layout and from uint8
    after_product.py  activation and BatchNorm after a product that PyTorch computed
    operands.py     what both matrix products may be given
    epilogue.py     what ends a tile of both
    activation.py   the activations, as they are computed inside a kernel
    configs.py      the tile of each kernel by dtype, kernel size, width and architecture
    precision.py    how float32 is multiplied: as PyTorch's settings say
    support.py      whether a device can run them

Importing this package imports none of them: the modules with kernels import triton, which a machine
without a GPU need not have. They take and return plain tensors and know nothing of operators,
autograd or modules.
"""
