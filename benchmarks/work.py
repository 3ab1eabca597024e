"""Multiply-adds and bytes of a call, and the least time that a machine's limits allow for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from convmixer_fast.arch import Arch


@dataclass(frozen=True)
class Limits:
    """Measured peak rates of a machine; None where a rate was not measured.

    Attributes:
        multiply_add: float32 multiply-adds a second.
        matrix: multiply-adds a second of GEMMs in the measured dtype.
        bandwidth: bytes a second to and from memory, both counted.
    """

    multiply_add: float | None = None
    matrix: float | None = None
    bandwidth: float | None = None


@dataclass(frozen=True)
class Part:
    """Work of one fused kernel: multiply-adds, and the bytes it must move, each once."""

    macs: int
    bytes: int
    matrix: bool

    def least_seconds(self, limits: Limits) -> float:
        """The longer of the computing time and the transfer time at the machine's limits."""
        rate = limits.matrix if self.matrix else limits.multiply_add
        return max(
            self.macs / rate if rate else 0.0,
            self.bytes / limits.bandwidth if limits.bandwidth else 0.0,
        )


@dataclass(frozen=True)
class Work:
    """The images of a call and its parts, executed in order."""

    images: int
    parts: tuple[Part, ...]

    @property
    def macs(self) -> int:
        return sum(part.macs for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def least_seconds(self, limits: Limits) -> float:
        """Lower bound of the time with one kernel a part."""
        return sum(part.least_seconds(limits) for part in self.parts)


def depthwise_half(images: int, channels: int, kernel_size: int, pixels: int, size: int) -> Part:
    """Reads one map and writes one; ``pixels`` of an image's map, ``size`` bytes a value."""
    values = images * channels * pixels
    taps = channels * kernel_size**2
    return Part(values * kernel_size**2, size * (2 * values + taps), matrix=False)


def pointwise_half(images: int, channels: int, pixels: int, size: int) -> Part:
    """Reads one map and channels x channels weights, and writes one map."""
    values = images * channels * pixels
    return Part(values * channels, size * (2 * values + channels**2), matrix=True)


def of_blocks(images: int, halves: Iterable[Part]) -> Work:
    return Work(images, tuple(halves))


def of_model(arch: Arch, side: int, images: int, size: int = 4) -> Work:
    """Work of a forward pass; ``size`` bytes a value.

    Every half of a block is one kernel. Stem and head are one kernel each; the head's mean reads
    the last map.
    """
    rows, columns = arch.grid(side)
    pixels, c, macs = rows * columns, arch.dim, arch.macs(side)
    values = images * c * pixels
    taps = c * arch.in_chans * arch.patch_size**2
    stem = size * (images * arch.in_chans * side**2 + values + taps)
    head = size * (values + c * arch.num_classes + images * arch.num_classes)
    block = (
        depthwise_half(images, c, arch.kernel_size, pixels, size),
        pointwise_half(images, c, pixels, size),
    )
    return Work(
        images,
        (
            Part(images * macs.stem, stem, matrix=True),
            *block * arch.depth,
            Part(images * macs.head, head, matrix=True),
        ),
    )


def of_training_step(arch: Arch, side: int, images: int) -> Work:
    """Multiply-adds of forward and backward.

    Backward takes one more pass for the gradients of the weights and one for those of the
    activations, which the image does not need. Bytes are 0: what is stored for backward differs
    from system to system.
    """
    macs = arch.macs(side)
    return Work(images, (Part(images * (3 * macs.total - macs.stem), 0, matrix=True),))
