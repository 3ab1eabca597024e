"""ConvMixer with the signature, parameter names and methods of timm's.

As `reference`, this module does without ``from __future__ import annotations``.
"""

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checkpoint as checkpoints
from ..arch import VARIANTS, Arch, Variant, activation_layer, activation_name, find_variant
from ..reference import Normalization
from .blocks import MixerBlock
from .stack import MixerStack
from .stem import PatchEmbed


class AdaptiveAvgMaxPool2d(nn.Module):
    """(N, C, H, W) -> (N, C, 1, 1): half the sum of the mean and the maximum of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1))


class AdaptiveCatAvgMaxPool2d(nn.Module):
    """(N, C, H, W) -> (N, 2C, 1, 1): the means of all channels, then their maxima."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)), 1)


#: Pooling before the classifier, under timm's names.
_POOLS: dict[str, Callable[[], nn.Module]] = {
    "": nn.Identity,
    "avg": lambda: nn.AdaptiveAvgPool2d(1),
    "max": lambda: nn.AdaptiveMaxPool2d(1),
    "avgmax": AdaptiveAvgMaxPool2d,
    "catavgmax": AdaptiveCatAvgMaxPool2d,
}


class GlobalPool(nn.Module):
    """(N, C, H, W) -> (N, C), or (N, 2C) for ``catavgmax``, or the map itself for ``''``.

    Children are timm's, ``pool`` and ``flatten``, of the same classes: profilers and feature
    extractors find them by name and class.

    Args:
        pool_type: ``avg``, ``max``, ``avgmax`` (their mean), ``catavgmax`` (both), or ``''``;
            timm's ``fast`` prefix is accepted and changes nothing, ``fast`` alone is ``avg``.
    """

    def __init__(self, pool_type: str = "avg") -> None:
        super().__init__()
        name = pool_type or ""
        self.pool_type = "avg" if name == "fast" else name.removeprefix("fast")
        if self.pool_type not in _POOLS:
            raise ValueError(
                f"unknown global_pool {pool_type!r}: one of {', '.join(map(repr, _POOLS))}"
            )
        self.pool = _POOLS[self.pool_type]()
        self.flatten = nn.Flatten(1) if self.pool_type else nn.Identity()

    def feat_mult(self) -> int:
        return 2 if self.pool_type == "catavgmax" else 1

    def is_identity(self) -> bool:
        return not self.pool_type

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(self.pool(x))

    def of_statistics(self, mean: Tensor, peak: Tensor) -> Tensor:
        """The same from a map's mean and maximum, each (N, C), where there is pooling at all."""
        if self.pool_type in ("avg", "max"):
            return mean if self.pool_type == "avg" else peak
        return 0.5 * (mean + peak) if self.pool_type == "avgmax" else torch.cat((mean, peak), 1)

    def extra_repr(self) -> str:
        return f"pool_type={self.pool_type!r}"


