"""Fused models for `timm.create_model`, under names of their own in timm's registry.

    import timm, convmixer_fast.compat.timm
    convmixer_fast.compat.timm.register()
    model = timm.create_model("convmixer_fast_768_32", pretrained=True, num_classes=10)

timm's own builder makes the models: its arguments, pretrained weights and configurations work as
for its own ConvMixers. Only `register` imports timm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import nn

from ..arch import VARIANTS, Variant, activation_layer
from ..modules.model import ConvMixer

_PREFIX = "convmixer_fast_"

#: timm reads the configurations of a registered model from this attribute of its module.
default_cfgs: dict[str, Any] = {}
#: timm appends the names of the models that it registers.
__all__ = ["register"]


def register() -> list[str]:
    """Add the published variants to timm's registry as ``convmixer_fast_*``; returns their names.

    Calling it again changes nothing.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        from timm.models import generate_default_cfgs, is_model, register_model
        from timm.models._pretrained import PretrainedCfg
    except ImportError as error:
        raise ImportError(
            f"convmixer_fast.compat.timm needs timm ({error}): pip install timm"
        ) from error
    # A tag in timm names weights: only variants whose weights a hub holds have one.
    published = {
        _PREFIX + variant.name.removeprefix("convmixer_"): variant
        for variant in VARIANTS.values()
        if variant.hf_hub_id
    }
    known = {field.name for field in fields(PretrainedCfg)} - {"architecture", "tag"}
    default_cfgs.update(
        generate_default_cfgs(
            {
                f"{name}.{variant.tag}": {
                    key: value for key, value in variant.pretrained_cfg.items() if key in known
                }
                for name, variant in published.items()
            }
        )
    )
    for name, variant in published.items():
        if not is_model(name):
            register_model(_entrypoint(name, variant))
    return list(published)


def _entrypoint(name: str, variant: Variant) -> Callable[..., nn.Module]:
    """The function that timm calls for a name, also set as this module's attribute."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        arch = variant.arch
        arguments: dict[str, Any] = {
            "dim": arch.dim,
            "depth": arch.depth,
            "kernel_size": arch.kernel_size,
            "patch_size": arch.patch_size,
            "act_layer": activation_layer(arch.act or "gelu"),
        } | kwargs
        features = {"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"}
        built: nn.Module = build_model_with_cfg(
            ConvMixer, name, pretrained, feature_cfg=features, **arguments
        )
        return built

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{variant.arch}; arguments as for `timm.create_model`."
    globals()[name] = build
    return build
