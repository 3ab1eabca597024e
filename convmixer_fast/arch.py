"""ConvMixer architectures: shapes, published variants and costs.

The package's only list of variants and of activation names, and its only count of parameters and
multiply-adds.

Source: Trockman and Kolter, "Patches Are All You Need?", TMLR 2022, arXiv:2201.09792.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, SupportsIndex

from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Activations of the fused operators, by their names in the operators' schemas. Each computes the
#: exact function of its module (GELU is the erf form).
ACTIVATIONS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "gelu": nn.GELU,
        "relu": nn.ReLU,
        "silu": nn.SiLU,
        "hardswish": nn.Hardswish,
        "identity": nn.Identity,
    }
)

_NAMES: Mapping[type, str] = {cls: name for name, cls in ACTIVATIONS.items()}


def activation_name(act: nn.Module | type[nn.Module] | str | None) -> str | None:
    """The name in `ACTIVATIONS` of an activation module, class or name; None when it has none.

    ``nn.GELU(approximate="tanh")`` has none: it is another function than ``"gelu"``.
    Subclasses have none either: their forward may compute anything.
    """
    if isinstance(act, str):
        name = act.lower()
        return "silu" if name == "swish" else name if name in ACTIVATIONS else None
    if isinstance(act, nn.GELU) and act.approximate != "none":
        return None
    return _NAMES.get(act if isinstance(act, type) else type(act))


def activation_layer(act: Callable[[], nn.Module] | str) -> Callable[[], nn.Module]:
    """A factory of activation modules from a name in `ACTIVATIONS` or from a factory (a class).

    Raises:
        ValueError: the name is not known.
        TypeError: neither a name nor a callable, or a module instead of its class.
    """
    if isinstance(act, nn.Module) or not (isinstance(act, str) or callable(act)):
        raise TypeError(
            "an activation is given by a module class such as torch.nn.GELU, a function that makes "
            f"modules, or a name ({', '.join(ACTIVATIONS)}); got {act!r}"
        )
    if not isinstance(act, str):
        return act
    name = activation_name(act)
    if name is None:
        raise ValueError(
            f"unknown activation {act!r}: use one of {', '.join(ACTIVATIONS)}, "
            "or pass a module class"
        )
    return ACTIVATIONS[name]


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one image in each part of the network."""

    stem: int
    depthwise: int
    pointwise: int
    head: int

    @property
    def total(self) -> int:
        return self.stem + self.depthwise + self.pointwise + self.head