class ConvMixer(nn.Module):
    """ConvMixer with timm's signature, parameter names and methods, and fused blocks.

    (N, in_chans, H, W), any strides -> (N, num_classes). H and W need not divide by the patch:
    trailing pixels are dropped, as PyTorch's strided convolution does.

    Args:
        dim: channels.
        depth: blocks.
        kernel_size: k of the depthwise convolutions, odd or even.
        patch_size: side of a patch, in pixels.
        in_chans: channels of the image.
        num_classes: outputs of the classifier; 0 for none (the pooled features come out).
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``; ``''`` for none, with
            ``num_classes=0``.
        drop_rate: dropout before the classifier.
        act_layer: a class or factory of activation modules, or a name in `arch.ACTIVATIONS`.
        device: of the parameters, as for `nn.Conv2d`.
        dtype: of the parameters, as for `nn.Conv2d`.
        drop_path_rate: stochastic depth of the residual branches, growing linearly with depth
            from 0 to this.
        n_classes: the original repository's name for ``num_classes``.
        normalize: (mean, std), a number for each channel of both: uint8 images, NCHW or
            channels-last, are taken too, and become ``(x / 255 - mean) / std`` in the stem, inside
            its kernel on a GPU. Images of other dtypes are left as they are.

    Raises:
        ValueError: an argument is out of range, or the pooling cannot feed the classifier.
        TypeError: an unknown argument, one of another type, or both names for the classes with
            different values.

    Source: Trockman and Kolter, "Patches Are All You Need?", 2022, arXiv:2201.09792.
    """

    __jit_unused_properties__ = ("arch", "default_cfg")

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int = 9,
        patch_size: int = 7,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        act_layer: Callable[[], nn.Module] | str = nn.GELU,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        drop_path_rate: float = 0.0,
        n_classes: int | None = None,
        normalize: Normalization | None = None,
    ) -> None:
        super().__init__()
        if n_classes is not None:
            if num_classes not in (1000, n_classes):
                raise TypeError(f"num_classes={num_classes} and n_classes={n_classes} disagree")
            num_classes = n_classes
        act_layer = activation_layer(act_layer)
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        # Arch checks the ranges, so that every way to build a model gives the same messages.
        Arch(dim, depth, kernel_size, patch_size, in_chans, num_classes, None)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dim
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.pretrained_cfg: dict[str, Any] = {}

        self.stem = PatchEmbed(in_chans, dim, patch_size, act_layer, device, dtype, normalize)
        # In Python: under FakeTensorMode a tensor has no values.
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = MixerStack(
            *[
                MixerBlock(dim, kernel_size, act_layer, rate, device=device, dtype=dtype)
                for rate in rates
            ]
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        # In timm's order.
        self.global_pool = GlobalPool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self._set_head(num_classes, self.global_pool, {"device": device, "dtype": dtype})

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike[str], act: str | None = None, **kwargs: Any
    ) -> "ConvMixer":
        """The model that a file holds, in eval mode; its numbers are read off the shapes.

        Its device and dtype are PyTorch's defaults unless ``kwargs`` say otherwise.

        Args:
            path: a checkpoint in any published key format; see `convmixer_fast.load_checkpoint`.
            act: the activation's name. Needed unless the shapes are a published variant's or the
                file says it: it cannot be seen in the weights.
            kwargs: further arguments of the constructor (``drop_rate``, ``device``...).

        Raises:
            CheckpointError: the file cannot be read, or the activation is unknown.
        """
        source = checkpoints.read_checkpoint(path)
        model = cls(**(checkpoints.build_model_kwargs(source, act) | kwargs))
        # A contradiction to a published variant was reported above, once.
        settled = replace(source, arch=replace(source.arch, act=model.arch.act))
        checkpoints.load_checkpoint(model, settled)
        return model.eval()

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's older name for ``pretrained_cfg``."""
        return self.pretrained_cfg

    @default_cfg.setter
    def default_cfg(self, cfg: dict[str, Any]) -> None:
        self.pretrained_cfg = cfg

    @property
    def arch(self) -> Arch:
        """The numbers of this model, read off its modules."""
        conv: Any = self.stem[0]
        blocks: Any = self.blocks
        first = blocks[0][0].fn[0] if len(blocks) else None
        return Arch(
            dim=self.num_features,
            depth=len(self.blocks),
            kernel_size=first.kernel_size[0] if first is not None else 1,
            patch_size=conv.kernel_size[0],
            in_chans=conv.in_channels,
            num_classes=self.num_classes,
            act=activation_name(self.stem[1]),
        )

    def _set_head(self, num_classes: int, pool: GlobalPool, factory: dict[str, Any]) -> None:
        if pool.is_identity() and num_classes > 0:
            raise ValueError(
                "global_pool='' leaves a map, which the classifier cannot take: "
                "pass num_classes=0, or a pooling such as 'avg'"
            )
        self.global_pool = pool
        self.head_hidden_size = self.num_features * pool.feat_mult()
        self.head: nn.Module = (
            nn.Linear(self.head_hidden_size, num_classes, **factory)
            if num_classes > 0
            else nn.Identity()
        )

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions of parameter groups, for timm's layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass and run the block again there."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of ``num_classes`` outputs (0 for none), and another pooling if named.

        Raises:
            ValueError: the pooling is unknown or cannot feed a classifier.
        """
        weight: Any = self.stem[0].weight
        pool = self.global_pool if global_pool is None else GlobalPool(global_pool)
        self._set_head(num_classes, pool, {"device": weight.device, "dtype": weight.dtype})
        self.num_classes = num_classes
        self.global_pool.train(self.training)
        self.head.train(self.training)

    def _run_stem(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            _check_image(x, self.stem)
        return self.stem(x)

    def _maps(self, x: Tensor, take: list[int], blocks: int) -> tuple[Tensor, list[Tensor]]:
        """The map after so many ``blocks``, and the maps after those whose index is in ``take``."""
        x = self._run_stem(x)
        maps: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i < blocks:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
                if i in take:
                    maps.append(x)
        return x, maps

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, dim, H // patch, W // patch)."""
        if self.grad_checkpointing and not torch.jit.is_scripting() and torch.is_grad_enabled():
            return self._maps(x, [], len(self.blocks))[0]
        return self.blocks(self._run_stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map to (N, num_classes), or to the pooled features with ``pre_logits``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps after some blocks, and the last one.

        Args:
            x: (N, in_chans, H, W).
            indices: the last n blocks for an int, all for None, else these blocks (negative ones
                count from the end).
            norm: accepted for timm; there is no final norm.
            stop_early: leave out the blocks after the last one asked for.
            output_fmt: only ``"NCHW"``.
            intermediates_only: return only the list of maps.

        Raises:
            ValueError: an index is out of range, or another format is asked for.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got '{output_fmt}'")
        take, last = _take_indices(len(self.blocks), indices)
        x, maps = self._maps(x, take, last + 1 if stop_early else len(self.blocks))
        if intermediates_only:
            return maps
        return x, maps

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the blocks after the last of ``indices``, and the head; returns the indices kept."""
        listed = indices if isinstance(indices, int) else list(indices)
        take, last = _take_indices(len(self.blocks), listed)
        self.blocks = self.blocks[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take


class FeatureInfo:
    """Channels, reductions and names of the maps that `FeatureExtractor` returns, as in timm."""

    def __init__(self, info: list[dict[str, Any]], out_indices: int | Sequence[int]) -> None:
        self.info = [{**row, "index": i} for i, row in enumerate(info)]
        last = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
        self.out_indices = tuple(last)

    def from_other(self, out_indices: int | Sequence[int]) -> "FeatureInfo":
        """The same rows, and other maps put out: the last n for an int."""
        return FeatureInfo(self.info, out_indices)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """The value of ``key`` of block ``idx``, of each of several, or of each map put out."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("module", idx)

    def get_dicts(
        self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None
    ) -> Any:
        """The rows of `get`'s ``idx``, with these keys or all; one dict for an int, else a list."""
        if isinstance(idx, int):
            return {k: self.info[idx][k] for k in (keys or self.info[idx])}
        return [self.get_dicts(keys, i) for i in (self.out_indices if idx is None else idx)]

    def __len__(self) -> int:
        return len(self.info)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.info[item]


class FeatureExtractor(nn.Module):
    """What ``features_only=True`` makes: (N, in_chans, H, W) -> list of maps (N, dim, h, w).

    Args:
        model: the network to cut; blocks after the last map and the head are removed.
        out_indices: the last n blocks for an int, else these blocks.
    """

    def __init__(self, model: ConvMixer, out_indices: int | Sequence[int] = 3) -> None:
        super().__init__()
        self.out_indices = model.prune_intermediate_layers(out_indices)
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model._maps(x, self.out_indices, len(self.model.blocks))[1]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint_path: str | os.PathLike[str] | None = None,
    *,
    features_only: bool = False,
    out_indices: int | Sequence[int] = 3,
    **kwargs: Any,
) -> ConvMixer | FeatureExtractor:
    """A published variant by timm's name (``convmixer_768_32``) or the paper's (``768/32``).

    Args:
        name: see `list_models`.
        pretrained: fetch the published weights through huggingface_hub. Another ``num_classes``
            leaves the classifier fresh, another ``in_chans`` sums or repeats the stem's weights.
        checkpoint_path: load this file instead, in any published key format.
        features_only: return a `FeatureExtractor` of the blocks ``out_indices``.
        out_indices: the last n blocks for an int, else these blocks.
        kwargs: arguments of `ConvMixer` that replace the variant's.

    Raises:
        ValueError: no variant has that name (`CheckpointError` for a file that does not fit).
        RuntimeError: the weights cannot be fetched.
    """
    variant = find_variant(name)
    arch = variant.arch
    if "n_classes" in kwargs:
        kwargs.setdefault("num_classes", kwargs["n_classes"])
    arguments: dict[str, Any] = {
        "dim": arch.dim,
        "depth": arch.depth,
        "kernel_size": arch.kernel_size,
        "patch_size": arch.patch_size,
        "in_chans": arch.in_chans,
        "num_classes": arch.num_classes,
        "act_layer": activation_layer(arch.act or "gelu"),
    }
    model = ConvMixer(**(arguments | kwargs))
    model.pretrained_cfg = variant.pretrained_cfg
    if checkpoint_path is not None:
        checkpoints.load_checkpoint(model, checkpoint_path)
    elif pretrained:
        _load_published(model, variant)
    return FeatureExtractor(model, out_indices) if features_only else model


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """timm names of the published variants that match a shell pattern, in natural order.

    Args:
        filter: such as ``"*1024*"``; empty for all.
        pretrained: only those whose weights a hub holds.
    """
    names = (
        name
        for name, variant in VARIANTS.items()
        if fnmatch.fnmatch(name, filter or "*") and (variant.hf_hub_id or not pretrained)
    )
    return sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def _load_published(model: ConvMixer, variant: Variant) -> None:
    remedy = "pass checkpoint_path= the file of its weights (any published format)"
    if variant.hf_hub_id is None:
        raise RuntimeError(f"no hub holds weights of {variant.name}: {remedy}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise RuntimeError(
            f'pretrained=True needs huggingface_hub: pip install "convmixer_fast[hub]", or {remedy}'
        ) from error
    try:
        path = hf_hub_download(variant.hf_hub_id, "model.safetensors")
    except Exception as error:
        # huggingface_hub raises errors of several libraries here; all mean the same to the caller.
        cause = str(error).strip().splitlines()
        raise RuntimeError(
            f"cannot fetch {variant.hf_hub_id} ({type(error).__name__}: "
            f"{cause[0] if cause else 'no message'}): {remedy}"
        ) from error
    state = dict(checkpoints.read_checkpoint(path).state_dict)
    stem: Any = model.stem[0].weight
    state["stem.0.weight"] = adapt_input_weight(state["stem.0.weight"], stem.shape[1])
    classifier = model.get_classifier()
    fits = (
        isinstance(classifier, nn.Linear) and classifier.weight.shape == state["head.weight"].shape
    )
    if not fits:
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
        state |= {f"head.{k}": v for k, v in classifier.state_dict().items()}
    checkpoints.load_checkpoint(model, state)


