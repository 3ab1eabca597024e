"""Packed copies of parameters, and the rule by which one is still true.

The kernels want a convolution's weight in their own order and BatchNorm's four vectors as one scale
and one shift. Those copies are a cache next to the parameters, never instead of them. A copy is
true while everything that decides the values a kernel reads is what it was:

* the tensor objects (``load_state_dict(assign=True)``, a replaced parameter),
* their memory: address, shape, strides, dtype and device (``.to()``, ``.data = ...``),
* torch's version counters (optimizers, ``copy_``, ``load_state_dict``),
* a fingerprint of their bits: writes through ``.data`` or numpy do not count as versions. Vectors
  and tensors of at most 16 KiB are hashed whole, larger ones once a row, so that a write to most of
  a tensor, to one output channel or filter, or to one input channel is noticed. On a GPU the
  comparison runs on the GPU, so that nothing waits for it, and the answer can be a second late: see
  `watch`.

A write that passes all four, such as one element of a large tensor set through ``.data``, needs
`refresh`; so does one through ``.data`` to a parameter on a GPU whose effect is wanted at once.

Copies are made outside inference mode, so that a later call with gradients can save them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..backends.cpu.fingerprint import Span, fingerprint_of, span_of
from ..backends.operands import accumulation_dtype
from ..backends.triton.support import is_capturing
from .watch import Watch


def batch_norm_affine(bn: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inference BatchNorm as ``scale * a + shift``, differentiable in its weight and bias.

    ``scale = weight / sqrt(running_var + eps)``, ``shift = bias - running_mean * scale``, in
    `accumulation_dtype` of the activations' ``dtype``.
    """
    wide = accumulation_dtype(dtype)
    scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(wide)
    shift = bn.running_mean.to(wide) * scale
    shift = -shift if bn.bias is None else bn.bias.to(wide) - shift
    return scale, shift


#: The tensors that a packed copy depends on, None where a module has none.
Sources = tuple[Tensor | None, ...]


def sources_of(conv: Any, bn: Any) -> Sources:
    """Weight and bias of a convolution, weight, bias, mean and variance of its norm."""
    try:
        # Straight from the dictionaries: this runs at every forward, and an attribute of a module
        # costs ten times as much.
        kept, norm, statistics = conv._parameters, bn._parameters, bn._buffers
        if shadows(conv) or shadows(bn):
            raise KeyError
        return (
            kept["weight"],
            kept["bias"],
            norm["weight"],
            norm["bias"],
            statistics["running_mean"],
            statistics["running_var"],
        )
    except KeyError:  # a plain tensor was set instead of a parameter
        return (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)


def shadows(module: Any) -> bool:
    """Whether an attribute of the object comes before its parameter or buffer of that name."""
    # Spelt out: dynamo of torch 2.11 traces no set operation on a module's dictionary.
    own = module.__dict__
    return "weight" in own or "bias" in own or "running_mean" in own or "running_var" in own


def need_gradients(sources: Sources) -> bool:
    return any(t is not None and t.requires_grad for t in sources)


def cacheable(sources: Sources) -> bool:
    """Whether every change to the tensors can be noticed.

    Not for tensor subclasses (fake, distributed, wrapped by a transform), for tensors made in
    inference mode (they have no version), for parameters that are strided views, or for lazily
    negated ones.
    """
    return all(
        type(t) in (Tensor, nn.Parameter)
        # Samples of the memory under a view with gaps would read what is not its own.
        and (t.device.type == "cuda" or (t.device.type == "cpu" and t.is_contiguous()))
        and not t.is_inference()
        and not t.is_neg()
        for t in sources
        if t is not None
    )


class _Stamp(NamedTuple):
    """The identity of one tensor.

    The tensor is held: a weak reference would keep torch from swapping it
    (`torch.utils.swap_tensors`), and an address is free for others once its tensor is gone.
    """

    tensor: Tensor
    version: int
    address: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, t: Tensor | None) -> _Stamp | None:
        if t is None:
            return None
        return cls(t, t._version, t.data_ptr(), t.dtype, t.shape, t.stride())

    def is_of(self, t: Tensor) -> bool:
        return (
            self.tensor is t
            and self.version == t._version
            and self.address == t.data_ptr()
            and self.dtype is t.dtype
            and self.shape == t.shape
            and self.strides == t.stride()
        )


