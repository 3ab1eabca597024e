"""One pass of an image through a model, in bands of rows from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bands import BandFlow, Blocks, NativeBlocks, Plan, blocks_of
from ..identity import model_digest
from ..images import ImageError
from ..sources import Source
from .model import StreamedModel
from .outputs import CellMeans, FeatureMap, PooledStatistics
from .state import Restorable, StreamState

#: Cells of a heatmap's longer side, at most.
HEATMAP_CELLS = 128


@dataclass
class StreamStats:
    """Measurements of a stream, updated while it runs.

    Attributes:
        height, width: of the image, in pixels; the height is that read so far.
        rows: rows of pixels that this run has read.
        seconds: time that this run has taken.
        plan: how the map was cut.
        backend: ``cpu`` (the CPU engine runs whole blocks) or ``modules`` (each half is dispatched
            to a backend of its own).
        resumed_at: the row of pixels at which the run continued; 0: from the beginning.
    """

    height: int = 0
    width: int = 0
    rows: int = 0
    seconds: float = 0.0
    plan: Plan | None = None
    backend: str = ""
    resumed_at: int = 0


@dataclass(frozen=True)
class StreamOptions:
    """The arguments of `stream` that hold for every pass."""

    out: Path | None
    max_memory: int | None
    band_rows: int | None
    strip_columns: int | None
    scratch: str | None
    checkpoint: Path | None
    checkpoint_rows: int
    target: int | None
    cell: int | None
    progress: bool

    def check(self, output: str) -> None:
        """Check the numbers, and ``out`` against the output.

        Raises:
            ValueError: with the argument's name.
        """
        for name in ("band_rows", "strip_columns", "checkpoint_rows", "cell"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.out is not None and output != "features":
            raise ValueError(f"out is for output='features', not for {output!r}")


class Pass:
    """One image, or several of the same size, through the model once.

    Raises:
        ImageError, ValueError: see `stream`.
    """

    def __init__(
        self, model: StreamedModel, source: Source, options: StreamOptions, stats: StreamStats
    ) -> None:
        options.check(model.output)
        self.model, self.source, self.options, self.stats = model, source, options, stats
        patch = model.patch
        #: Of the map, in patches; the height may be unknown.
        self.width = source.width // patch
        self.height = None if source.height is None else source.height // patch
        if self.width < 1 or self.height == 0:
            raise ImageError(
                f"{source.name}: {source.height or '?'} x {source.width} px (height x width) are "
                f"less than one patch of {patch} x {patch}"
            )
        if options.out is not None and self.height is None:
            raise ValueError(
                f"{source.name} does not tell its height, which the file of features needs: "
                "pass height="
            )
        self.blocks = self._blocks()
        self.plan = self._plan()
        stats.plan, stats.backend, stats.width = self.plan, self.blocks.name, source.width

    def _blocks(self) -> Blocks:
        stem, probe = self.model.parts.stem, self.model.probe()
        blocks = blocks_of(self.model.parts.blocks, stem[0], stem(probe))
        if self.height is not None and isinstance(blocks, NativeBlocks):
            blocks.map_pixels = self.height * self.width
        return blocks

    def _plan(self) -> Plan:
        source, options, model = self.source, self.options, self.model
        # Of a pixel: float32 while it is normalised, and the model's dtype twice.
        pixel_bytes = model.in_chans * (4 + 2 * model.dtype.itemsize)
        return Plan.make(
            self.blocks,
            source.images,
            self.width,
            source.images * source.width * model.patch * pixel_bytes,
            max_memory=options.max_memory,
            band_rows=options.band_rows,
            strip_columns=options.strip_columns,
        )

    def __call__(self) -> Any:
        """The output of `stream` for this source."""
        options, images = self.options, self.source.images
        flow = BandFlow(self.blocks, images, self.width, self.plan, options.scratch)
        pool = PooledStatistics(images, self.blocks.dim, self.model.device)
        state = None
        if options.checkpoint is not None:
            state = StreamState(
                options.checkpoint, self._identity(), options.checkpoint_rows, self.model.patch
            )
        resume = state is not None and state.exists()
        sink: FeatureMap | CellMeans | None = None
        try:
            sink = self._sink(resume)
            parts: list[Restorable] = [pool] if sink is None else [pool, sink]
            begin = 0
            if state is not None and resume:
                begin = state.load(flow, parts)
                self.stats.resumed_at = begin * self.model.patch
            for at in self._bands(flow, pool, sink, begin):
                if state is not None:
                    state.offer(at, flow, parts)
            result = self._result(pool, sink)
        except BaseException:
            if isinstance(sink, FeatureMap) and state is None:
                sink.discard()
            raise
        finally:
            flow.close()
        if state is not None:
            state.remove()
        return result

    def _sink(self, resume: bool) -> FeatureMap | CellMeans | None:
        """What collects the map; None where the pooled statistics are enough."""
        images, dim = self.source.images, self.blocks.dim
        if self.model.output == "features":
            out, dtype = self.options.out, self.model.dtype
            return FeatureMap(out, images, dim, self.height, self.width, dtype, resume)
        if self.model.output == "heatmap":
            longer = max(self.width, self.height or self.width)
            cell = self.options.cell or -(-longer // HEATMAP_CELLS)
            patch, device = self.model.patch, self.model.device
            return CellMeans(images, dim, cell, self.width, patch, device)
        return None

    def _bands(
        self,
        flow: BandFlow,
        pool: PooledStatistics,
        sink: FeatureMap | CellMeans | None,
        begin: int,
    ) -> Iterator[int]:
        """Send the image's bands through the model, from row ``begin`` of patches on.

        Yields:
            The rows of patches so far, after every band but the last.
        """
        from tqdm import tqdm

        patch, stats = self.model.patch, self.stats
        start, at, last = time.perf_counter(), begin, False
        total = None if self.height is None else self.height * patch
        disable = not self.options.progress
        with tqdm(
            total=total, initial=at * patch, unit="row", unit_scale=True, disable=disable
        ) as bar:
            while not last:
                rows, last = self._read(flow, at)
                new = rows.shape[2] // patch
                if isinstance(sink, CellMeans):
                    sink.look(at * patch, rows, self.model.pixels)
                ready = self.model.pixels(rows)
                # Freed before the blocks run, as the plan's memory assumes.
                del rows
                self._feed(flow, pool, sink, ready, last)
                del ready
                at += new
                bar.update(new * patch)
                stats.rows = (at - begin) * patch
                stats.height, stats.seconds = at * patch, time.perf_counter() - start
                if not last:
                    yield at
        stats.height = self.source.height or stats.height

    def _read(self, flow: BandFlow, at: int) -> tuple[Tensor, bool]:
        """The band that begins at row ``at`` of patches, as stored, and whether it is the last."""
        patch, step, height = self.model.patch, flow.plan.rows, self.height
        wanted = step if height is None else flow.next_band(height - at)
        rows = self.source.read(at * patch, (at + wanted) * patch)
        new = rows.shape[2] // patch
        last = new < step if height is None else at + new >= height
        if height is not None and new < wanted:
            raise ImageError(
                f"{self.source.name} ended after {at * patch + rows.shape[2]} rows of "
                f"{self.source.height}"
            )
        if at + new == 0:
            raise ImageError(
                f"{self.source.name}: {rows.shape[2]} rows of pixels are less than one patch of "
                f"{patch} x {patch}"
            )
        return rows[:, :, : new * patch, : flow.width * patch], last

    def _feed(
        self,
        flow: BandFlow,
        pool: PooledStatistics,
        sink: FeatureMap | CellMeans | None,
        pixels: Tensor,
        last: bool,
    ) -> None:
        """Send one band through stem and blocks, and collect the map that comes out."""
        patch, stem = self.model.patch, self.model.parts.stem

        def band(first: int, end: int) -> Tensor:
            out: Tensor = stem(pixels[:, :, :, first * patch : end * patch])
            return out

        for piece in flow.feed(band, pixels.shape[2] // patch, last):
            values = piece.values.to(self.model.dtype)
            if sink is not None:
                sink.add(piece.row, piece.column, values)
            if not isinstance(sink, FeatureMap):
                pool.add(values)

    def _result(self, pool: PooledStatistics, sink: FeatureMap | CellMeans | None) -> Any:
        if isinstance(sink, FeatureMap):
            return sink.finish()
        if isinstance(sink, CellMeans):
            return self.model.heatmap(sink, pool, self.options.target)
        if self.model.output == "embedding":
            return self.model.pooled(pool)
        return self.model.logits(pool)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to continue from another one's checkpoint."""
        source, model, out = self.source, self.model, self.options.out
        return {
            "weights": model_digest(model.model),
            "output": model.output,
            "out": None if out is None else str(out.absolute()),
            "backend": self.blocks.name,
            "image": [source.images, source.channels, source.height, source.width],
            "mean and std": [list(model.preprocessing.mean), list(model.preprocessing.std)],
            "cell": self.options.cell,
            "plan": asdict(self.plan),
        }
