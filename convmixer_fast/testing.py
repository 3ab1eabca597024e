"""The numerics rule, and models whose numbers look trained.

One tolerance for the whole project: against a float64 run of the plain model, the largest and the
root-mean-square error of a result are at most twice those of PyTorch in the same dtype, plus two
rounding units of that dtype at the result's scale. Tests, benchmarks and self-checks share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Allowed multiple of PyTorch's own error.
ERROR_RATIO = 2.0
#: Rounding units of the dtype, at the result's scale, that are always allowed: PyTorch's own error
#: on a few outputs can be zero by chance.
FLOOR_UNITS = 2.0


@dataclass(frozen=True)
class ErrorReport:
    """Errors against the float64 oracle, PyTorch's in the same dtype, and the bars."""

    max_error: float
    rms_error: float
    torch_max_error: float
    torch_rms_error: float
    max_bar: float
    rms_bar: float

    @property
    def ok(self) -> bool:
        # NaN fails: a comparison with NaN is False.
        return self.max_error <= self.max_bar and self.rms_error <= self.rms_bar

    def __str__(self) -> str:
        return (
            f"max error {self.max_error:.3e} "
            f"(PyTorch {self.torch_max_error:.3e}, bar {self.max_bar:.3e}), "
            f"rms error {self.rms_error:.3e} "
            f"(PyTorch {self.torch_rms_error:.3e}, bar {self.rms_bar:.3e})"
        )


def error_report(ours: Tensor, torch_same_dtype: Tensor, oracle: Tensor) -> ErrorReport:
    """Measure ``ours`` by the numerics rule.

    Args:
        ours: the result under test, any shape and floating dtype.
        torch_same_dtype: PyTorch's result in the dtype of ``ours``, same shape.
        oracle: the plain model run in float64, same shape.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    if not ours.shape == torch_same_dtype.shape == oracle.shape:
        raise ValueError(
            f"shapes differ: ours {tuple(ours.shape)}, PyTorch {tuple(torch_same_dtype.shape)}, "
            f"oracle {tuple(oracle.shape)}"
        )
    if ours.dtype != torch_same_dtype.dtype:
        raise ValueError(f"dtypes differ: ours {ours.dtype}, PyTorch {torch_same_dtype.dtype}")
    if oracle.dtype != torch.float64:
        raise ValueError(f"the oracle must be float64, got {oracle.dtype}")
    if ours.numel() == 0:
        return ErrorReport(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    exact = oracle.detach().cpu()
    mine = ours.detach().cpu().double() - exact
    theirs = torch_same_dtype.detach().cpu().double() - exact
    floor = FLOOR_UNITS * torch.finfo(ours.dtype).eps
    rms = lambda t: t.square().mean().sqrt().item()  # noqa: E731
    torch_max, torch_rms = theirs.abs().max().item(), rms(theirs)
    return ErrorReport(
        max_error=mine.abs().max().item(),
        rms_error=rms(mine),
        torch_max_error=torch_max,
        torch_rms_error=torch_rms,
        max_bar=ERROR_RATIO * torch_max + floor * exact.abs().max().item(),
        rms_bar=ERROR_RATIO * torch_rms + floor * rms(exact),
    )


def assert_numerics(ours: Tensor, torch_same_dtype: Tensor, oracle: Tensor) -> ErrorReport:
    """`error_report` that raises AssertionError with the numbers if the rule is broken."""
    report = error_report(ours, torch_same_dtype, oracle)
    if not report.ok:
        raise AssertionError(f"outside the numerics rule: {report}")
    return report


@torch.no_grad()
def trained_like_(model: nn.Module, input_shape: tuple[int, ...], seed: int = 0) -> nn.Module:
    """Set parameters and BatchNorm statistics to values like those of a trained model, in place.

    Weights keep their initial scale. Biases are mostly positive. BatchNorm scales and shifts
    vary, with a few outlier channels. Running statistics are measured on random images of
    ``input_shape`` (N, C, H, W) and then perturbed, like statistics of another batch. The model is
    left in eval mode.

    Deep random models amplify every rounding error by 1.2 a layer, which trained ones do not. Two
    measures prevent it: positive biases keep most activations open, and a lower bound keeps every
    variance from being zero by chance.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(like: Tensor, normal: bool = True) -> Tensor:
        make = torch.randn if normal else torch.rand
        return make(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(like)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            fan_in = m.weight[0].numel()
            m.weight.copy_(draw(m.weight) / fan_in**0.5)
            if m.bias is not None:
                m.bias.copy_(1.0 + 0.2 * draw(m.bias))
    momenta = [n.momentum for n in norms]
    for n in norms:
        if n.affine:
            n.weight.copy_(0.5 + draw(n.weight, normal=False))
            n.weight[:: max(1, n.num_features // 4)] *= 4
            n.bias.copy_(draw(n.bias) * 0.3)
        n.momentum = 1.0
    model.train()
    parameter = next(model.parameters())
    images = torch.randn(input_shape, generator=generator, dtype=torch.float32, device="cpu")
    model(images.to(parameter))
    for n, momentum in zip(norms, momenta, strict=True):
        n.momentum = momentum
        if n.running_mean is not None and n.running_var is not None:
            n.running_var.clamp_(min=0.1 * n.running_var.mean().item())
            n.running_mean += 0.1 * draw(n.running_mean) * n.running_var.sqrt()
            n.running_var *= 0.8 + 0.4 * draw(n.running_var, normal=False)
    return model.eval()
