"""How do files become batches while the model is busy with the ones before?"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from PIL import Image
from torch import Tensor

from .images import ImageError, read_image
from .sources import Source

#: An image as a model takes it: (C, H, W), or rows to stream of one too large for that.
Prepared: TypeAlias = Tensor | Source


class Batch(NamedTuple):
    """Images that were read, with their paths, and errors of the others."""

    paths: list[Path]
    images: list[Prepared]
    failures: list[ImageError]


class Prepare(Protocol):
    """How an image becomes a tensor: `Preprocessing`, `NativeSize`, or the like of one's own."""

    @property
    def channels(self) -> int:
        """1 or 3: what is read of a file."""

    def __call__(self, image: Image.Image) -> Prepared:
        """(C, H, W), float32."""


def load_image(path: str | os.PathLike[str], preprocessing: Prepare) -> Prepared:
    """One file -> (C, H, W) float32.

    Raises:
        ImageError: the file cannot be read, or is of a shape that cannot be prepared.
    """
    image = read_image(path, preprocessing.channels)
    try:
        return preprocessing(image)
    except (ValueError, MemoryError) as error:
        raise ImageError.about(path, str(error) or "not enough memory") from error


def image_batches(
    paths: Sequence[Path], preprocessing: Prepare, batch_size: int, workers: int = 2
) -> Iterator[Batch]:
    """Batches in the order of ``paths``, of at most ``batch_size`` files each.

    ``workers`` threads decode ahead (Pillow releases the interpreter's lock while it decodes and
    resizes), at most two batches of it, so memory does not grow with the number of files; 0
    decodes in the caller's thread. No file is fatal: failures travel with their batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")

    def attempt(path: Path) -> Prepared | ImageError:
        try:
            return load_image(path, preprocessing)
        except ImageError as error:
            return error

    def collate(files: Sequence[Path], results: Sequence[Prepared | ImageError]) -> Batch:
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
    ahead: deque[tuple[Sequence[Path], list[Future[Prepared | ImageError]]]] = deque()
    try:
        for group in groups:
            ahead.append((group, [pool.submit(attempt, p) for p in group]))
            if len(ahead) > 2:
                files, futures = ahead.popleft()
                yield collate(files, [f.result() for f in futures])
        while ahead:
            files, futures = ahead.popleft()
            yield collate(files, [f.result() for f in futures])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
