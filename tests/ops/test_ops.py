"""The two operators against PyTorch: values, layouts, gradients, tracing, bad arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import LAYOUTS, OPS, check, make_input, make_operands, plain
from torch import nn
from torch.library import opcheck

from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.ops import use_backend

BACKENDS = ("auto", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_every_layout_and_dtype_is_within_the_numerics_rule(op, layout, dtype, backend):
    x = make_input(layout, (2, 19, 11, 13), dtype)
    with use_backend(backend):
        check(op, x, make_operands(op, 19, 5, dtype), "gelu")


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_every_activation_with_and_without_bias(op, act):
    for bias in (True, False):
        check(op, make_input("contiguous", (2, 8, 9, 9)), make_operands(op, 8, 3, bias=bias), act)


@settings(deadline=None, max_examples=60)
@given(
    op=st.sampled_from(sorted(OPS)),
    layout=st.sampled_from(LAYOUTS),
    n=st.integers(0, 3),
    c=st.integers(1, 37),
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    k=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_any_shape(op, layout, n, c, h, w, k, seed):
    torch.manual_seed(seed)
    side = 1
    if op == "patches":
        side = k = min(k, h, w)
    if n > 0:  # PyTorch's own error on a few values can be nearly zero by luck
        n = max(n, -(-256 // (c * (h // side) * (w // side))))
    check(op, make_input(layout, (n, c, h, w)), make_operands(op, c, k), "gelu")


@pytest.mark.parametrize("k", [2, 8, 31])
def test_kernels_wider_than_the_image(k):
    check(
        "depthwise",
        make_input("contiguous", (2, 5, 3, 4)),
        make_operands("depthwise", 5, k),
        "relu",
    )


def test_nan_and_infinity_come_out_where_pytorch_has_them(monkeypatch):
    # PyTorch's vector code makes gelu(+inf) NaN in long tensors and +inf in short ones: the
    # definition decides.
    monkeypatch.setattr(nn.GELU, "forward", lambda _, h: h * (0.5 * (1 + torch.erf(h / 2**0.5))))
    x = make_input("contiguous", (1, 4, 9, 9))
    x[0, 0, 4, 4], x[0, 1, 0, 0], x[0, 2, 8, 3] = float("nan"), float("inf"), -float("inf")
    for op in OPS:
        for act in ACTIVATIONS:
            operands = make_operands(op, 4, 3)
            got, want = OPS[op](x, *operands, act), plain(op, x, *operands, act)
            assert want.isnan().any()
            torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, layout):
    x = make_input(layout, (2, 8, 9, 11))
    operands = make_operands(op, 8, 4, grad=True)
    if layout != "expanded":
        x = x.requires_grad_()
    opcheck(OPS[op].default, (x, *operands, "gelu"))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_gradients_in_float64(op, act):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    operands = make_operands(op, 3, 4, torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda *a: OPS[op](*a, act), (x, *operands))
    assert torch.autograd.gradgradcheck(lambda *a: OPS[op](*a, act), (x, *operands))


@pytest.mark.parametrize("op", OPS)
def test_gradients_only_of_what_asks(op):
    x, operands = torch.randn(2, 3, 4, 5), make_operands(op, 3, 3)
    operands[2].requires_grad_()
    OPS[op](x, *operands, "gelu").sum().backward()
    assert operands[2].grad is not None
    assert operands[0].grad is None


@pytest.mark.parametrize("op", OPS)
def test_half_precision_gradients_follow_pytorch(op):
    x = make_input("contiguous", (2, 8, 7, 7), torch.bfloat16)
    operands = make_operands(op, 8, 3, torch.bfloat16)
    grads = []
    for function in (OPS[op], lambda *a: plain(op, *a)):
        leaves = [x.clone().requires_grad_(), *[t.clone().requires_grad_() for t in operands]]
        function(*leaves, "gelu").float().square().mean().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=2e-3)


BAD = {
    "x must be": lambda x, w, b, s, t: (x[0], w, b, s, t, "gelu"),
    "of a floating dtype": lambda x, w, b, s, t: (x.long(), w, b, s, t, "gelu"),
    "weight must be": lambda x, w, b, s, t: (x, w[..., 0], b, s, t, "gelu"),
    "weight is for": lambda x, w, b, s, t: (x[:, :3], w, b, s, t, "gelu"),
    "weight must be torch.float32": lambda x, w, b, s, t: (x, w.double(), b, s, t, "gelu"),
    "bias must have": lambda x, w, b, s, t: (x, w, b[:2], s, t, "gelu"),
    "bias must be": lambda x, w, b, s, t: (x, w, b.double(), s, t, "gelu"),
    "scale must have": lambda x, w, b, s, t: (x, w, b, s[:2], t, "gelu"),
    "shift must be": lambda x, w, b, s, t: (x, w, b, s, t.half(), "gelu"),
    "unknown activation": lambda x, w, b, s, t: (x, w, b, s, t, "mish"),
    "is on meta": lambda x, w, b, s, t: (x, w.to("meta"), b, s, t, "gelu"),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("op", OPS)
def test_bad_arguments_are_named(op, message):
    args = BAD[message](torch.randn(1, 8, 5, 5), *make_operands(op, 8, 3))
    with pytest.raises(ValueError, match=message) as info:
        OPS[op](*args)
    assert "\n" not in str(info.value)


def test_outputs_do_not_alias_inputs():
    for op in OPS:
        x = torch.randn(1, 4, 1, 1)
        y = OPS[op](x, *make_operands(op, 4, 1), "identity")
        assert y.data_ptr() != x.data_ptr()


def test_operators_keep_their_dtype_under_autocast():
    for op in OPS:
        x, operands = torch.randn(1, 4, 6, 6), make_operands(op, 4, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16), use_backend("reference"):
            assert OPS[op](x, *operands, "gelu").dtype == torch.float32
