"""Detection of writes to GPU memory that torch does not count, without waiting for the GPU.

Reading a sample of a parameter on a GPU means waiting until the GPU has come so far, which a loop
of forward passes must not do. So the comparison is launched like any other work, once a second at
most, and its answer is read when it is there: between forward passes less than a second apart, a
write through ``.data`` is noticed about a second late, and then for good. After a longer pause,
such as between the epochs of a training run, the first forward pass waits for the answer.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Seconds between comparisons. Each is a handful of launches of a few microseconds for each half of
#: a block: a few milliseconds of launching a second for 32 blocks, under 1 %.
CADENCE = 1.0
_WHOLE_BYTES = 16 * 1024
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sample(tensors: Sequence[Tensor]) -> Tensor:
    """Elements of each tensor as bits, on their device: no gradient, no waiting.

    The elements that a fingerprint on a CPU covers: all of a small tensor or a vector, else the
    diagonal of its rows.
    """
    picked = []
    for tensor in tensors:
        flat = tensor.detach().flatten().view(_BITS[tensor.element_size()])
        if tensor.dim() > 1 and tensor.nbytes > _WHOLE_BYTES:
            rows, columns = len(tensor), flat.numel() // len(tensor)
            # Row r at column r modulo the columns: a stride of columns + 1 that begins again.
            row = torch.arange(rows, device=tensor.device, dtype=torch.int64)
            flat = flat[row * columns + row % columns]
        picked.append(flat.to(torch.int64))
    return torch.cat(picked)


class _Answer:
    """A boolean that the GPU will have worked out."""

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.current_stream(value.device).record_event()
        else:
            self._value = value

    def is_there(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value)


class Watch:
    """Notices dense writes to some tensors, as the module's docstring says.

    Args:
        tensors: on one device; not kept alive.
        clock: seconds, for tests.
    """

    def __init__(
        self, tensors: Sequence[Tensor], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tensors = tuple(map(weakref.ref, tensors))
        self._clock = clock
        self._before = sample(tensors)
        self._asked = self._compared = clock()
        self._answer: _Answer | None = None
        self._changed = False
        self._lock = threading.Lock()

    @classmethod
    def joined(cls, watches: Sequence[Watch]) -> Watch:
        """One watch over the tensors of several, from the samples that these began with."""
        if len(watches) == 1:
            return watches[0]
        self = cls.__new__(cls)
        first = watches[0]
        self._tensors = tuple(ref for watch in watches for ref in watch._tensors)
        self._clock = first._clock
        self._before = torch.cat([watch._before for watch in watches])
        self._asked = min(watch._asked for watch in watches)
        self._compared = min(watch._compared for watch in watches)
        self._answer = None
        self._changed = any(watch._changed for watch in watches)
        self._lock = threading.Lock()
        return self

    def changed(self) -> bool:
        """Whether a write is known of; call it at every use, not while a graph is captured."""
        with self._lock:
            now = self._clock()
            pause, self._asked = now - self._asked, now
            wait = pause > CADENCE
            if self._answer is not None and (wait or self._answer.is_there()):
                self._changed |= self._answer.wait()
                self._answer = None
            if not self._changed and self._answer is None and now - self._compared >= CADENCE:
                self._compared = now
                tensors = [tensor for ref in self._tensors if (tensor := ref()) is not None]
                if len(tensors) < len(self._tensors):
                    return True
                self._answer = _Answer((sample(tensors) != self._before).any())
                if wait:
                    self._changed |= self._answer.wait()
                    self._answer = None
            return self._changed
