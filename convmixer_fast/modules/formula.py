"""What a module computes of its children, proved by a trace of its forward."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch import nn

#: What every module has: children, tensors, hooks, training. All else is the class's or the user's.
STATE_OF_A_MODULE = frozenset(nn.Module().__dict__)


class Refused(Exception):
    """Why a module that looks like a block is not replaced."""


class _Symbol(torch.fx.Proxy):
    """torch.fx records ``x += y`` as the sum ``x + y``; this keeps the two apart."""

    def __iadd__(self, other: Any) -> torch.fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _OneLevel(torch.fx.Tracer):
    """Records calls of children, and never looks into them."""

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Symbol(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def formula_of(
    module: nn.Module, modes: tuple[bool, ...] = (True, False), settings: bool = False
) -> str:
    """What ``module`` computes of its input x, such as ``"fn(x) + x"``, in every mode of ``modes``.

    Names are those of its children; of a sum, the part that is x itself stands last.

    Args:
        module: to trace.
        modes: of ``training``.
        settings: its forward may read attributes of its own, as a probability.

    Raises:
        Refused: it computes anything but calls of children and sums, or modes differ, or an
            attribute could change what it computes.
    """
    formulas = {_trace(module, training, settings) for training in modes}
    if len(formulas) > 1:
        raise Refused("its forward is another one in training than in eval mode")
    return formulas.pop()


def _trace(module: nn.Module, training: bool, settings: bool) -> str:
    read: set[str] = set()

    class Shadow(type(module)):  # type: ignore[misc]
        """Of the same children: what a forward writes on self does not reach the module."""

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if not (callable(value) or name in STATE_OF_A_MODULE or name.startswith("__")):
                read.add(name)
            return value

    shadow = object.__new__(Shadow)
    shadow.__dict__.update(module.__dict__)
    shadow.__dict__["training"] = training
    try:
        graph = _OneLevel().trace(shadow)
    except Exception as error:
        # Anything can go wrong in a forward that is not ours, run on a symbol.
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise Refused(f"its forward cannot be traced ({type(error).__name__}: {first})") from error
    if read and not settings:
        # A fused module would not ask it again.
        raise Refused(f"its forward depends on the attribute {', '.join(sorted(read))}")
    terms: dict[torch.fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "output":
            return _term(node.args[0], terms)
        if node.op == "placeholder":
            if terms:
                raise Refused("its forward takes more than one argument")
            terms[node] = "x"
            continue
        if not node.users:
            raise Refused(f"its forward drops the result of {node.target}")
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            terms[node] = f"{node.target}({_term(node.args[0], terms)})"
        elif _is_sum(node):
            a, b = (_term(arg, terms) for arg in node.args)
            if node.target in _INPLACE_SUMS and a == "x":
                raise Refused("its forward changes its input in place")
            a, b = sorted((a, b), key=lambda term: term == "x")
            terms[node] = f"{a} + {b}" if b == "x" else f"({a}) + ({b})"
        else:
            target = getattr(node.target, "__name__", node.target)
            raise Refused(f"its forward also computes {target}")
    raise Refused("its forward returns nothing")


_SUMS = (operator.add, torch.add, "add", operator.iadd, "add_")


_INPLACE_SUMS = (operator.iadd, "add_")


def _is_sum(node: torch.fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in _SUMS
        and len(node.args) == 2
        and not node.kwargs
    )


def _term(value: Any, terms: Mapping[torch.fx.Node, str]) -> str:
    if not isinstance(value, torch.fx.Node):
        raise Refused(f"its forward also uses {value!r}")
    return terms[value]