def adapt_input_weight(weight: Tensor, in_chans: int) -> Tensor:
    """A stem's weight (dim, c, p, p) for images of ``in_chans`` channels, as timm adapts it.

    One channel takes the sum over the old ones (a grey image then gives what its grey RGB copy
    gave); more repeat them in turn, scaled so that their sum is kept.
    """
    old = weight.shape[1]
    if in_chans == old:
        return weight
    wide = weight.float()
    if in_chans == 1:
        wide = wide.sum(dim=1, keepdim=True)
    else:
        wide = wide.repeat(1, -(-in_chans // old), 1, 1)[:, :in_chans] * (old / in_chans)
    return wide.to(weight.dtype)


def _take_indices(blocks: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """The blocks meant by timm's ``indices``, and the last of them."""
    if indices is None:
        indices = blocks
    if isinstance(indices, int):
        if not 0 < indices <= blocks:
            raise ValueError(f"the last {indices} blocks were asked for, the model has {blocks}")
        take = list(range(blocks - indices, blocks))
    else:
        take = [i + blocks if i < 0 else i for i in indices]
        if len(take) == 0 or min(take) < 0 or max(take) >= blocks:
            raise ValueError(f"block indices {indices} are out of range, the model has {blocks}")
    return take, max(take)


def _check_image(x: Tensor, whole: nn.Sequential) -> None:
    """One line for the inputs that PyTorch would answer with a riddle."""
    # No compiler's or tracer's graph is to hold a check of one example's shape.
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or isinstance(x, torch.fx.Proxy)
    ):
        return
    stem = whole[0]
    if not isinstance(stem, nn.Conv2d):
        return
    if x.dtype == torch.uint8 and getattr(whole, "normalize", None) is None:
        raise ValueError(
            "the images are uint8 and the model does not know how to normalise them: build it with "
            "normalize=(mean, std), or pass normalised floats"
        )
    if x.dim() != 4:
        raise ValueError(
            f"expected a batch of images (N, {stem.in_channels}, H, W), got {tuple(x.shape)}: "
            "add the batch axis with x[None] if this is one image"
        )
    if x.shape[1] != stem.in_channels:
        raise ValueError(
            f"expected {stem.in_channels} channels, got {x.shape[1]} in {tuple(x.shape)}: "
            f"the model was built with in_chans={stem.in_channels}"
        )
    rows, cols = stem.kernel_size
    if x.shape[2] < rows or x.shape[3] < cols:
        raise ValueError(
            f"the image is {x.shape[2]} x {x.shape[3]} px, smaller than one patch of "
            f"{rows} x {cols}: resize it, or use a model with a smaller patch"
        )


__all__ = [
    "ConvMixer",
    "FeatureExtractor",
    "FeatureInfo",
    "GlobalPool",
    "create_model",
    "list_models",
]
