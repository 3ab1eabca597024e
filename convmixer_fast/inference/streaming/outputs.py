"""Outputs of a stream: what is collected from the last block's map, piece by piece.

Each class has ``state()``, which gives what a checkpoint must hold, and ``restore()``, which puts
it back.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...files import replaceable
from ..sources import forget
from .pixels import Pixels

#: Pixels of a heatmap's picture along a cell's side.
PICTURE_PIXELS = 8

#: Numbers and tensors of a checkpoint, by name.
State: TypeAlias = "tuple[dict[str, int], dict[str, Tensor]]"


class PooledStatistics:
    """Sum and maximum of every channel over the pixels of the map seen so far."""

    def __init__(self, images: int, dim: int, device: torch.device) -> None:
        self.sum = torch.zeros(images, dim, dtype=torch.float64, device=device)
        self.peak = torch.full_like(self.sum, -torch.inf)
        self.pixels = 0

    def add(self, values: Tensor) -> None:
        # Row by row, so that the sums do not depend on the height of the bands.
        for row in range(values.shape[2]):
            self.sum += values[:, :, row].sum(-1, dtype=torch.float64)
        self.peak = torch.maximum(self.peak, values.amax((2, 3)).to(torch.float64))
        self.pixels += values.shape[2] * values.shape[3]

    def state(self) -> State:
        return {"pixels": self.pixels}, {"sum": self.sum, "peak": self.peak}

    def restore(self, numbers: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> None:
        self.sum = tensor("sum").to(self.sum.device, copy=True)
        self.peak = tensor("peak").to(self.peak.device, copy=True)
        self.pixels = numbers["pixels"]


class CellMeans:
    """Means over cells of ``cell`` x ``cell`` patches, and a picture of the image at that scale.

    Cells at the right and bottom border may be smaller.
    """

    def __init__(
        self, images: int, dim: int, cell: int, width: int, patch: int, device: Any
    ) -> None:
        self.cell, self._width = cell, width
        #: Step in pixels between those that the picture shows.
        self._every = max(1, cell * patch // PICTURE_PIXELS)
        shape = (images, 0, -(-width * patch // self._every), 3)
        self.picture = torch.empty(shape, dtype=torch.uint8, device="cpu")
        self._shape = (images, dim, -(-width // cell))
        self._device = device
        self.sums = self._zeros(0)
        #: Rows of patches so far.
        self._rows = 0

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, *self._shape, dtype=torch.float32, device=self._device)

    def _range(self, *bounds: int) -> Tensor:
        return torch.arange(*bounds, dtype=torch.int64, device=self._device)

    def add(self, row: int, column: int, values: Tensor) -> None:
        rows, columns = values.shape[2:]
        down = self._range(row, row + rows) // self.cell
        across = self._range(column, column + columns) // self.cell
        missing = int(down[-1]) + 1 - self.sums.shape[0]
        if missing > 0:
            self.sums = torch.cat((self.sums, self._zeros(missing)))
        summed = self._zeros(rows)
        summed.index_add_(3, across, values.permute(2, 0, 1, 3).float())
        self.sums.index_add_(0, down, summed)
        self._rows = max(self._rows, row + rows)

    def look(self, row: int, rows: Tensor, pixels: Pixels) -> None:
        """Add rows of pixels, the first of which is row ``row`` of the image, to the picture."""
        some = rows[:, :, -row % self._every :: self._every, :: self._every]
        seen = pixels.visible(some).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
        self.picture = torch.cat((self.picture, seen), 1)

    def means(self) -> Tensor:
        """(N, C, cells down, cells across)."""

        def sizes(count: int) -> Tensor:
            whole = self._range(0, count, self.cell)
            return (count - whole).clamp(max=self.cell).float()

        area = sizes(self._rows)[:, None, None, None] * sizes(self._width)
        return (self.sums / area).permute(1, 2, 0, 3).contiguous()

    def size(self) -> tuple[int, int]:
        """Rows and columns of patches that the cells cover."""
        return self._rows, self._width

    def state(self) -> State:
        return {"heatmap rows": self._rows}, {"cells": self.sums, "picture": self.picture}

    def restore(self, numbers: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> None:
        self.sums = tensor("cells").to(self.sums.device, copy=True)
        self.picture = tensor("picture").clone()
        self._rows = numbers["heatmap rows"]


class FeatureMap:
    """The last block's map: in memory, in a .npy memory map, or in a zarr array.

    A file has a hidden name in the same folder until it is complete.

    Args:
        path: ending in .npy or .zarr; None: in memory.
        height, width: of the map; a height of None is allowed in memory.
        resume: continue the unfinished file.

    Raises:
        ValueError: another suffix, or no unfinished file of this shape to continue.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path | None,
        images: int,
        dim: int,
        height: int | None,
        width: int,
        dtype: torch.dtype,
        resume: bool,
    ) -> None:
        self._dtype = dtype
        self._shape = (images, dim, height or 0, width)
        self._array: Any = None
        self._path, self._height = path, 0
        if path is None:
            if height is not None:
                self._whole: Tensor | None = torch.empty(self._shape, dtype=dtype, device="cpu")
            else:
                self._whole = None
            return
        if dtype == torch.bfloat16:
            # NumPy has no bfloat16; float32 holds each of its values.
            self._dtype = torch.float32
        numbers = np.dtype(str(self._dtype).removeprefix("torch."))
        if path.suffix not in (".npy", ".zarr"):
            raise ValueError(f"features are written to .npy or .zarr, not to {path}")
        self._partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        if resume and not self._partial.exists():
            raise ValueError(
                f"{self._partial}, which the checkpoint goes on with, is not there: "
                "delete the checkpoint to start again"
            )
        if path.suffix == ".npy":
            self._array = _create_npy(self._partial, path, self._shape, numbers, resume)
        else:
            self._array = _create_zarr(self._partial, self._shape, numbers, resume)
        if tuple(self._array.shape) != self._shape:
            raise ValueError(f"{self._partial} has shape {self._array.shape}, not {self._shape}")

    def add(self, row: int, column: int, values: Tensor) -> None:
        rows, columns = values.shape[2:]
        values = values.to("cpu", self._dtype)
        if self._array is not None:
            self._array[:, :, row : row + rows, column : column + columns] = values.numpy()
            if isinstance(self._array, np.memmap):
                forget(self._array)
            return
        if self._whole is None or row + rows > self._whole.shape[2]:
            # The height is not known: twice the rows are allocated.
            n, c, _, w = self._shape
            held = self._whole
            shape = (n, c, 2 * (row + rows), w)
            self._whole = torch.empty(shape, dtype=self._dtype, device="cpu")
            if held is not None:
                self._whole[:, :, : held.shape[2]] = held
        self._whole[:, :, row : row + rows, column : column + columns] = values
        self._height = max(self._height, row + rows)

    def _flush(self) -> None:
        if isinstance(self._array, np.memmap):
            self._array.flush()

    def state(self) -> State:
        """The file itself, on the disk: there is nothing else to keep.

        Raises:
            ValueError: the map is in memory.
        """
        if self._array is None:
            raise ValueError(
                "features in memory cannot be gone on with: pass out=, or no checkpoint"
            )
        self._flush()
        return {}, {}

    def restore(self, numbers: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> None:
        """Nothing: the file was opened with ``resume``."""

    def finish(self) -> Any:
        """The complete map; a file gets its own name."""
        if self._array is None:
            assert self._whole is not None
            return self._whole[:, :, : self._height]
        assert self._path is not None
        if self._path.suffix == ".npy":
            self._flush()
            os.replace(self._partial, self._path)
            return np.load(self._path, mmap_mode="r+")
        import zarr

        if self._path.exists():
            shutil.rmtree(self._path)
        os.replace(self._partial, self._path)
        return zarr.open(str(self._path), mode="r+")

    def discard(self) -> None:
        """Delete an unfinished file."""
        if self._array is not None:
            if self._partial.is_dir():
                shutil.rmtree(self._partial, ignore_errors=True)
            else:
                self._partial.unlink(missing_ok=True)


def features_target(path: Path) -> Path:
    """The file or zarr array that `FeatureMap` will write or replace, links followed.

    Raises:
        OSError: the name is that of something else.
    """
    if path.suffix != ".zarr" or not path.exists():
        return replaceable(path)
    target = Path(os.path.realpath(path))
    if not any((target / name).is_file() for name in (".zarray", "zarr.json")):
        reason = "it is no zarr array, and would be deleted: name another folder"
        raise FileExistsError(errno.EEXIST, reason, str(path))
    return target


def _create_npy(
    partial: Path, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], resume: bool
) -> Any:
    try:
        if resume:
            return np.lib.format.open_memmap(partial, mode="r+")
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            # A full disk raises here; without this, writing a page would kill the process.
            with open(partial, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        return array
    except OSError as error:
        if not resume:
            partial.unlink(missing_ok=True)
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _create_zarr(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], resume: bool) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError(f"{path} needs zarr, which is not installed: pip install zarr") from error
    if resume and path.exists():
        return zarr.open(str(path), mode="r+")
    c, w = shape[1], shape[3]
    # Chunks of about a megabyte of whole rows, because bands are written in order.
    rows = max(1, (1 << 20) // max(1, c * w * dtype.itemsize))
    chunks = (1, c, min(rows, max(1, shape[2])), w)
    return zarr.open(str(path), mode="w", shape=shape, chunks=chunks, dtype=dtype)
