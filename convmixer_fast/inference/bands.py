"""A map too large for memory, sent through the blocks of a ConvMixer in bands of rows.

Only the depthwise convolutions read beyond their own pixel: b = (k-1)//2 rows up and a = k//2 rows
down. Rows arrive from the top. A block can compute a row when ``a`` more rows have arrived, and
needs ``b`` rows before it again: between two bands it keeps b + a = k - 1 rows of its input. So
block i is i * a rows behind the stem, no row is computed twice, and the kept rows do not depend on
the map's height. Zeros are padded only at the border of the map, at every block.

If even one band over the map's whole width is too large, a band passes in strips of columns, in the
same way: block i is i * a columns behind the stem, and keeps the last k - 1 columns of its window
from strip to strip. The rows kept from band to band are then in a file, a piece for each strip,
read and written once a band.

Memory in values, for C channels, depth D, N images, bands of R rows, strips of S columns (without
strips S is the map's width W) and K = b + max(a, lag) kept rows (see `Plan.lag`):

    kept rows      N C D K W                   in the file if there are strips
    kept columns   N C D (K + R)(k - 1)        only if there are strips
    two windows    2 N C (K + R)(S + k - 1)    a block's and the next one's; k - 1 only with strips
    one band       N C R S                     output of the stem or a block
    panels         C R S                       one image's, of the CPU engine
    pixels         N R p W p (channels)        as stored, and as numbers of the model

`Plan.bytes` adds these up; the engine's scratch, some megabytes a thread, comes on top.
Modules that run one by one (`ModuleBlocks`) hold three windows more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..backends.cpu import native
from ..modules.blocks import MixerBlock, PackedBlock, packed_blocks
from ..modules.fused import to_preferred_layout
from ..modules.fusible import is_depthwise
from ..modules.halves import DepthwiseMix

#: Patches in a band at least, if memory allows: a few tiles of the GEMM.
_BAND_PATCHES = 8192
#: Most kept rows in units of k - 1; more than 1 lets bands end at groups of joined pixels.
_MOST_LAG = 2


class Span(NamedTuple):
    """One block's step along an axis: input received before and after, and output range."""

    in_begin: int
    in_end: int
    out_begin: int
    out_end: int