class _Entry(NamedTuple):
    key: Any
    stamps: tuple[_Stamp | None, ...]
    spans: list[Span]
    fingerprint: int
    packed: Any
    made: _Made | None
    watch: Watch | None


class _Made(NamedTuple):
    """When a copy on a GPU was made: work on another stream has to wait for that."""

    device: torch.device
    stream: int
    event: torch.cuda.Event

    @classmethod
    def now(cls, device: torch.device) -> _Made:
        stream = torch.cuda.current_stream(device)
        return cls(device, stream.cuda_stream, stream.record_event())

    def join(self, packed: Any, stream: torch.cuda.Stream) -> None:
        """Let ``stream`` wait for the copy, and the copy's memory for the stream.

        Not while a graph is captured: that begins after all streams came to rest.
        """
        stream.wait_event(self.event)
        for tensor in packed:
            if isinstance(tensor, Tensor):
                tensor.record_stream(stream)


class Now(NamedTuple):
    """Where work goes now; asked once for all copies that one call takes."""

    stream: torch.cuda.Stream | None
    handle: int
    capturing: bool


def now_on(device: torch.device) -> Now:
    if device.type != "cuda":
        return Now(None, 0, False)
    stream = torch.cuda.current_stream(device)
    return Now(stream, stream.cuda_stream, is_capturing(device))


T = TypeVar("T")


class WeightSnapshot(NamedTuple):
    """The parameters behind several packed copies, compared in one pass.

    Whether the modules still hold these very tensors is for `route.ModuleSnapshot` to say.
    """

    caches: tuple[PackedCache[Any], ...]
    entries: tuple[_Entry, ...]
    tensors: tuple[Tensor, ...]
    versions: list[int]
    addresses: list[int]
    strides: list[tuple[int, ...]]
    kinds: list[tuple[torch.Size, torch.dtype]]
    spans: list[Span]
    fingerprint: int
    watch: Watch | None

    @classmethod
    def of(
        cls, caches: Sequence[PackedCache[Any]], sources: Sequence[Sources]
    ) -> WeightSnapshot | None:
        """The snapshot of copies that are fresh now, or None if one is not.

        Args:
            caches: of the copies, in the order in which kernels take them.
            sources: of each cache.
        """
        entries = tuple(cache._entry for cache in caches)
        known = tuple(entry for entry in entries if entry is not None)
        spans = [span for entry in known for span in entry.spans]
        # Before each copy is compared by itself: a write in between is either seen there, or makes
        # this fingerprint differ from that of the next call.
        fingerprint = fingerprint_of(spans) if spans else 0
        if len(known) != len(entries):
            return None
        for cache, entry, tensors in zip(caches, known, sources, strict=True):
            if cache.fresh(entry.key, tensors) is not entry.packed:
                return None
        stamps = [stamp for entry in known for stamp in entry.stamps if stamp is not None]
        watches = [entry.watch for entry in known if entry.watch is not None]
        return cls(
            tuple(caches),
            known,
            tuple(stamp.tensor for stamp in stamps),
            [stamp.version for stamp in stamps],
            [stamp.address for stamp in stamps],
            [stamp.strides for stamp in stamps],
            [(stamp.shape, stamp.dtype) for stamp in stamps],
            spans,
            fingerprint,
            Watch.joined(watches) if watches else None,
        )

    def packed(self) -> tuple[Any, ...]:
        """The packed copies, in the order of the caches."""
        return tuple(entry.packed for entry in self.entries)

    def is_current(self) -> bool:
        """Whether no packed copy was dropped or replaced."""
        for cache, entry in zip(self.caches, self.entries, strict=True):
            if cache._entry is not entry:
                return False
        return True

    def is_unchanged(self) -> bool:
        """Whether no parameter was written to, moved or viewed in another way."""
        tensors = self.tensors
        if not (
            [*map(_VERSION, tensors)] == self.versions
            and [*map(Tensor.data_ptr, tensors)] == self.addresses
            and [*map(Tensor.stride, tensors)] == self.strides
            and [*map(_KIND, tensors)] == self.kinds
        ):
            return False
        if self.spans and self.fingerprint != fingerprint_of(self.spans):
            return False
        if self.watch is None or is_capturing(tensors[0].device):
            return True
        return not self.watch.changed()

    def join_stream(self) -> None:
        """Let the current stream wait for copies on a GPU that another stream made."""
        if self.watch is None:
            return
        now = now_on(self.tensors[0].device)
        for entry in self.entries:
            made = entry.made
            if made is not None and now.stream is not None and made.stream != now.handle:
                if now.capturing:
                    return
                made.join(entry.packed, now.stream)


