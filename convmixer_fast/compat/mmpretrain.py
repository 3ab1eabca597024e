"""Drop-in replacement for mmpretrain's `ConvMixer` backbone: one word of a config changes.

    custom_imports = dict(imports=["convmixer_fast.compat.mmpretrain"])
    model = dict(backbone=dict(type="ConvMixerFast", arch="768/32", act_cfg=dict(type="ReLU")), ...)

Importing this module registers the backbone with mmpretrain if that is installed. The class needs
neither mmpretrain nor mmengine. Like `reference`, the module does without
``from __future__ import annotations``.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..arch import ACTIVATIONS, activation_name, find_variant
from ..checkpoint import read_checkpoint
from ..modules.model import ConvMixer as _ConvMixer
from ..reference import scripted_as

REGISTERED_NAME = "ConvMixerFast"

#: mmpretrain's name of each number of a custom architecture -> the name in `Arch`.
_NUMBERS = {
    "embed_dims": "dim",
    "depth": "depth",
    "patch_size": "patch_size",
    "kernel_size": "kernel_size",
}
#: Norms by their names in mmcv.
_NORMS: dict[str, type[nn.BatchNorm2d | nn.SyncBatchNorm]] = {
    "BN": nn.BatchNorm2d,
    "BN2d": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
}
#: mmcv's names of activations that differ from those in `arch.ACTIVATIONS`.
_MMCV_ACTIVATIONS = {"hswish": "hardswish"}


def _maps(self: Any, x: Tensor) -> list[Tensor]:
    """The backbone's maps as a list: TorchScript has no tuples of variable length."""
    x = self.stem(x)
    maps: list[Tensor] = []
    for i, stage in enumerate(self.stages):
        x = stage(x)
        if i in self.out_indices:
            maps.append(x)
    return maps


class ConvMixer(nn.Module):
    """mmpretrain's ConvMixer backbone with fused blocks: (N, in_channels, H, W) -> tuple of maps.

    Each map is (N, embed_dims, H // patch_size, W // patch_size). Keys are ``stem.*`` and
    ``stages.*``. As in mmpretrain, all layers share one activation module, and frozen stages leave
    the stem trainable. Unlike in mmpretrain, ``train()`` returns the module and ``out_indices`` may
    be any sequence, with negative numbers.

    Args:
        arch: ``"768/32"``, ``"1024/20"`` or ``"1536/20"``, or a dict with ``embed_dims``,
            ``depth``, ``patch_size`` and ``kernel_size``.
        in_channels: channels of the image.
        norm_cfg: ``type`` BN or SyncBN, and ``requires_grad`` or arguments of the norm's class.
        act_cfg: ``type`` GELU, ReLU, SiLU, Swish, HSwish, Hardswish or Identity, and arguments of
            that class. The published 768/32 has ReLU.
        out_indices: blocks whose maps are returned, in the network's order; negative ones count
            from the end.
        frozen_stages: number of leading blocks that stay in eval mode, without gradients.
        init_cfg: for `init_weights`, one dict or several.

    Raises:
        ValueError: an argument is unknown or out of range.
        ImportError: ``init_cfg`` asks for an initializer of mmengine, which is not installed.

    Attributes:
        embed_dims, depth, patch_size, kernel_size: the numbers of the architecture.
        out_indices, frozen_stages, init_cfg: the arguments; no index is negative.
    """

    def __init__(
        self,
        arch: str | Mapping[str, int] = "768/32",
        in_channels: int = 3,
        norm_cfg: Mapping[str, Any] = {"type": "BN"},
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        numbers = _numbers(arch)
        self.embed_dims = numbers["embed_dims"]
        self.depth = numbers["depth"]
        self.patch_size = numbers["patch_size"]
        self.kernel_size = numbers["kernel_size"]
        self.out_indices = _out_indices(out_indices, self.depth)
        if frozen_stages > self.depth:
            raise ValueError(
                f"frozen_stages={frozen_stages}, but the architecture has {self.depth} stages"
            )
        self.frozen_stages = frozen_stages
        self.init_cfg = init_cfg
        for cfg in _init_cfgs(init_cfg):
            if not _is_local_file(cfg):
                _mmengine_initialize()
        self.act = _build_activation(act_cfg)
        model = _ConvMixer(
            dim=self.embed_dims,
            depth=self.depth,
            kernel_size=self.kernel_size,
            patch_size=self.patch_size,
            in_chans=in_channels,
            num_classes=0,
            act_layer=lambda: self.act,
        )
        self.stem = model.stem
        self.stages = model.blocks
        _set_norms(self, norm_cfg)
        self._freeze_stages()

    @scripted_as(_maps)
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(_maps(self, x))

    # torch.fx copies the annotation into its graphs, and TorchScript of torch 2.8 cannot read it.
    del forward.__annotations__["return"]

    def train(self, mode: bool = True) -> "ConvMixer":
        """Set training or eval mode; frozen stages stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        for stage in self.stages[: max(self.frozen_stages, 0)]:
            stage.eval()
            stage.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialize as ``init_cfg`` says; mmpretrain's runner calls this before training.

        ``dict(type="Pretrained", checkpoint=path)`` loads a file in any published key format, of a
        backbone or a whole classifier (``prefix="backbone."`` is accepted and has no effect). The
        file must hold every tensor of the backbone. mmengine handles every other ``init_cfg``, URLs
        included.

        Raises:
            CheckpointError: the file cannot be read.
            ValueError: the file's weights are of another architecture.
        """
        cfgs = _init_cfgs(self.init_cfg)
        # Initializers first: as in mmengine, pretrained weights override them.
        for cfg in sorted(cfgs, key=_is_pretrained):
            if _is_local_file(cfg):
                self._load_pretrained(cfg["checkpoint"])
            else:
                _mmengine_initialize()(self, dict(cfg))

    def _load_pretrained(self, path: str | os.PathLike[str]) -> None:
        state = {
            key.replace("blocks.", "stages.", 1): tensor
            for key, tensor in read_checkpoint(path).state_dict.items()
            if not key.startswith("head.")
        }
        ours = self.state_dict()
        strange = [
            f"{key} is {_shape(state, key)} in the file and {_shape(ours, key)} in the backbone"
            for key in {**ours, **state}
            if _shape(state, key) != _shape(ours, key)
        ]
        if strange:
            raise ValueError(
                f"{os.fspath(path)} is of another architecture: {strange[0]}"
                + (f", and {len(strange) - 1} more" if len(strange) > 1 else "")
            )
        self.load_state_dict(state)


def register() -> bool:
    """Register `ConvMixer` with mmpretrain as ``ConvMixerFast``; False if it already was.

    Raises:
        ImportError: mmpretrain is not installed or cannot be imported.
    """
    try:
        from mmpretrain.registry import MODELS
    except Exception as error:
        # mmpretrain asserts versions, and its dependencies raise exceptions of their own.
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ImportError(
            f"{REGISTERED_NAME} cannot be registered, importing mmpretrain fails ({cause}): "
            "pip install mmpretrain, or use convmixer_fast.compat.mmpretrain.ConvMixer directly"
        ) from error
    if MODELS.module_dict.get(REGISTERED_NAME) is ConvMixer:
        return False
    # Forced: after a reload of this module the registered class is the old one.
    MODELS.register_module(name=REGISTERED_NAME, module=ConvMixer, force=True)
    return True


def _numbers(arch: str | Mapping[str, int]) -> dict[str, int]:
    if isinstance(arch, str):
        found = find_variant(arch).arch
        return {name: getattr(found, ours) for name, ours in _NUMBERS.items()}
    missing = [name for name in _NUMBERS if name not in arch]
    if missing:
        raise ValueError(f"arch lacks {', '.join(missing)}: it needs {', '.join(_NUMBERS)}")
    return {name: int(arch[name]) for name in _NUMBERS}


def _out_indices(out_indices: int | Sequence[int], depth: int) -> list[int]:
    indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    for i in indices:
        if not -depth <= i < depth:
            raise ValueError(f"out_indices has {i}, but the architecture has {depth} stages")
    return [i % depth for i in indices]


def _build_activation(cfg: Mapping[str, Any]) -> nn.Module:
    arguments = dict(cfg)
    kind = arguments.pop("type", None)
    name = str(kind).lower()
    name = activation_name(_MMCV_ACTIVATIONS.get(name, name)) or ""
    if name not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {kind!r} in act_cfg: one of GELU, ReLU, SiLU, Swish, HSwish, "
            "Hardswish, Identity"
        )
    return ACTIVATIONS[name](**arguments)


