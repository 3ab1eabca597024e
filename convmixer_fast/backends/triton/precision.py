"""The precision of float32 GEMMs on a GPU, by PyTorch's own settings."""

from __future__ import annotations

from typing import Any

import torch


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of `tl.dot`: what PyTorch's matrix products do with float32.

    ``tf32`` where ``torch.backends.cuda.matmul`` allows TF32 (by ``fp32_precision``, by
    ``allow_tf32`` before torch 2.9, or by `torch.set_float32_matmul_precision`), else ``ieee``.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if _allows_tf32(torch.backends.cuda.matmul) else "ieee"


def settings() -> tuple[bool, bool]:
    """Whether PyTorch's matrix products and its convolutions may use TF32."""
    cudnn: Any = torch.backends.cudnn
    # Convolutions have a setting of their own from torch 2.9 on.
    return _allows_tf32(torch.backends.cuda.matmul), _allows_tf32(getattr(cudnn, "conv", cudnn))


def _allows_tf32(backend: Any) -> bool:
    # Asking by the old name raises once the new one was used to set.
    if hasattr(backend, "fp32_precision"):
        return bool(backend.fp32_precision == "tf32")
    return bool(backend.allow_tf32)
