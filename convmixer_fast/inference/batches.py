"""Batches of images, decoded ahead by threads while the model computes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Lock
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import ImageError, read_image
from .preprocessing import Preprocessing
from .remote import Location
from .sources import Source

#: An image as a model takes it: (C, H, W), or rows to stream of one too large for that.
Prepared: TypeAlias = Tensor | Source


class Batch(NamedTuple):
    """Images that were read, with their paths, and errors of the others."""

    paths: list[Location]
    images: list[Prepared]
    failures: list[ImageError]


class Prepare(Protocol):
    """Interface of preprocessing: `Preprocessing`, `NativeSize`, or a user's own class."""

    @property
    def channels(self) -> int:
        """1 or 3: channels read from a file."""

    def __call__(self, image: Image.Image) -> Prepared:
        """(C, H, W), float32."""


def load_image(
    path: str | os.PathLike[str], preprocessing: Prepare, out: Tensor | None = None
) -> Prepared:
    """Read and prepare one file: (C, H, W) float32.

    Args:
        out: where to write it, for a `Preprocessing`.

    Raises:
        ImageError: the file cannot be read, or its image has a shape that cannot be prepared.
    """
    image = read_image(path, preprocessing.channels)
    try:
        if out is not None and isinstance(preprocessing, Preprocessing):
            return preprocessing(image, out)
        return preprocessing(image)
    except (ValueError, MemoryError) as error:
        raise ImageError.about(path, str(error) or "not enough memory") from error


class _Slots:
    """One tensor for all images of a batch, so that `in_one_piece` needs no copy.

    Args:
        count: number of images.
        room: the tensor of an earlier batch to reuse; None: allocate at the first image.
    """

    def __init__(self, count: int, room: Tensor | None) -> None:
        self._count, self.room = count, room
        self._lock = Lock()

    def place(self, i: int, shape: Sequence[int]) -> Tensor:
        """The slot of image i, of this shape, float32."""
        with self._lock:
            if self.room is None:
                self.room = torch.empty(self._count, *shape, dtype=torch.float32, device="cpu")
        return self.room[i]

    def put(self, i: int, image: Tensor) -> Tensor:
        """Copy the image into its slot.

        The image itself is returned if the first one had another shape, or if NumPy cannot read it
        (on a device, in bfloat16, with a gradient).
        """
        if image.device.type != "cpu" or image.dtype == torch.bfloat16 or image.requires_grad:
            return image
        with self._lock:
            if self.room is None:
                self.room = torch.empty(self._count, *image.shape, dtype=image.dtype, device="cpu")
        place = self.room[i]
        if place.shape != image.shape or place.dtype != image.dtype:
            return image
        # NumPy: PyTorch's copy would start a team of threads in every decoding thread.
        np.copyto(place.numpy(), image.numpy())
        return place


def in_one_piece(images: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, without a copy if the images are adjacent in memory."""
    first, step = images[0], images[0].numel()
    begin, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for i, image in enumerate(images):
        if (
            not image.is_contiguous()
            or image.untyped_storage().data_ptr() != storage
            or image.storage_offset() != begin + i * step
            or image.dtype != first.dtype
        ):
            return torch.stack(list(images))
    return first.as_strided((len(images), *first.shape), (step, *first.stride()))


def image_batches(
    paths: Sequence[Location],
    preprocessing: Prepare,
    batch_size: int,
    workers: int = 2,
    reuse: bool = False,
) -> Iterator[Batch]:
    """Batches in the order of ``paths``, of at most ``batch_size`` files each.

    ``workers`` threads decode at most two batches ahead (Pillow releases the interpreter's lock
    while it decodes and resizes), so memory does not grow with the number of files; 0 decodes in
    the caller's thread. An unreadable file does not raise: failures are part of their batch. With
    ``reuse``, a later batch may overwrite this one's images, which saves the system from clearing
    new pages.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")

    def attempt(path: Location, out: Tensor | None = None) -> Prepared | ImageError:
        try:
            return load_image(path, preprocessing, out)
        except ImageError as error:
            return error

    def several(
        slots: _Slots, begin: int, files: Sequence[Location]
    ) -> list[Prepared | ImageError]:
        # Not a subclass: its signature and its result may differ.
        if type(preprocessing) is Preprocessing:
            shape = preprocessing.input_size
            return [attempt(path, slots.place(i, shape)) for i, path in enumerate(files, begin)]
        found = [attempt(path) for path in files]
        if not one_size:
            return found
        return [
            slots.put(i, one) if isinstance(one, Tensor) else one
            for i, one in enumerate(found, begin)
        ]

    # Images at their own sizes rarely share a shape, and a slot for a large one wastes memory.
    one_size = hasattr(preprocessing, "input_size")
    free: list[Tensor] = []

    def submit(group: Sequence[Location]) -> None:
        room = free.pop() if free and len(free[-1]) == len(group) else None
        # A few tasks per batch and thread, not one per image: each costs a wake-up.
        slots, size = _Slots(len(group), room), max(1, len(group) // (4 * workers))
        starts = range(0, len(group), size)
        tasks = [pool.submit(several, slots, i, group[i : i + size]) for i in starts]
        ahead.append((group, slots, tasks))

    def oldest() -> Iterator[Batch]:
        files, slots, tasks = ahead.popleft()
        wait(tasks)  # one wait for all tasks
        yield collate(files, [one for task in tasks for one in task.result()])
        if reuse and slots.room is not None:
            free.append(slots.room)

    def collate(files: Sequence[Location], results: Sequence[Prepared | ImageError]) -> Batch:
        pairs = zip(files, results, strict=True)
        good = [(p, r) for p, r in pairs if not isinstance(r, ImageError)]
        failures = [r for r in results if isinstance(r, ImageError)]
        return Batch([p for p, _ in good], [r for _, r in good], failures)

    groups = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    if workers == 0:
        for group in groups:
            yield collate(group, [attempt(p) for p in group])
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convmixer_fast-images")
    ahead: deque[tuple[Sequence[Location], _Slots, list[Future[list[Prepared | ImageError]]]]] = (
        deque()
    )
    try:
        for group in groups:
            submit(group)
            if len(ahead) > 2:
                yield from oldest()
        while ahead:
            yield from oldest()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