@dataclass(frozen=True)
class Arch:
    """The numbers that define a ConvMixer.

    ``act`` is a name in `ACTIVATIONS`, or None where it is unknown: the shapes in a checkpoint
    show everything but the activation.
    """

    dim: int
    depth: int
    kernel_size: int = 9
    patch_size: int = 7
    in_chans: int = 3
    num_classes: int = 1000
    act: str | None = "gelu"

    def __post_init__(self) -> None:
        least = {"dim": 1, "depth": 0, "kernel_size": 1, "patch_size": 1, "in_chans": 1}
        for name, low in {**least, "num_classes": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, SupportsIndex):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if operator.index(value) < low:
                bound = f"must be at least {low}" if low else "must not be negative"
                raise ValueError(f"{name} {bound}, got {value}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """dim, depth, kernel_size, patch_size: the numbers that fine-tuning keeps."""
        return self.dim, self.depth, self.kernel_size, self.patch_size

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros before and after each axis that keep its length ("same"): (k-1)//2 and k//2."""
        return (self.kernel_size - 1) // 2, self.kernel_size // 2

    def grid(self, img_size: int | tuple[int, int] = 224) -> tuple[int, int]:
        """Patches (rows, columns) of an image; trailing pixels are dropped."""
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        return height // self.patch_size, width // self.patch_size

    @property
    def params(self) -> int:
        """Trainable parameters (BatchNorm's running statistics are buffers and do not count)."""
        c = self.dim
        stem = c * self.in_chans * self.patch_size**2 + c + 2 * c
        block = (c * self.kernel_size**2 + c + 2 * c) + (c * c + c + 2 * c)
        head = self.num_classes * c + self.num_classes
        return stem + self.depth * block + head

    def macs(self, img_size: int | tuple[int, int] = 224) -> Macs:
        """Multiply-adds of all convolutions and of the classifier for one image.

        Border taps on padding count like any other (0.6 to 9 % of the depthwise part).
        """
        rows, cols = self.grid(img_size)
        pixels, c = rows * cols, self.dim
        return Macs(
            stem=pixels * c * self.in_chans * self.patch_size**2,
            depthwise=self.depth * pixels * c * self.kernel_size**2,
            pointwise=self.depth * pixels * c * c,
            head=c * self.num_classes,
        )

    def macs_timm(self, img_size: int | tuple[int, int] = 224) -> int:
        """Multiply-adds as timm's published tables count them.

        fvcore misses convolutions with ``padding="same"``, that is, the depthwise ones. It adds 2
        an element for each inference BatchNorm and 1 for the mean pool.
        """
        rows, cols = self.grid(img_size)
        macs, elements = self.macs(img_size), rows * cols * self.dim
        norms = 1 + 2 * self.depth
        return macs.stem + macs.pointwise + macs.head + (2 * norms + 1) * elements

    def macts_timm(self, img_size: int | tuple[int, int] = 224) -> int:
        """Activations as timm's published tables count them.

        These are the outputs of the stem, of the pointwise convolutions and of the classifier.
        """
        rows, cols = self.grid(img_size)
        return (1 + self.depth) * rows * cols * self.dim + self.num_classes

    def macs_mmpretrain(self, img_size: int | tuple[int, int] = 224) -> int:
        """Multiply-adds of the backbone as mmpretrain's model cards count them.

        Depthwise convolutions are missing too. Every BatchNorm counts 2 an element, every residual
        addition and ReLU 1, GELU 0, and the pooling neck 2. The classifier does not count.
        """
        rows, cols = self.grid(img_size)
        macs, elements = self.macs(img_size), rows * cols * self.dim
        activations = 1 + 2 * self.depth
        passes = 2 * activations + self.depth + (activations if self.act == "relu" else 0) + 2
        return macs.stem + macs.pointwise + passes * elements

    def __str__(self) -> str:
        return (
            f"ConvMixer-{self.dim}/{self.depth} (kernel {self.kernel_size}, "
            f"patch {self.patch_size}, {self.act or 'activation unknown'}, "
            f"{self.in_chans} -> {self.num_classes})"
        )


@dataclass(frozen=True)
class Variant:
    """A published model: its name in timm, its name in the paper, its numbers and its recipe."""

    name: str
    paper_name: str
    arch: Arch
    hf_hub_id: str | None = None
    tag: str = ""
    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.96
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    extra_names: tuple[str, ...] = field(default=())

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's ``pretrained_cfg`` of this variant, as a fresh dict."""
        return {
            "architecture": self.name,
            "tag": self.tag,
            "hf_hub_id": self.hf_hub_id,
            "url": "",
            "num_classes": self.arch.num_classes,
            "input_size": self.input_size,
            "pool_size": None,
            "crop_pct": self.crop_pct,
            "crop_mode": "center",
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
            "first_conv": "stem.0",
            "classifier": "head",
            "license": "mit",
            "paper_ids": "arXiv:2201.09792",
            "paper_name": "Patches Are All You Need?",
            "origin_url": "https://github.com/locuslab/convmixer",
        }


_PUBLISHED = (
    Variant(
        "convmixer_1536_20",
        "1536/20",
        Arch(1536, 20, kernel_size=9, patch_size=7, act="gelu"),
        hf_hub_id="timm/convmixer_1536_20.in1k",
        tag="in1k",
    ),
    Variant(
        "convmixer_768_32",
        "768/32",
        # The one published model with ReLU: with GELU its weights load and its accuracy silently
        # drops.
        Arch(768, 32, kernel_size=7, patch_size=7, act="relu"),
        hf_hub_id="timm/convmixer_768_32.in1k",
        tag="in1k",
    ),
    Variant(
        "convmixer_1024_20_ks9_p14",
        "1024/20",
        Arch(1024, 20, kernel_size=9, patch_size=14, act="gelu"),
        hf_hub_id="timm/convmixer_1024_20_ks9_p14.in1k",
        tag="in1k",
        extra_names=("convmixer_1024_20",),
    ),
    Variant(
        "convmixer_256_8_cifar10",
        "256/8",
        Arch(256, 8, kernel_size=5, patch_size=2, num_classes=10, act="gelu"),
        input_size=(3, 32, 32),
        crop_pct=1.0,
        # Mean and deviation of CIFAR-10 in the authors' CIFAR repository.
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2471, 0.2435, 0.2616),
    ),
)

#: Every published variant under its timm name, in the order of the paper's table.
VARIANTS: Mapping[str, Variant] = MappingProxyType({v.name: v for v in _PUBLISHED})


def find_variant(name: str) -> Variant:
    """The variant of that name: timm's (with or without its tag), the paper's, or an alias.

    Raises:
        ValueError: no variant has that name; the message lists the names.
    """
    wanted = name.strip().lower().removeprefix("hf-hub:").removeprefix("hf_hub:")
    wanted = wanted.removeprefix("timm/").removeprefix("convmixer-")
    for v in _PUBLISHED:
        names = {v.name, v.paper_name, f"{v.name}.{v.tag}" if v.tag else v.name, *v.extra_names}
        if wanted in names:
            return v
    known = ", ".join(f"{v.name} ({v.paper_name})" for v in _PUBLISHED)
    raise ValueError(f"unknown model {name!r}: choose one of {known}")


def known_activation(arch: Arch) -> str | None:
    """The activation of the published variant of this `Arch.shape`, else None.

    Classes and input channels may differ: fine-tuning changes them.
    """
    return next((v.arch.act for v in _PUBLISHED if v.arch.shape == arch.shape), None)
