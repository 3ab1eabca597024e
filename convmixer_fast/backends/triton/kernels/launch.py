"""Triton launches, and launches with all operands bound.

Triton looks a compiled kernel up by the class of every argument at each launch, which takes the
host longer than the kernel runs at small batches: 40 us against a few. The arguments of a repeated
call have the same classes, so that the compiled kernel, the grid and all operands but the two maps
stay as they were (`bound_by_first_call`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor
from triton.compiler import CompiledKernel


class Launch(NamedTuple):
    """A launch that was made: the compiled kernel, its grid, and all arguments by name."""

    compiled: CompiledKernel
    grid: tuple[int, int, int]
    arguments: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("convmixer_fast_launches", default=None)


def launch(kernel: Any, blocks: int, *arguments: Any, **constants: Any) -> None:
    """Run ``kernel`` on a grid of ``blocks`` programs.

    Args:
        arguments: of the kernel, in its order, up to the first constant.
        constants: the kernel's constants, and Triton's options such as ``num_warps``.
    """
    compiled = kernel[(blocks,)](*arguments, **constants)
    launches = _recorded.get()
    if launches is not None and isinstance(compiled, CompiledKernel):
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        ordered = {name: given[name] for name in kernel.arg_names}
        launches.append(Launch(compiled, (blocks, 1, 1), ordered))


@contextmanager
def _recorded_launches() -> Iterator[list[Launch]]:
    """Collect the launches made inside the block; none in Triton's interpreter."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def bound_by_first_call(run: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    """``run(x, out)``, whose first call makes a launch that the later ones repeat on other maps.

    All maps have the shape, strides, dtype, device and alignment of the first ones. A call that is
    no single Triton launch with both maps as plain pointers (the interpreter, the descriptors of
    the copy engine) is made by ``run`` every time.
    """
    again: Callable[[Tensor, Tensor], Any] = run
    is_first = True

    def call(x: Tensor, out: Tensor) -> None:
        nonlocal again, is_first
        if not is_first:
            again(x, out)
            return
        with _recorded_launches() as launches:
            run(x, out)
        again = (len(launches) == 1 and _bound(launches[0], x, out)) or run
        is_first = False

    return call


def _bound(made: Launch, x: Tensor, out: Tensor) -> Callable[[Tensor, Tensor], Any] | None:
    """The launch ``made``, which read ``x`` and wrote ``out``, as a function of these two."""
    values = list(made.arguments.values())
    places = []
    for t in (x, out):
        at = [i for i, v in enumerate(values) if _begins_at(v, t.data_ptr())]
        if len(at) != 1:
            return None
        places += at
    source, target = places
    run = made.compiled[made.grid]

    def launch_again(x: Tensor, out: Tensor) -> None:
        arguments = values.copy()
        arguments[source], arguments[target] = x, out
        run(*arguments)

    return launch_again


def _begins_at(value: Any, address: int) -> bool:
    return isinstance(value, Tensor) and value.data_ptr() == address
