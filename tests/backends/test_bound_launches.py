"""A repeated call of a stack launches what its first calls compiled, on the simulator."""

from __future__ import annotations

import copy

import pytest
import torch
from fakes.triton import emulated
from triton_modes import triton_simulator

from convmixer_fast import MixerBlock, MixerStack, use_backend
from convmixer_fast.testing import trained_like_

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.jit import JITFunction

from convmixer_fast.backends import self_check

SHAPE = (2, 16, 5, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_repeated_call_looks_no_kernel_up(dtype, monkeypatch):
    torch.manual_seed(0)
    stack = trained_like_(MixerStack(*[MixerBlock(16, 3) for _ in range(2)]), SHAPE).to(dtype)
    images = [
        torch.randn(SHAPE).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(3)
    ]
    self_check.forget()
    try:
        with torch.no_grad(), triton_simulator().triton_on_cpu(cc=80) as log, emulated():
            with use_backend("triton"):
                want = [copy.deepcopy(stack)(x) for x in images]
                for _ in range(3):
                    stack(images[0])
                monkeypatch.setattr(JITFunction, "run", lambda *a, **k: pytest.fail("looked up"))
                before = len(log)
                got = [stack(x) for x in images]
            assert len(log) - before == 4 * len(images)
    finally:
        self_check.forget()
    for ours, theirs in zip(got, want, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours, theirs)
    assert not torch.equal(got[0], got[1])
