"""What is computed and who can compute it: operators, backends, and their implementations.

An `Operator` says what: its formula in PyTorch's calls, and what a kernel of it depends on. An
`Implementation` says who: one class in ``backends/NAME/OPERATOR.py`` under `implements`. A
`Backend` is a name that users ask for. `dispatch.choose` decides between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..backends.kernel_key import KernelKey
from ..backends.layout import Shape, stem_format
from ..backends.operands import Packed
from ..backends.tuning_cache import Config, TunedEntry

#: The package's own backends, from the most general to the most special.
BACKENDS = ("reference", "cpu", "triton", "cuda")


class Order(NamedTuple):
    """The implementations that ``auto`` tries, by name, the best first, and the reason."""

    names: tuple[str, ...]
    reason: str


def _undefined(*_: Any) -> Any:
    raise NotImplementedError(
        "the operator has no sample: no kernel of it is compiled at first use"
    )


@dataclass(frozen=True, eq=False)
class Operator:
    """What is computed, on activations (N, C, H, W) and a convolution's weight.

    All but the names may be left out where no implementation is compiled at first use.

    Attributes:
        name: of the `torch.library` operator.
        key: in kernel keys, tuning files and reports.
        reference: the operator in PyTorch's calls, of its arguments ``x, weight, bias, scale,
            shift, act`` and those of its own.
        form: what of ``x, weight, dtype`` chooses another form of a compiled kernel; `KernelKey`'s
            size and form.
        sample: random arguments for a key and N, H, W of the activations.
        sample_shape: N, H, W of a small sample that reaches every kind of tile: inside, at every
            border, cut off.
        depthwise: whether each output is a sum over its own channel alone.
        strided: whether the weight's size is also the stride, as in a stem.
        of_stride_one: the operator that computes the same where that stride is 1.
        order: the order of implementations under ``auto`` for a call; by default that of backends.
        composed: the result where no implementation computes a call, if not by ``reference``.
    """

    name: str
    key: str
    reference: Callable[..., Tensor] = _undefined
    form: Callable[[Tensor, Tensor, torch.dtype], tuple[int, tuple[str, ...]]] = _undefined
    sample: Callable[[KernelKey, Shape], list[Any]] = _undefined
    sample_shape: Callable[[KernelKey], Shape] = _undefined
    depthwise: bool = False
    strided: bool = False
    of_stride_one: Operator | None = None
    order: Callable[[Call], Order | None] = lambda call: None
    composed: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        OPERATORS[self.key] = self

    def result_format(self, x: Tensor, weight: Tensor) -> torch.memory_format:
        return stem_format(x, weight.shape[-1] if self.strided else 1)

    def key_of(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        act: str,
        dtype: torch.dtype | None = None,
    ) -> KernelKey:
        """The key of the kernel that computes a call.

        Args:
            dtype: that is computed in, where it is not that of ``x``.
        """
        dtype = dtype or x.dtype
        size, form = self.form(x, weight, dtype)
        channels, k = x.shape[1], weight.shape[-1]
        return KernelKey(
            *(self.key, str(x.device), dtype, channels, weight.shape[0], k, act),
            *(bias is not None, size),
            form=form,
        )


#: Every operator by its key.
OPERATORS: dict[str, Operator] = {}


class Call(NamedTuple):
    """The properties of a call that decide who computes it.

    ``dtype``: that is computed in; ``channels``: of the result; ``key``: of the compiled kernel,
    None where no implementation compiles one; ``shape``: N, H, W of the activations; ``tuned``:
    what `convmixer_fast.tune` found for such calls.
    """

    operator: Operator
    device: torch.device
    dtype: torch.dtype
    channels: int
    key: KernelKey | None = None
    shape: Shape | None = None
    tuned: TunedEntry | None = None


#: A kernel with its operands bound, on packed channels-last maps x and out.
Launch = Callable[[Tensor, Tensor], Any]


class Implementation:
    """Who computes an operator. All calls and threads share one object.

    Attributes:
        operator: what is computed.
        backend: the name that users ask for.
        name: among the implementations of the operator.
        what: a phrase for `explain`.
        is_whole: False where PyTorch computes a part; a backend asked for by name then takes this
            one only if none of its kernels computes the operator whole.
        config: the configuration of this implementation where no other was tuned.
    """

    what: str
    is_whole = True
    config: Config | None = None

    def __init__(self, operator: Operator, backend: str, name: str) -> None:
        self.operator, self.backend, self.name = operator, backend, name

    @property
    def label(self) -> str:
        """The name among all implementations."""
        return self.name if self.name == self.backend else f"{self.backend} {self.name}"

    def compiles_for(self, device: torch.device) -> bool:
        """Whether each form is compiled at its first use, and held against PyTorch then."""
        return False

    def unavailable(self, call: Call) -> str:
        """Why this implementation cannot compute such a call; ``""`` where it can."""
        raise NotImplementedError

    def slower(self, call: Call) -> str:
        """Why PyTorch is expected to be faster, so that ``auto`` leaves the call to it, or ""."""
        return ""

    def run(self, x: Tensor, *operands: Any, **settings: Any) -> Tensor:
        """The operator's result for its arguments, which are checked and not empty.

        Keywords:
            config: of the kernel; None for the shipped one.
            prepared: of the packed copy; None: it is made here.
        """
        raise NotImplementedError

    def layout_of_packed(self, x: Tensor) -> torch.memory_format | None:
        """The layout of activations that a packed copy is for; None where it is for any."""
        return None

    def pack(self, packed: Packed, layout: torch.memory_format | None) -> Packed:
        """A packed copy as the kernel wants it.

        Its first four operands stay the operator's; ``prepared`` is what `run` is given of it.
        """
        return packed

    def bind_call(self, *operands: Any) -> Callable[[Tensor], Tensor] | None:
        """The operator with all arguments but x bound and checked once, for x of any shape; None
        where calls have to be made one by one."""
        return None

    def bind(self, key: KernelKey, config: Config | None, packed: Packed) -> Launch | None:
        """The kernel with packed operands bound, for maps of one shape; None where it cannot be."""
        return None

    def takes(self, config: Config | None) -> bool:
        """Whether a configuration is one of this implementation's kernels."""
        return config == self.config

    def candidates(self, call: Call) -> Iterable[Config | None]:
        """The configurations that `convmixer_fast.tune` measures, the shipped one first."""
        return (self.config,)

    def form_of_sample(self, key: KernelKey, config: Config | None) -> Config | None:
        """The configuration in which a small sample has the form of the call's kernel."""
        return config

    def plainer(self, key: KernelKey, config: Config | None) -> Config | None:
        """The configuration to try where the call's own does not pass its check; None for none."""
        return None


