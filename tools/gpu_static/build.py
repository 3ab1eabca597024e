"""Ahead-of-time compilation, the resources of a multiprocessor, and the bars of a build."""

from __future__ import annotations

from typing import Any

import torch

TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
#: Resources of a multiprocessor: registers, and by family bytes of shared memory and warps.
REGISTERS_ALL = 65536
SHARED_ALL = {80: 164 * 1024, 86: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}
WARPS_ALL = {80: 64, 86: 48, 90: 64, 100: 64, 120: 48}


class Bars:
    """The static bars that one build does not meet.

    Attributes:
        broken: bars that are missed without a reason, in words.
        excused: missed bars with the reason why the kernel ships anyway.
    """

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.excused: list[tuple[str, str]] = []

    def bar(self, holds: bool, text: str, reason: str = "") -> None:
        """Record ``text`` unless the bar holds; with a ``reason`` as an exception."""
        if holds:
            return
        if reason:
            self.excused.append((text, reason))
        else:
            self.broken.append(text)


def build_hip(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    divisible: tuple[str, ...],
    architecture: str,
    num_warps: int,
    num_stages: int,
) -> Any:
    """Compile for a GPU of ROCm, such as gfx942; pointers and ``divisible`` are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    types = {n: "constexpr" if n in constants else signature[n] for n in names}
    aligned = [n for n in names if types[n].startswith("*") or n in divisible]
    return triton.compile(
        ASTSource(
            fn=kernel,
            signature=types,
            constexprs={(names.index(n),): v for n, v in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        ),
        target=GPUTarget("hip", architecture, 64),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