def _set_norms(model: nn.Module, cfg: Mapping[str, Any]) -> None:
    """Replace every BatchNorm by the norm that ``cfg`` asks for, under the same name."""
    arguments = dict(cfg)
    kind = arguments.pop("type", None)
    if kind not in _NORMS:
        raise ValueError(f"unknown norm {kind!r} in norm_cfg: one of {', '.join(_NORMS)}")
    requires_grad = arguments.pop("requires_grad", True)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                norm = _NORMS[kind](child.num_features, **arguments)
                norm.requires_grad_(requires_grad)
                parent.add_module(name, norm)


def _init_cfgs(
    init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
) -> list[Mapping[str, Any]]:
    if not init_cfg:
        return []
    cfgs = [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg)
    for cfg in cfgs:
        if not isinstance(cfg, Mapping) or "type" not in cfg:
            raise ValueError(f"init_cfg must be dicts with a 'type' each, got {cfg!r}")
    return cfgs


def _is_pretrained(cfg: Mapping[str, Any]) -> bool:
    return getattr(cfg["type"], "__name__", cfg["type"]) in ("Pretrained", "PretrainedInit")


def _is_local_file(cfg: Mapping[str, Any]) -> bool:
    """Whether ``cfg`` names a pretrained file on a disk, not a URL such as ``https://...``."""
    if not _is_pretrained(cfg):
        return False
    if "checkpoint" not in cfg:
        raise ValueError("init_cfg of type 'Pretrained' needs a 'checkpoint': the file's path")
    return "://" not in os.fspath(cfg["checkpoint"])


def _mmengine_initialize() -> Callable[[nn.Module, dict[str, Any]], None]:
    try:
        from mmengine.model import initialize
    except ImportError as error:
        raise ImportError(
            "this init_cfg is one of mmengine's initializers, which cannot be imported "
            f"({error}): pip install mmengine, or pass dict(type='Pretrained', checkpoint=path)"
        ) from error
    found: Callable[[nn.Module, dict[str, Any]], None] = initialize
    return found


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...] | str:
    return tuple(state[key].shape) if key in state else "missing"


def _register_if_present() -> None:
    if "mmpretrain" not in sys.modules and importlib.util.find_spec("mmpretrain") is None:
        return
    try:
        register()
    except ImportError as error:
        warnings.warn(str(error), stacklevel=2)


_register_if_present()

__all__ = ["ConvMixer", "register"]