@dataclass(frozen=True)
class Backend:
    """A set of implementations, asked for by name.

    Attributes:
        name: for `use_backend`.
        unavailable_here: why it runs nowhere on this machine, or "".
        unavailable: why it runs nothing on a device, or "".
        is_automatic: whether ``auto`` considers it for tensors of a device.
        layout: that its kernels want activations in; None for any.
        extends: the backend that computes the operators it has no implementation of.
    """

    name: str
    unavailable_here: Callable[[], str]
    unavailable: Callable[[torch.device], str]
    is_automatic: Callable[[torch.device], bool]
    layout: torch.memory_format | None = None
    extends: str = ""


_implementations: dict[str, list[Implementation]] = {}
_added: dict[str, Backend] = {}

I = TypeVar("I", bound=type[Implementation])  # noqa: E741


def implements(operator: Operator, backend: str, name: str = "") -> Callable[[I], I]:
    """Register a class as an implementation of ``operator``; once for each name it has.

    Implementations of one backend are tried in the order of their registration.

    Args:
        backend: the `Backend`'s name.
        name: among the operator's implementations; by default the backend's.
    """

    def register(kind: I) -> I:
        made = kind(operator, backend, name or backend)
        _implementations.setdefault(operator.key, []).append(made)
        return kind

    return register


@cache
def _own_backends() -> dict[str, Backend]:
    # Not at the top: implementations import the operators, and those this module.
    modules = [import_module(f"convmixer_fast.backends.{name}.backend") for name in BACKENDS[1:]]
    return {module.BACKEND.name: module.BACKEND for module in modules}


def backends() -> dict[str, Backend]:
    """Every backend but ``reference`` by its name, from the most general to the most special."""
    return {**_own_backends(), **_added} if _added else _own_backends()


def implementations(operator: Operator) -> list[Implementation]:
    """Those of an operator, of all backends, in the order in which they are tried."""
    backends()
    return _implementations.get(operator.key, [])


def implementation_of(key: KernelKey, config: Config | None) -> Implementation:
    """The implementation whose kernel ``key`` and ``config`` name."""
    device = torch.device(key.device)
    for implementation in implementations(OPERATORS[key.op]):
        if implementation.takes(config) and implementation.compiles_for(device):
            return implementation
    raise LookupError(f"no implementation of {key.op} takes the configuration {config}")


@contextmanager
def added(backend: Backend, *implementing: Any) -> Iterator[None]:
    """A further backend inside the block, for the whole process; for tests and experiments.

    Args:
        implementing: (operator, class) pairs, as for `implements`.
    """
    backends()
    before = {key: list(found) for key, found in _implementations.items()}
    for operator, kind in implementing:
        implements(operator, backend.name)(kind)
    _added[backend.name] = backend
    try:
        yield
    finally:
        del _added[backend.name]
        _implementations.clear()
        _implementations.update(before)