class Axis:
    """The position of every block along one axis, rows or columns.

    Args:
        depth: number of blocks.
        kernel_size: k.
        group: a block that is not at the end stops at multiples of this.
        step: largest output of a block in one step.
    """

    def __init__(self, depth: int, kernel_size: int, group: int, step: int) -> None:
        self.before, self.after = (kernel_size - 1) // 2, kernel_size // 2
        self.group, self.step = group, step
        self.received, self.emitted = [0] * depth, [0] * depth

    def advance(self, new: int, last: bool) -> list[Span]:
        """Give the first block ``new`` more; ``last``: no more will follow."""
        spans = []
        for i, (received, emitted) in enumerate(zip(self.received, self.emitted, strict=True)):
            end = received + new
            if last:
                to = min(end, emitted + self.step)
            else:
                to = max(emitted, (end - self.after) // self.group * self.group)
            spans.append(Span(received, end, emitted, to))
            self.received[i], self.emitted[i] = end, to
            # The next block's input is complete when this block's output is.
            new, last = to - emitted, last and to == end
        return spans

    def kept(self, end: int, emitted: int) -> tuple[int, int]:
        """The range of its ``end`` inputs that a block needs again after ``emitted`` outputs."""
        return max(0, emitted - self.before), end

    @property
    def done(self) -> bool:
        """Whether every block has computed all that the first one received."""
        return all(received == emitted for received, emitted in self._ends())

    def _ends(self) -> Iterator[tuple[int, int]]:
        return zip(self.received, self.emitted, strict=True)


@dataclass(frozen=True)
class Plan:
    """The cut of a map into bands and strips, and its memory.

    Args:
        rows: of a band, in patches.
        columns: of a strip, in patches; the map's width if there are no strips.
        group: bands end at multiples of this many rows of patches, in every block: whole groups of
            the pixels that the engine joins have the same bits in a band and in the map.
        lag: rows by which a block is behind the previous one: k//2, rounded up to a group.
        spilled: whether the kept rows are in a file.
        bytes: memory, by the arithmetic of this module's docstring.
        exact: whether the map has the bits of a run of the whole map on the CPU engine.
    """

    rows: int
    columns: int
    group: int
    lag: int
    spilled: bool
    bytes: int
    exact: bool

    @classmethod
    def make(
        cls,
        blocks: Blocks,
        images: int,
        width: int,
        pixel_bytes: int,
        *,
        max_memory: int | None = None,
        band_rows: int | None = None,
        strip_columns: int | None = None,
    ) -> Plan:
        """The plan for maps of ``width`` patches: the largest bands and strips that fit.

        Args:
            blocks: run the model's blocks.
            images: how many pass together.
            width: of the map, in patches.
            pixel_bytes: of one row of patches of the image, of all images.
            max_memory: bytes at most.
            band_rows, strip_columns: fixed instead of chosen.

        Raises:
            ValueError: ``max_memory`` is too small for the smallest cut.
        """
        k, depth = blocks.kernel_size, blocks.depth
        before, after = (k - 1) // 2, k // 2
        joined = blocks.joined_pixels
        aligned = joined // gcd(joined, width)

        def plan(rows: int, columns: int, group: int) -> Plan:
            strips = columns < width
            group = 1 if strips else group
            lag = -(-after // group) * group
            kept = before + lag
            rows = -(-rows // group) * group
            reach = k - 1 if strips else 0
            values = 0 if strips else depth * kept * width
            values += depth * (kept + rows) * reach
            values += blocks.windows * (kept + rows) * (columns + reach) + rows * columns
            values = values * images + blocks.panels * rows * columns
            total = values * blocks.dim * blocks.dtype.itemsize + rows * pixel_bytes
            whole_groups = not strips and rows % aligned == 0 == group % aligned
            exact = blocks.name == "cpu" and (joined == 1 or whole_groups)
            return cls(rows, columns, group, lag, strips, total, exact)

        # In order of preference: exact, whole rows, large bands.
        groups = [1]
        if before + -(-after // aligned) * aligned <= _MOST_LAG * max(1, k - 1):
            groups.insert(0, aligned)
        best = max(1, 4 * (k - 1), -(-_BAND_PATCHES // width))
        heights = [band_rows] if band_rows else _halves(best)
        if strip_columns is not None:
            widths = [[min(strip_columns, width)]]
        else:
            widths = [[width], [w for w in _halves(width) if w < width and w >= min(k, width)]]
        smallest = None
        for cut in widths:
            for group in groups:
                for rows in heights:
                    for columns in cut:
                        found = plan(rows, columns, group)
                        if max_memory is None or found.bytes <= max_memory:
                            return found
                        if smallest is None or found.bytes < smallest.bytes:
                            smallest = found
        assert smallest is not None
        raise ValueError(
            f"max_memory of {max_memory:,} bytes is too small: the smallest bands and strips of "
            f"this model at {width} patches a row need {smallest.bytes:,}"
        )


def _halves(start: int) -> list[int]:
    """``start``, halved repeatedly down to 1."""
    found = [start]
    while found[-1] > 1:
        found.append(-(-found[-1] // 2))
    return found


class Blocks(Protocol):
    """Interface of the blocks: each runs on a window of the map."""

    depth: int
    dim: int
    kernel_size: int
    dtype: torch.dtype
    device: torch.device
    channels_last: bool
    joined_pixels: int
    windows: int
    panels: int
    name: str

    def run(self, i: int, window: Tensor, band: tuple[int, int, int, int], out: Tensor) -> None:
        """Run block i on the rows and columns ``band`` of ``window``, into ``out``.

        The window includes all of the map around the band that the block reads.
        """


class NativeBlocks:
    """Blocks that the CPU engine runs whole, in float32."""

    name = "cpu"
    windows, panels, channels_last = 2, 1, False

    def __init__(self, wholes: list[PackedBlock], stem: nn.Conv2d, device: torch.device) -> None:
        self._wholes = wholes
        self.depth, self.dtype, self.device = len(wholes), torch.float32, device
        self.dim, self.kernel_size = wholes[0].dim, wholes[0].kernel_size
        self.joined_pixels = max(
            native.joined_pixels(self.dim, self.dim),
            native.joined_pixels(stem.weight[0].numel(), self.dim),
        )
        #: Of the whole map; the default is too large for any special case of small GEMMs.
        self.map_pixels = 1 << 40

    def run(self, i: int, window: Tensor, band: tuple[int, int, int, int], out: Tensor) -> None:
        whole = self._wholes[i]
        dense = out
        if not out[0, 0].is_contiguous():
            dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        native.mixer_band(
            window,
            band,
            whole.weight,
            whole.packed,
            self.kernel_size,
            whole.act,
            dense,
            self.map_pixels,
        )
        if dense is not out:
            out.copy_(dense)


class ModuleBlocks:
    """Blocks as modules, on any backend: one half at a time on a window.

    The depthwise half always pads: the k - 1 rows at the edges of each window are computed too and
    discarded.
    """

    name = "modules"
    windows, panels = 5, 0
    joined_pixels = 1

    def __init__(self, blocks: list[MixerBlock], example: Tensor) -> None:
        self._blocks = blocks
        self.depth, self.dim = len(blocks), example.shape[1]
        self.dtype, self.device = example.dtype, example.device
        # A kernel smaller than the largest gets more rows than it needs.
        self.kernel_size = max((_depthwise_of(block).kernel_size[0] for block in blocks), default=1)
        laid_out = to_preferred_layout(blocks[0], example) if blocks else example
        self.channels_last = not laid_out.is_contiguous()

    def run(self, i: int, window: Tensor, band: tuple[int, int, int, int], out: Tensor) -> None:
        top, bottom, left, right = band
        block = self._blocks[i]
        out.copy_(block.mix_channels(block[0](window)[:, :, top:bottom, left:right]))


def _depthwise_of(block: MixerBlock) -> nn.Conv2d:
    spatial: Any = block[0]
    conv = getattr(spatial, spatial._branch)[0] if isinstance(spatial, DepthwiseMix) else spatial
    if not is_depthwise(conv):
        raise TypeError(f'streaming needs "same" depthwise convolutions in the blocks, not {conv}')
    return conv


def blocks_of(stack: nn.Module, stem: nn.Conv2d, example: Tensor) -> Blocks:
    """The `Blocks` of a model for maps like ``example``, (N, C, h, w) of any h and w.

    ``stem`` is the convolution that makes these maps.

    Raises:
        TypeError: a child is no `MixerBlock`.
    """
    # Not children(), which omits a block's second occurrence.
    blocks: list[Any] = list(stack._modules.values())
    for block in blocks:
        if not isinstance(block, MixerBlock) or len(block) != 4:
            raise TypeError(
                f"streaming needs MixerBlocks, not {type(block).__name__}: "
                "call convmixer_fast.optimize(model) first"
            )
    packed = packed_blocks(blocks, example)
    if packed is not None:
        return NativeBlocks(packed, stem, example.device)
    return ModuleBlocks(blocks, example)


class Memory:
    """Store of the kept rows: tensors in memory, a piece for each block and strip."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, int], Tensor] = {}

    def put(self, key: tuple[int, int], rows: Tensor, most: int) -> None:
        """Keep ``rows`` (N, C, r, w), r at most ``most``, which is the same at every call."""
        n, c, r, w = rows.shape
        piece = self._pieces.get(key)
        if piece is None:
            # Rows are outermost, so that the piece is contiguous for any r.
            piece = rows.new_empty(most, n, c, w)
            self._pieces[key] = piece
        piece[:r].copy_(rows.permute(2, 0, 1, 3))

    def get(self, key: tuple[int, int], into: Tensor) -> None:
        """Read the rows put last, as many as ``into`` has."""
        if into.numel():
            into.copy_(self._pieces[key][: into.shape[2]].permute(1, 2, 0, 3))

    def close(self) -> None:
        self._pieces.clear()


def bytes_of(dense: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = dense.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


class Spill(Memory):
    """The same in a file without a name, which the system deletes with the process."""

    def __init__(self, folder: str | None) -> None:
        super().__init__()
        self._file = tempfile.TemporaryFile(prefix="convmixer_fast-", dir=folder)  # noqa: SIM115
        self._places: dict[tuple[int, int], int] = {}
        self._end = 0

    def put(self, key: tuple[int, int], rows: Tensor, most: int) -> None:
        n, c, _, w = rows.shape
        if key not in self._places:
            self._places[key] = self._end
            self._end += most * n * c * w * rows.element_size()
        self._file.seek(self._places[key])
        self._file.write(bytes_of(rows.permute(2, 0, 1, 3).contiguous().cpu()))

    def get(self, key: tuple[int, int], into: Tensor) -> None:
        if into.numel() == 0:
            return
        n, c, r, w = into.shape
        dense = torch.empty((r, n, c, w), dtype=into.dtype, device="cpu")
        self._file.seek(self._places[key])
        if self._file.readinto(bytes_of(dense)) < dense.nbytes:
            raise OSError("the file of kept rows was cut short: is its disk full?")
        into.copy_(dense.permute(1, 2, 0, 3))

    def close(self) -> None:
        self._file.close()


class Piece(NamedTuple):
    """A part of the last block's map, valid until the next piece."""

    row: int
    column: int
    values: Tensor  # (N, C, rows, columns)


#: The stem's output for columns [begin, end) of a band, (N, C, rows, end - begin).
Stem = Callable[[int, int], Tensor]


class BandFlow:
    """One pass of a map through the blocks.

    Args:
        blocks: run the model's blocks.
        images: N.
        width: of the map, in patches.
        plan: the cut.
        scratch: the folder for kept rows that do not fit in memory; None: the system's.
    """

    def __init__(
        self, blocks: Blocks, images: int, width: int, plan: Plan, scratch: str | None = None
    ) -> None:
        self.blocks, self.images, self.width, self.plan = blocks, images, width, plan
        depth, k = blocks.depth, blocks.kernel_size
        # If GEMMs join pixels, a last band smaller than a group joins the previous band.
        slack = plan.group if blocks.joined_pixels > 1 else 0
        self.rows = Axis(depth, k, plan.group, plan.rows + slack)
        self._columns: list[list[Span]] = []
        columns = Axis(depth, k, 1, plan.columns)
        begin = 0
        while begin < width or not columns.done:
            end = min(begin + plan.columns, width)
            self._columns.append(columns.advance(end - begin, end == width))
            begin = end
        self._across = columns
        self.store = Spill(scratch) if plan.spilled else Memory()
        self._buffers: list[Tensor | None] = [None, None]
        # The most rows that a block keeps, and the columns kept from strip to strip.
        self._most_kept = self.rows.before + plan.lag
        self._left: list[Tensor | None] = [None] * depth

    def next_band(self, left: int) -> int:
        """Rows of the next band, of the rows that are left."""
        rows, joined = self.plan.rows, self.blocks.joined_pixels
        rest = left - rows
        if 0 < rest < self.plan.group + 1 and rest * self.width < joined:
            return left
        return min(rows, left)

    def feed(self, stem: Stem, rows: int, last: bool) -> Iterator[Piece]:
        """Send the stem's next ``rows`` rows (`next_band`) down; yields pieces of the last map."""
        if self.blocks.depth == 0:
            for begin in range(0, self.width, self.plan.columns):
                end = min(begin + self.plan.columns, self.width)
                if rows:
                    yield Piece(self._direct_row, begin, stem(begin, end))
            self._direct_row += rows
            return
        yield from self._pass(stem, rows, last)
        while last and not self.rows.done:
            yield from self._pass(None, 0, True)

    _direct_row = 0

    def _pass(self, stem: Stem | None, new: int, last: bool) -> Iterator[Piece]:
        """One step down of every block, in all strips."""
        spans = self.rows.advance(new, last)
        for strip, columns in enumerate(self._columns):
            window = self._open(0, strip, spans[0], columns[0])
            if stem is not None and columns[0].in_end > columns[0].in_begin and new:
                values = stem(columns[0].in_begin, columns[0].in_end)
                self._fresh(window, spans[0], columns[0]).copy_(values)
                del values
            for i, (down, across) in enumerate(zip(spans, columns, strict=True)):
                # The next block's window is opened first, because this block writes into it.
                following = None
                if i + 1 < self.blocks.depth:
                    following = self._open(i + 1, strip, spans[i + 1], columns[i + 1])
                    out = self._fresh(following, spans[i + 1], columns[i + 1])
                else:
                    shape = (down.out_end - down.out_begin, across.out_end - across.out_begin)
                    out = self._view(i + 1, *shape)
                if out.numel():
                    top = down.out_begin - self._first(self.rows, down)
                    left = across.out_begin - self._first(self._across, across)
                    band = (top, top + out.shape[2], left, left + out.shape[3])
                    self.blocks.run(i, window, band, out)
                self._keep(i, strip, down, across, window)
                if following is not None:
                    window = following
                elif out.numel():
                    yield Piece(down.out_begin, across.out_begin, out)

    @staticmethod
    def _first(axis: Axis, span: Span) -> int:
        """Where a block's window begins: at the kept rows or columns."""
        return axis.kept(span.in_begin, span.out_begin)[0]

    def _view(self, i: int, rows: int, columns: int) -> Tensor:
        """(N, C, rows, columns) of the buffer of block i, which it shares with block i + 2."""
        n, c = self.images, self.blocks.dim
        count = n * c * rows * columns
        buffer = self._buffers[i % 2]
        if buffer is None or buffer.numel() < count:
            self._buffers[i % 2] = buffer = None  # freed before the next allocation
            buffer = torch.empty(count, dtype=self.blocks.dtype, device=self.blocks.device)
            self._buffers[i % 2] = buffer
        if self.blocks.channels_last:
            return buffer[:count].view(n, rows, columns, c).permute(0, 3, 1, 2)
        return buffer[:count].view(n, c, rows, columns)

    def _open(self, i: int, strip: int, down: Span, across: Span) -> Tensor:
        """Block i's window, with its kept rows and columns in place and room for new input."""
        first_row, first_column = self._first(self.rows, down), self._first(self._across, across)
        window = self._view(i, down.in_end - first_row, across.in_end - first_column)
        kept_rows, kept_columns = down.in_begin - first_row, across.in_begin - first_column
        left = self._left[i]
        if kept_columns and left is not None:
            window[:, :, :, :kept_columns].copy_(left)
        self.store.get((i, strip), window[:, :, :kept_rows, kept_columns:])
        return window

    def _fresh(self, window: Tensor, down: Span, across: Span) -> Tensor:
        """The part of a window that the previous block writes."""
        row = down.in_begin - self._first(self.rows, down)
        return window[:, :, row:, across.in_begin - self._first(self._across, across) :]

    def _keep(self, i: int, strip: int, down: Span, across: Span, window: Tensor) -> None:
        """Store what block i needs again: rows in the next band, columns in the next strip."""
        row = self.rows.kept(down.in_end, down.out_end)[0] - self._first(self.rows, down)
        first_column = self._first(self._across, across)
        new = window[:, :, row:, across.in_begin - first_column :]
        if new.numel():
            self.store.put((i, strip), new, self._most_kept)
        if strip + 1 < len(self._columns):
            column = self._across.kept(across.in_end, across.out_end)[0] - first_column
            self._left[i] = window[:, :, :, column:].clone()
        else:
            self._left[i] = None

    # Content of a checkpoint

    def state(self) -> dict[str, list[int]]:
        """The positions of the blocks."""
        return {
            "received": list(self.rows.received),
            "emitted": list(self.rows.emitted),
            "direct_row": [self._direct_row],
        }

    def restore(self, state: dict[str, list[int]]) -> None:
        self.rows.received, self.rows.emitted = list(state["received"]), list(state["emitted"])
        self._direct_row = state["direct_row"][0]

    def pieces(self) -> Iterator[tuple[tuple[int, int], tuple[int, int, int, int]]]:
        """(block, strip) and shape of all kept rows, between two bands."""
        for i in range(self.blocks.depth):
            first, end = self.rows.kept(self.rows.received[i], self.rows.emitted[i])
            for strip, columns in enumerate(self._columns):
                width = columns[i].in_end - columns[i].in_begin
                if end > first and width:
                    yield (i, strip), (self.images, self.blocks.dim, end - first, width)

    def kept(self, key: tuple[int, int], shape: tuple[int, int, int, int]) -> Tensor:
        """A copy of the rows that a block keeps."""
        rows = torch.empty(shape, dtype=self.blocks.dtype, device=self.blocks.device)
        self.store.get(key, rows)
        return rows

    def put_back(self, key: tuple[int, int], rows: Tensor) -> None:
        """Store the kept rows of a checkpoint."""
        self.store.put(key, rows.to(self.blocks.device), self._most_kept)

    def close(self) -> None:
        self.store.close()
