"""A hash of the contents of parameters, for noticing writes."""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import c_char, string_at
from hashlib import blake2b

import numpy as np
from torch import Tensor

from . import native

#: Address, bytes, and bytes of a row (0 for a vector) of a stretch of memory.
Span = tuple[int, int, int]
#: `kWholeBytes` and `kShortestRow` of csrc/cpu/fingerprint.
_WHOLE_BYTES, _SHORTEST_ROW, _SAMPLE_BYTES = 16 * 1024, 64, 8


def span_of(tensor: Tensor) -> Span:
    """The memory of a dense CPU tensor; a row is what its first axis counts."""
    size = tensor.nbytes
    return tensor.data_ptr(), size, size // len(tensor) if tensor.dim() > 1 and size else 0


def fingerprint(pieces: Iterable[Tensor]) -> int:
    """A 64-bit hash of the contents of tensors, for noticing writes.

    Vectors and tensors of at most 16 KiB are hashed whole. Larger ones are sampled once a row: a
    write to most of the tensor, to one row or to one column is noticed, one to a few elements may
    not be. The values count, their addresses do not. Without the engine a slower hash of the same
    samples is used; its numbers are others.

    Args:
        pieces: CPU tensors.

    Raises:
        ValueError: a tensor is not on the CPU.
    """
    spans: list[Span] = []
    copies = []  # kept until they are read
    for piece in pieces:
        if piece.device.type != "cpu":
            raise ValueError(f"fingerprint needs CPU tensors, got one on {piece.device}")
        if not piece.is_contiguous() and not _is_dense(piece):
            # Samples of the memory under a view with gaps would read what is not its own.
            piece = piece.detach().contiguous()
            copies.append(piece)
        spans.append(span_of(piece))
    return fingerprint_of(spans)


def fingerprint_of(spans: list[Span]) -> int:
    """`fingerprint` of memory that is readable during the call, in less time."""
    engine = native.load()
    return int(engine.fingerprint(spans)) if engine is not None else _plain_fingerprint(spans)


def _plain_fingerprint(spans: list[Span]) -> int:
    digest = blake2b(digest_size=8)
    for address, size, row in spans:
        digest.update(size.to_bytes(8, "little"))
        if size <= _WHOLE_BYTES or row < _SHORTEST_ROW:
            digest.update(string_at(address, size))
            continue
        memory = np.frombuffer(memoryview((c_char * size).from_address(address)), dtype=np.uint8)
        rows = np.arange(size // row)
        column = np.minimum(4 * rows % (row + -row % 4), row - _SAMPLE_BYTES)
        starts = rows * row + column
        digest.update(memory[starts[:, None] + np.arange(_SAMPLE_BYTES)].tobytes())
    return int.from_bytes(digest.digest(), "little")


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