_VERSION = operator.attrgetter("_version")
_KIND = operator.attrgetter("shape", "dtype")


def _are_stamped(stamps: Sequence[_Stamp | None], tensors: Sources) -> bool:
    """Whether these are the very tensors, in the same memory, and no write was counted."""
    return all(
        tensor is None if stamp is None else tensor is not None and stamp.is_of(tensor)
        for stamp, tensor in zip(stamps, tensors, strict=True)
    )


class PackedCache(Generic[T]):
    """One packed copy of some parameters; see the module's docstring.

    Copies and pickles of a module start empty. Safe under several threads: the entry is replaced
    as a whole, and two threads that both find it stale build equal ones.
    """

    __slots__ = ("_entry", "route")

    def __init__(self) -> None:
        self._entry: _Entry | None = None
        #: The `Route` of the last call that took this copy; its owner asks whether it holds.
        self.route: Any = None

    def fresh(self, key: Any, sources: Sources, now: Now | None = None) -> T | None:
        """The packed copy for ``key`` and ``sources`` if there is one that is still true.

        Args:
            now: what `now_on` says, where the caller knows.
        """
        entry = self._entry
        if entry is None or entry.key != key or len(entry.stamps) != len(sources):
            return None
        if not _are_stamped(entry.stamps, sources):
            return None
        if entry.spans and entry.fingerprint != fingerprint_of(entry.spans):
            return None
        packed: T = entry.packed
        made = entry.made
        if made is not None:
            stream, handle, capturing = now or now_on(made.device)
            if capturing:
                return packed
            if entry.watch is not None and entry.watch.changed():
                return None
            if handle != made.stream and stream is not None:
                made.join(packed, stream)
        return packed

    def get(self, key: Any, sources: Sources, pack: Callable[[], T]) -> T:
        """The packed copy for ``key`` (settings such as eps and layout), made again if stale.

        Args:
            key: compared by equality; everything except tensors that ``pack`` depends on.
            sources: what `sources_of` names; must be `cacheable`.
            pack: makes the copy; called without autograd and outside inference mode.
        """
        known = self.fresh(key, sources)
        if known is not None:
            return known
        stamps = tuple(map(_Stamp.of, sources))
        tensors = [t for t in sources if t is not None]
        spans = [span_of(t) for t in tensors if t.device.type == "cpu"]
        # Stamps and fingerprint before the copy: a write in between makes the entry stale, where
        # the other order would make a stale entry look true.
        before = fingerprint_of(spans) if spans else 0
        on_gpu = tuple(t for t in tensors if t.device.type == "cuda")
        if on_gpu and is_capturing(on_gpu[0].device):
            # Made inside a CUDA graph, a copy is true only while that graph is replayed.
            with torch.inference_mode(False), torch.no_grad():
                return pack()
        with torch.inference_mode(False), torch.no_grad():
            watch = Watch(on_gpu) if on_gpu else None
            packed = pack()
        made = _Made.now(on_gpu[0].device) if on_gpu else None
        # What is used where the parameter keeps it is no copy, and never stale.
        parts = packed if isinstance(packed, tuple) else ()
        used = {t.data_ptr() for t in parts if isinstance(t, Tensor)}
        copied = [span for span in spans if span[0] not in used]
        fingerprint = fingerprint_of(copied) if copied else 0
        if not spans or before == fingerprint_of(spans):
            self._entry = _Entry(key, stamps, copied, fingerprint, packed, made, watch)
        return packed

    def clear(self) -> None:
        self._entry = self.route = None

    def __reduce__(self) -> tuple[type[PackedCache[T]], tuple[()]]:
        return (PackedCache, ())
