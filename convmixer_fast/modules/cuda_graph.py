"""A stack of blocks on a GPU with fewer launches, or with fewer trips to memory.

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
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends import self_check
from ..backends.triton import precision
from ..backends.triton.support import on_device
from ..ops.dispatch import requested_backend

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
    """Makes a callable that repeats what a call of ``run`` launched, on the same memory.

    Called with the device of the launches as the current one.
    """

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]: ...


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of ``run`` on the current device, and the tensor that its replays write.

    ``run`` is called twice: once before, as libraries want for what they set up at a first call on
    a stream, and once to be captured.
    """
    # `torch.cuda.graph` keeps one stream of its own for all devices: the one of its first capture.
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its stream the current one: the outer block ends that.
    with torch.cuda.stream(side):
        run()
        # Other threads may go on allocating and launching.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            out = run()
    current.wait_stream(side)
    return graph.replay, out


def _is_written(replay: Callable[[], None], result: Tensor, want: Tensor) -> bool:
    """Whether a replay writes ``result``, and what a call outside of it gave.

    A capture on another device or stream than that of the launches holds nothing, and its replays
    leave the result as it is.
    """
    result.fill_(0.0 if want.isnan().any() else float("nan"))
    replay()
    if torch.equal(result, want):
        return True
    # NaN, and libraries that add up in another order at every call.
    scale = want.abs().nan_to_num(posinf=0.0).max().item()
    bar = torch.finfo(want.dtype).eps ** 0.5
    return torch.allclose(result, want, rtol=bar, atol=bar * scale, equal_nan=True)


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
    captures that it would not use. A capture that fails, or whose replay is not what the blocks
    give, is refused with a warning, and the stack runs without graphs until `clear`.

    Args:
        record: see `Recorder`; `capture` by default.
    """

    def __init__(self, record: Recorder = capture) -> None:
        self._record = record
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._last: dict[Hashable, tuple[Any, ...]] = {}
        #: Why no graph is captured any more; "" for nothing.
        self.why_not = ""
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
        with self._lock, on_device(x.device):
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
                want = blocks(x)
                if not self.why_not:
                    self._add(key, packed, blocks, x, want)
                return want
            self._graphs.move_to_end(key)
            known.given.copy_(x)
            known.replay()
            return known.result.clone(memory_format=torch.preserve_format)

    def _add(
        self,
        key: Hashable,
        packed: tuple[Any, ...],
        blocks: Callable[[Tensor], Tensor],
        x: Tensor,
        want: Tensor,
    ) -> None:
        """Capture ``blocks`` on inputs like ``x``, which gave ``want``; or say why not.

        Raises:
            ContextLostError: the capture lost the GPU's context.
        """
        try:
            given = x.clone(memory_format=torch.preserve_format)
            replay, result = self._record(lambda: blocks(given))
            if _is_written(replay, result, want):
                self._graphs[key] = _Captured(packed, given, replay, result)
                while len(self._graphs) > MAX_GRAPHS:
                    self._graphs.popitem(last=False)
                return
            self.why_not = "its replay does not give what the blocks give"
        except self_check.ContextLostError:
            raise
        except Exception as error:  # a capture can fail in as many ways as a launch
            self_check.raise_if_lost(x.device, "a CUDA graph's capture", error)
            self.why_not = self_check.describe(error)
        warnings.warn(
            f"the blocks run without a CUDA graph on {x.device}: {self.why_not}",
            RuntimeWarning,
            stacklevel=2,
        )

    def clear(self) -> None:
        with self._lock:
            self._graphs.clear()
            self._last.clear()
            self.why_not = ""

    def __len__(self) -> int:
        return len(self._graphs)

    def __reduce__(self) -> tuple[type[StackGraphs], tuple[()]]:
        # Copies and pickles of a model capture again.
        return (StackGraphs, ())


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return bool(one) and len(one) == len(other) and all(map(operator.is_, one, other))
