"""Calls of the compiled CPU engine with tensors.

The extension is looked for once, at first use, and every reason for its absence is kept.
``CONVMIXER_FAST_DISABLE_NATIVE=1`` leaves it alone; ``CONVMIXER_FAST_ISA`` (baseline, avx2,
avx512) makes it use a lower instruction set than the machine's best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ... import environment
from ...arch import ACTIVATIONS
from ..extensions import build_info, why_absent

_PLANAR, _CHANNELS_LAST = 0, 1


def _use(module: ModuleType, isa: str) -> None:
    try:
        module.set_isa(isa)
    except ValueError as error:
        raise ValueError(f"CONVMIXER_FAST_ISA: {str(error).removeprefix('isa: ')}") from None


@cache
def _find() -> tuple[ModuleType | None, str]:
    """The module, and why there is none: one of the two is empty."""
    if off := environment.why_off("DISABLE_NATIVE"):
        return None, off
    try:
        module = import_module("convmixer_fast._cpu")
        if isa := environment.read("ISA"):
            _use(module, isa)
        module.isa()
    except (ImportError, ValueError) as error:
        return None, why_absent("_cpu", "CPU", error, build_info())
    return module, ""


def load() -> ModuleType | None:
    """The extension module ``convmixer_fast._cpu``, or None; `why_unavailable` says why."""
    return _find()[0]


def why_unavailable() -> str:
    """Every known reason why `load` gives None, in one line; "" when the engine is there."""
    return _find()[1]


def _engine() -> ModuleType:
    module, why = _find()
    if module is None:
        raise RuntimeError(f"the CPU engine is not available: {why}")
    return module


def _check(name: str, tensor: Tensor, shape: tuple[int, ...] | None = None) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be a CPU tensor, got one on {tensor.device}")
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def depthwise_mix(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    """``x + scale * act(depthwise_conv(x, weight) + bias) + shift`` by the compiled engine.

    Zero padding "same": (k-1)//2 before and k//2 after. On ``torch.get_num_threads()`` threads.

    Args:
        x: (N, C, H, W), float32, on the CPU, any strides.
        weight: (C, 1, k, k), any strides; neither ``weight`` packed as (C, k*k) nor, for a
            channels-last ``x``, as (k*k, C) is copied again.
        bias, scale, shift: (C,); ``bias`` may be None.
        act: a name in `convmixer_fast.arch.ACTIVATIONS`.

    Returns:
        A new tensor of x's shape: channels-last where ``x`` is so and not contiguous as well,
        else contiguous. No gradient flows through it.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: a shape, a device or ``act`` does not fit.
        RuntimeError: the engine is not available.
    """
    engine = _engine()
    if x.dim() != 4:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
    n, c, h, w = x.shape
    k = weight.shape[-1] if weight.dim() else 0
    _check("x", x)
    if k < 1:
        raise ValueError(f"weight must have shape ({c}, 1, k, k), got {tuple(weight.shape)}")
    _check("weight", weight, (c, 1, k, k))
    for name, vector in (("bias", bias), ("scale", scale), ("shift", shift)):
        if vector is not None:
            _check(name, vector, (c,))
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")

    # A lazily negated view (the .imag of a conjugate) holds other numbers than it shows.
    x = x.detach().resolve_neg()
    packed = weight.detach().resolve_neg()
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        layout, memory_format = _CHANNELS_LAST, torch.channels_last
        packed = packed.reshape(c, k * k).t().contiguous()
    else:
        layout, memory_format = _PLANAR, torch.contiguous_format
        packed = packed.contiguous()
        if x.stride(3) != 1 and w != 1:
            x = x.contiguous()
    vectors = [
        None if v is None else v.detach().resolve_neg().contiguous() for v in (bias, scale, shift)
    ]
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu", memory_format=memory_format)
    engine.depthwise_mix(
        x.data_ptr(),
        x.stride(),
        out.data_ptr(),
        out.stride(),
        (n, c, h, w),
        k,
        packed.data_ptr(),
        *(0 if v is None else v.data_ptr() for v in vectors),
        _activation_numbers()[act],
        layout,
        torch.get_num_threads(),
    )
    return out


def pointwise_mix(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    """``scale * act(conv(x, weight, stride=p) + bias) + shift`` by the compiled engine.

    A 1x1 convolution with all that follows it, or, with p > 1, the convolution of patches that do
    not overlap. On ``torch.get_num_threads()`` threads.

    Args:
        x: (N, C, H, W), float32, on the CPU, any strides; H and W at least p.
        weight: (D, C, p, p), any strides; read where it is if contiguous.
        bias, scale, shift: (D,); ``bias`` may be None.
        act: a name in `convmixer_fast.arch.ACTIVATIONS`.

    Returns:
        A new contiguous tensor (N, D, H // p, W // p). No gradient flows through it.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: a shape, a device or ``act`` does not fit.
        RuntimeError: the engine is not available.
    """
    engine = _engine()
    if x.dim() != 4:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
    _check("x", x)
    n, c, h, w = x.shape
    d, p = (weight.shape[0], weight.shape[-1]) if weight.dim() else (0, 0)
    if p < 1:
        raise ValueError(f"weight must have shape (D, {c}, p, p), got {tuple(weight.shape)}")
    _check("weight", weight, (d, c, p, p))
    if h < p or w < p:
        raise ValueError(f"x of {h} x {w} is smaller than a patch of {p} x {p}")
    for name, vector in (("bias", bias), ("scale", scale), ("shift", shift)):
        if vector is not None:
            _check(name, vector, (d,))
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    x = x.detach().resolve_neg()
    operands = [
        None if t is None else t.detach().resolve_neg().contiguous()
        for t in (weight, bias, scale, shift)
    ]
    out = torch.empty((n, d, h // p, w // p), dtype=torch.float32, device="cpu")
    engine.pointwise(
        x.data_ptr(),
        x.stride(),
        out.data_ptr(),
        (n, c, h, w),
        p,
        d,
        *(0 if t is None else t.data_ptr() for t in operands),
        _activation_numbers()[act],
        strassen_levels(),
        torch.get_num_threads(),
    )
    return out


def prepared_pointwise(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Callable[[Tensor], Tensor]:
    """`pointwise_mix` with these operands, which are checked here and not at every call.

    Args:
        weight, bias, scale, shift, act: as for `pointwise_mix`, contiguous.

    Returns:
        Of float32 maps (N, C, H, W) on the CPU; but for being at least p x p they are not checked.

    Raises:
        TypeError, ValueError, RuntimeError: as `pointwise_mix`.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if weight.dim() != 4 or not 1 <= weight.shape[2] == weight.shape[3]:
        raise ValueError(f"weight must have shape (D, C, p, p), got {tuple(weight.shape)}")
    d, _, p, _ = weight.shape
    _check("weight", weight)
    for name, vector in (("bias", bias), ("scale", scale), ("shift", shift)):
        if vector is not None:
            _check(name, vector, (d,))
    operands = (weight, bias, scale, shift)
    for name, t in zip(("weight", "bias", "scale", "shift"), operands, strict=True):
        if t is not None and (not t.is_contiguous() or t.is_neg()):
            raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")
    addresses = tuple(0 if t is None else t.data_ptr() for t in operands)
    return partial(_launch_pointwise, operands, d, p, addresses, _activation_numbers()[act])


def _launch_pointwise(
    kept: tuple[Tensor | None, ...],
    d: int,
    p: int,
    operands: tuple[int, ...],
    act: int,
    x: Tensor,
) -> Tensor:
    """``kept``: the tensors that ``operands`` are the addresses of."""
    shape = x.shape
    n, _, h, w = shape
    if h < p or w < p:
        raise ValueError(f"x of {h} x {w} is smaller than a patch of {p} x {p}")
    out = torch.empty((n, d, h // p, w // p), dtype=torch.float32, device="cpu")
    _engine().pointwise(
        x.data_ptr(),
        x.stride(),
        out.data_ptr(),
        shape,
        p,
        d,
        *operands,
        act,
        strassen_levels(),
        torch.get_num_threads(),
    )
    return out


def epilogue_(h: Tensor, scale: Tensor, shift: Tensor, act: str) -> Tensor:
    """``scale * act(h) + shift`` by the compiled engine, written over ``h``.

    One pass over memory for what follows a 1x1 convolution. On ``torch.get_num_threads()`` threads.

    Args:
        h: (N, C, H, W), float32, on the CPU, contiguous or channels-last; overwritten.
        scale, shift: (C,).
        act: a name in `convmixer_fast.arch.ACTIVATIONS`.

    Returns:
        ``h``. No gradient flows through it, and its version counter moves.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: a shape, a device, ``h``'s strides or ``act`` do not fit.
        RuntimeError: the engine is not available.
    """
    engine = _engine()
    if h.dim() != 4:
        raise ValueError(f"h must have shape (N, C, H, W), got {tuple(h.shape)}")
    n, c, height, width = h.shape
    _check("h", h)
    for name, vector in (("scale", scale), ("shift", shift)):
        _check(name, vector, (c,))
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if h.is_neg():
        raise ValueError("h must not be a lazily negated view: pass h.resolve_neg()")
    if h.is_contiguous():
        layout = _PLANAR
    elif h.is_contiguous(memory_format=torch.channels_last):
        layout = _CHANNELS_LAST
    else:
        raise ValueError(f"h must be contiguous or channels-last, got strides {h.stride()}")
    scale, shift = (v.detach().resolve_neg().contiguous() for v in (scale, shift))
    engine.epilogue_(
        h.data_ptr(),
        (n, c, height * width),
        scale.data_ptr(),
        shift.data_ptr(),
        _activation_numbers()[act],
        layout,
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(h)
    return h


def mixer_pack(
    taps: Tensor,
    bias1: Tensor | None,
    scale1: Tensor,
    shift1: Tensor,
    bias2: Tensor | None,
    scale2: Tensor,
    shift2: Tensor,
) -> Tensor:
    """All of a ConvMixer block but the pointwise weight, as a flat tensor for `mixer_stack`.

    Args:
        taps: (C, 1, k, k), the depthwise convolution's weight.
        bias1, scale1, shift1, bias2, scale2, shift2: (C,); the biases may be None.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: a shape or a device does not fit.
        RuntimeError: the engine is not available.
    """
    engine = _engine()
    c, k = taps.shape[0], taps.shape[-1]
    _check("taps", taps, (c, 1, k, k))
    vectors = {"bias1": bias1, "scale1": scale1, "shift1": shift1}
    vectors |= {"bias2": bias2, "scale2": scale2, "shift2": shift2}
    for name, vector in vectors.items():
        if vector is not None:
            _check(name, vector, (c,))
    parts = [
        None if t is None else t.detach().resolve_neg().contiguous()
        for t in (taps, bias1, scale1, shift1, bias2, scale2, shift2)
    ]
    packed = torch.empty(engine.mixer_packed_floats(c, k), dtype=torch.float32, device="cpu")
    engine.mixer_pack([0 if t is None else t.data_ptr() for t in parts], c, k, packed.data_ptr())
    return packed


def strassen_levels() -> int:
    """Levels of Strassen's algorithm in large GEMMs: 0, 1, or -1 for the default.

    The default is 1 where that is faster on this processor. ``CONVMIXER_FAST_STRASSEN=0`` and
    ``1``, read at every call, override it.
    """
    return int(environment.read("STRASSEN") or -1)


def mixer_stack(
    x: Tensor,
    weights: Sequence[Tensor],
    packed: Sequence[Tensor],
    kernel_size: int,
    act: str,
    out: Tensor | None = None,
) -> Tensor:
    """ConvMixer blocks one after the other on ``torch.get_num_threads()`` threads.

    Args:
        x: (N, C, H, W), float32, on the CPU, any strides.
        weights: (C, C, 1, 1) of each block, the pointwise convolution's, read where they are.
        packed: what `mixer_pack` made of the rest of each block.
        kernel_size: k of the depthwise convolutions.
        act: a name in `convmixer_fast.arch.ACTIVATIONS`.
        out: where the result goes, contiguous, of x's shape: ``x`` itself or no part of it; a new
            tensor by default.

    Returns:
        ``out``, contiguous, of x's shape. No gradient flows through it.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: a shape, a device or ``act`` does not fit.
        RuntimeError: the engine is not available.
        KeyboardInterrupt: between images; ``out`` is then unspecified.
    """
    engine = _engine()
    if x.dim() != 4:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
    _check("x", x)
    n, c, h, w = x.shape
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    floats = engine.mixer_packed_floats(c, kernel_size)
    for block in packed:
        _check("packed", block, (floats,))
    for weight in weights:
        _check("weights", weight, (c, c, 1, 1))
    x = x.detach().resolve_neg().contiguous()
    matrices = [weight.detach().resolve_neg().contiguous() for weight in weights]
    if out is None:
        out = torch.empty((n, c, h, w), dtype=torch.float32, device="cpu")
    _check("out", out, (n, c, h, w))
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    engine.mixer_stack(
        x.data_ptr(),
        out.data_ptr(),
        (n, c, h, w),
        kernel_size,
        [block.data_ptr() for block in packed],
        [matrix.data_ptr() for matrix in matrices],
        _activation_numbers()[act],
        strassen_levels(),
        torch.get_num_threads(),
    )
    return out


def prepared_stack(
    weights: Sequence[Tensor], packed: Sequence[Tensor], kernel_size: int, act: str
) -> Callable[[Tensor], Tensor]:
    """`mixer_stack` of these blocks, whose operands are checked here and not at every call.

    Args:
        weights, packed, kernel_size, act: as for `mixer_stack`, ``weights`` contiguous.

    Returns:
        Of contiguous float32 maps (N, C, H, W) on the CPU, which it does not check.

    Raises:
        TypeError, ValueError, RuntimeError: as `mixer_stack`.
    """
    engine = _engine()
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    channels = weights[0].shape[0] if weights and weights[0].dim() else 0
    for block in packed:
        _check("packed", block, (engine.mixer_packed_floats(channels, kernel_size),))
    for weight in weights:
        _check("weights", weight, (channels, channels, 1, 1))
        if not weight.is_contiguous() or weight.is_neg():
            raise ValueError(f"weights must be contiguous, got strides {weight.stride()}")
    return partial(
        _launch_stack,
        (*packed, *weights),
        kernel_size,
        [t.data_ptr() for t in packed],
        [t.data_ptr() for t in weights],
        _activation_numbers()[act],
    )


def _launch_stack(
    kept: Sequence[Tensor],
    kernel_size: int,
    packed: list[int],
    weights: list[int],
    act: int,
    x: Tensor,
) -> Tensor:
    """``kept``: the tensors that ``packed`` and ``weights`` are the addresses of."""
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    _engine().mixer_stack(
        x.data_ptr(),
        out.data_ptr(),
        x.shape,
        kernel_size,
        packed,
        weights,
        act,
        strassen_levels(),
        torch.get_num_threads(),
    )
    return out


def joined_pixels(c_in: int, c_out: int) -> int:
    """How many neighbouring pixels a matrix product of these channels may join, 1 where none.

    `mixer_band` on bands that begin and end with whole groups of that many pixels of the map gives
    the bits of the map as a whole.
    """
    return int(_engine().joined_pixels(c_in, c_out, strassen_levels()))


def mixer_band(
    window: Tensor,
    band: tuple[int, int, int, int],
    weight: Tensor,
    packed: Tensor,
    kernel_size: int,
    act: str,
    out: Tensor,
    map_pixels: int,
) -> Tensor:
    """One ConvMixer block on a band of a map too large to be held, on all of torch's threads.

    Args:
        window: (N, C, h, w), float32, on the CPU, w stride 1: the band with all rows and columns
            of the map that its depthwise convolution reaches. Past the window's edges are zeros.
        band: first and last row, first and last column of it (the last excluded) in the window.
        weight: (C, C, 1, 1), contiguous, the pointwise convolution's.
        packed: what `mixer_pack` made of the rest of the block.
        kernel_size: k of the depthwise convolution.
        act: a name in `convmixer_fast.arch.ACTIVATIONS`.
        out: (N, C, rows, columns) of the band, no part of ``window``, overwritten; a channel's
            pixels are contiguous.
        map_pixels: rows x columns of the whole map.

    Returns:
        ``out``. No gradient flows through it.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: a shape, a device, ``out``'s strides or ``act`` does not fit.
        RuntimeError: the engine is not available.
    """
    engine = _engine()
    _check("window", window)
    n, c, height, width = window.shape
    top, bottom, left, right = band
    if not (0 <= top <= bottom <= height and 0 <= left <= right <= width):
        raise ValueError(f"band {band} does not lie in a window of {height} x {width}")
    if window.stride(3) != 1 and width > 1:
        raise ValueError(f"window must have w stride 1, got strides {window.stride()}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    _check("weight", weight, (c, c, 1, 1))
    _check("packed", packed, (engine.mixer_packed_floats(c, kernel_size),))
    rows, cols = bottom - top, right - left
    _check("out", out, (n, c, rows, cols))
    if out.numel() == 0:
        return out
    if not out[0, 0].is_contiguous():
        raise ValueError(f"a channel of out must be contiguous, got strides {out.stride()}")
    matrix = weight.detach().contiguous()
    engine.mixer_band(
        window[:, :, top:, left:].data_ptr(),
        window.stride()[:3],
        (top, height - bottom, left, width - right),
        out.data_ptr(),
        out.stride()[:2],
        (n, c, rows, cols),
        kernel_size,
        packed.data_ptr(),
        matrix.data_ptr(),
        _activation_numbers()[act],
        strassen_levels(),
        map_pixels,
        torch.get_num_threads(),
    )
    return out


def isa() -> str:
    """The instruction set in use; "" without the engine."""
    engine = load()
    return "" if engine is None else engine.isa()


@cache
def _activation_numbers() -> dict[str, int]:
    return {name: number for number, name in enumerate(_engine().activations())}
