"""How does a stack of blocks run on a GPU with fewer launches, or with fewer trips to memory?

Two ways to run the same blocks, both off until asked for (`convmixer_fast.optimize`):

* a CUDA graph, for batches of at most `MAX_BATCH` images: 40 to 64 launches become one. The graph
  reads a buffer of its own and the very packed copies that it was captured with; it is replayed
  only while those are still true, so that new inputs and new weights give the results that they
  give without it.
* depth first, for large batches: as many images at a time as leave their activations in the L2
  cache go through all blocks, instead of all images through one block.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .kernels import precision
from .ops.backends import requested_backend

#: Larger batches keep the GPU busy for longer than their launches take.
MAX_BATCH = 8
#: Shapes whose graphs are kept, the last used ones: each has its own buffers.
MAX_GRAPHS = 8
#: How much of the L2 cache activations may take; weights, outputs and other programs take the rest.
L2_SHARE = 0.5


def images_at_a_time(images: int, image_bytes: int, l2_bytes: int) -> int:
    """How many images go through all blocks together so that activations stay in the L2 cache.

    A block holds three maps of an image at once: what it got, its depthwise half's result, its own.
    Images are dealt out evenly; at least one goes at a time.

    Args:
        images: of the batch.
        image_bytes: of one image's map.
        l2_bytes: of the cache; 0 where it is not known, which leaves the batch whole.
    """
    if images <= 1 or l2_bytes <= 0 or image_bytes <= 0:
        return max(1, images)
    most = max(1, int(L2_SHARE * l2_bytes) // (3 * image_bytes))
    turns = -(-images // most)
    return -(-images // turns)


def depth_first(run: Callable[[Tensor], Tensor], x: Tensor, l2: int) -> Tensor:
    """``run`` on a few images of ``x`` at a time: (N, C, H, W), to a tensor of the same shape.

    Args:
        l2: bytes of the L2 cache.
    """
    step = images_at_a_time(x.shape[0], x[:1].numel() * x.element_size(), l2)
    if step >= x.shape[0]:
        return run(x)
    out = torch.empty_like(x)
    for i in range(0, x.shape[0], step):
        out[i : i + step] = run(x[i : i + step])
    return out


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache; 0 where torch does not know it."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def key_of(x: Tensor) -> Hashable:
    """What tells kinds of input apart for `StackGraphs`.

    The stream is part of it: replays on two streams would share buffers.
    """
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.device.type == "cuda" else 0
    # A buffer made in inference mode cannot be written outside of it.
    mode = torch.is_inference_mode_enabled()
    return (
        str(x.device),
        stream,
        tuple(x.shape),
        x.dtype,
        precision.settings(),
        mode,
        requested_backend(),
    )


class Recorder(Protocol):
    """Makes a callable that repeats what a call of ``run`` launched, on the same memory."""

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]: ...


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of ``run`` and the tensor that its replays write.

    ``run`` is called twice: once before, as libraries want for what they set up at a first call on
    a stream, and once to be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on allocating and launching.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run()
    return graph.replay, out


class _Captured(NamedTuple):
    """``held``: the packed copies that the graph reads, which must outlive it."""

    held: tuple[Any, ...]
    given: Tensor
    replay: Callable[[], None]
    result: Tensor


class StackGraphs:
    """Graphs of one stack of blocks, one for each kind of input.

    A kind of input is captured at its second call with the same packed copies: at the first,
    kernels are compiled and checked, and a model whose weights change at every call never pays for
    captures that it would not use.

    Args:
        record: see `Recorder`; `capture` by default.
    """

    def __init__(self, record: Recorder = capture) -> None:
        self._record = record
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._last: dict[Hashable, tuple[Any, ...]] = {}
        self._lock = threading.Lock()

    def run(
        self,
        key: Hashable,
        packed: tuple[Any, ...],
        blocks: Callable[[Tensor], Tensor],
        x: Tensor,
    ) -> Tensor:
        """``blocks(x)``, by a graph where there is one; the result is the caller's own.

        Args:
            key: tells kinds of input apart; see `key_of`.
            packed: the packed copies that the blocks would use now, compared by identity.
        """
        # Buffers are shared: what a call copies in, replays and copies out belongs together.
        with self._lock:
            known = self._graphs.get(key)
            if known is not None and not _same(known.held, packed):
                del self._graphs[key]
                known = None
            if known is None:
                if not _same(self._last.get(key, ()), packed):
                    self._last[key] = packed
                    while len(self._last) > MAX_GRAPHS:
                        del self._last[next(iter(self._last))]
                    return blocks(x)
                given = x.clone(memory_format=torch.preserve_format)
                replay, result = self._record(lambda: blocks(given))
                known = self._graphs[key] = _Captured(packed, given, replay, result)
                while len(self._graphs) > MAX_GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            known.given.copy_(x)
            known.replay()
            return known.result.clone(memory_format=torch.preserve_format)

    def clear(self) -> None:
        with self._lock:
            self._graphs.clear()
            self._last.clear()

    def __len__(self) -> int:
        return len(self._graphs)

    def __reduce__(self) -> tuple[type[StackGraphs], tuple[()]]:
        # Copies and pickles of a model capture anew.
        return (StackGraphs, ())


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return bool(one) and len(one) == len(other) and all(map(operator.is_, one, other))
