"""Key formats of published ConvMixer files: names, conversions and shapes.

Four ways of naming the same tensors are in use. ``i`` counts the blocks from 0, ``d`` is the depth:

=================  =================  =====================  =======================  =============
part               timm               locuslab (Sequential)  mmpretrain               tweet
=================  =================  =====================  =======================  =============
stem conv, norm    stem.0, 2          0, 2                   backbone.stem.0, 2       0.0, 0.2
depthwise, norm    blocks.i.0.fn.0,2  3+i.0.fn.0, 2          backbone.stages.i.0.fn…  1+i.0.0.0, 2
pointwise, norm    blocks.i.1, 3      3+i.1, 3               backbone.stages.i.1, 3   1+i.1.0, 2
classifier         head               d+5                    head.fc                  d+3
=================  =================  =====================  =======================  =============

The package works with timm's names; the other formats are converted on the way in and out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..arch import Arch

#: The key formats, timm's first.
FORMATS = ("timm", "locuslab", "mmpretrain", "tweet")

CONV_LEAVES = ("weight", "bias")
NORM_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
#: PaddlePaddle's names of BatchNorm's statistics.
PADDLE_LEAVES = {"_mean": "running_mean", "_variance": "running_var"}
#: Parts of the longest key, ``backbone.stages.0.0.fn.0.weight``.
MAX_KEY_PARTS = 7


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, loaded or written; the message is one line."""


@dataclass(frozen=True)
class Layout:
    """Module names of one format; ``{}`` stands for the number of a block or of the classifier.

    Attributes:
        stem: convolution and norm.
        block: a block.
        mixing: depthwise convolution and norm, pointwise convolution and norm, within a block.
        head: the classifier.
        top: pattern of the first part of a key.
        first_block: the number of the first block.
    """

    stem: tuple[str, str]
    block: str
    mixing: tuple[str, str, str, str]
    head: str
    top: str
    first_block: int = 0

    def modules(self, depth: int) -> list[str]:
        """Every module that holds tensors, in the network's order; the classifier is the last."""
        numbers = range(self.first_block, self.first_block + depth)
        blocks = [f"{self.block.format(n)}.{part}" for n in numbers for part in self.mixing]
        # In a Sequential, the pool and the flattening come between blocks and classifier.
        return [*self.stem, *blocks, self.head.format(self.first_block + depth + 2)]

    @cached_property
    def block_key(self) -> re.Pattern[str]:
        """Matches the keys of the blocks; group 1 is the block's number."""
        return re.compile(_pattern(self.block, self.mixing))

    @cached_property
    def any_key(self) -> re.Pattern[str]:
        """Matches every key of the format."""
        others = map(_pattern, (*self.stem, self.head))
        return re.compile("|".join((self.block_key.pattern, *others)))


def _pattern(template: str, parts: Iterable[str] = ()) -> str:
    """A regular expression of the keys below a module, or below these parts of it."""
    # Six digits suffice for any network, and bound the loop that a hostile number could cause.
    module = re.escape(template).replace(r"\{\}", "([0-9]{1,6})")
    choice = "|".join(map(re.escape, parts))
    return module + (rf"\.(?:{choice})" if choice else "") + r"\.[a-z_]+"


_MIXING = ("0.fn.0", "0.fn.2", "1", "3")
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "timm": Layout(("stem.0", "stem.2"), "blocks.{}", _MIXING, "head", "stem|blocks|head"),
        "locuslab": Layout(("0", "2"), "{}", _MIXING, "{}", "[0-9]+", first_block=3),
        "mmpretrain": Layout(
            ("backbone.stem.0", "backbone.stem.2"),
            "backbone.stages.{}",
            _MIXING,
            "head.fc",
            # The files of a backbone alone leave out ``backbone``.
            "backbone|stem|stages|head",
        ),
        "tweet": Layout(
            ("0.0", "0.2"), "{}", ("0.0.0", "0.0.2", "1.0", "1.2"), "{}", "[0-9]+", first_block=1
        ),
    }
)


def key_table(form: str, depth: int) -> dict[str, str]:
    """Every key of a format -> timm's key, in the network's order."""
    leaves = [CONV_LEAVES, NORM_LEAVES] * (1 + 2 * depth) + [CONV_LEAVES]
    theirs, ours = LAYOUTS[form].modules(depth), LAYOUTS["timm"].modules(depth)
    return {
        f"{their}.{leaf}": f"{our}.{leaf}"
        for their, our, tensors in zip(theirs, ours, leaves, strict=True)
        for leaf in tensors
    }


def full_key(key: str, form: str) -> str:
    """The key with the ``backbone.`` that files of mmpretrain's backbone alone leave out."""
    if form == "mmpretrain" and not key.startswith(("backbone.", "head.")):
        return f"backbone.{key}"
    return key


def is_head(key: str) -> bool:
    """Whether a key, in timm's names, is the classifier's."""
    return key.startswith("head.")


def is_counter(key: str) -> bool:
    """Whether a key is that of a BatchNorm's counter of batches."""
    return key.endswith(".num_batches_tracked")


def convert_state_dict(
    state_dict: Mapping[str, Any], to: str, depth: int | None = None
) -> dict[str, Any]:
    """Rename the keys of a state dict in timm's names; the values are the same objects.

    Without a classifier the mmpretrain names are those of the backbone alone.

    Args:
        state_dict: tensors, or anything else, under timm's names.
        to: one of `FORMATS`.
        depth: blocks of the network; default: counted from the keys. Required where the keys
            are a part of the network only, since the classifier's name depends on it.

    Raises:
        CheckpointError: an unknown format, or keys that are not timm's at that depth.
    """
    if to not in FORMATS:
        raise CheckpointError(f"unknown format {to!r}: use one of {', '.join(FORMATS)}")
    if depth is None:
        numbers = block_numbers(state_dict, "timm")
        depth = max(numbers, default=-1) + 1
        require_every_block(numbers, "timm", "the state dict")
    names = {ours: theirs for theirs, ours in key_table(to, depth).items()}
    strange = [key for key in state_dict if key not in names]
    if strange:
        raise CheckpointError(
            f"the state dict holds {few(strange)}, no key of a ConvMixer of depth {depth} under "
            "timm's names: pass it through read_checkpoint first"
        )
    if to == "mmpretrain" and not any(map(is_head, state_dict)):
        names = {ours: theirs.removeprefix("backbone.") for ours, theirs in names.items()}
    return {names[key]: value for key, value in state_dict.items()}


def block_numbers(keys: Iterable[str], form: str) -> set[int]:
    """The numbers of the blocks that keys of a format name."""
    found = map(LAYOUTS[form].block_key.fullmatch, keys)
    return {int(match[1]) for match in found if match}


def require_every_block(numbers: set[int], form: str, label: str) -> None:
    """Check that the numbers of the blocks have no gap.

    Raises:
        CheckpointError: a block is missing.
    """
    first = LAYOUTS[form].first_block
    for i in range(first, first + len(numbers)):
        if i not in numbers:
            raise CheckpointError(
                f"{label}: block {i} is missing, though blocks go up to {max(numbers)}: the "
                "checkpoint is incomplete"
            )


def read_arch(tensors: Mapping[str, Tensor], depth: int) -> Arch:
    """The architecture, from the shapes of the first convolutions and of the classifier.

    ``act`` is None: shapes do not show the activation.

    Raises:
        CheckpointError: a first convolution is missing or not square.
    """
    sizes = {}
    for key in ["stem.0.weight"] + ["blocks.0.0.fn.0.weight"] * (depth > 0):
        if key not in tensors:
            raise CheckpointError(f"{key} is missing")
        shape = sizes[key] = tuple(tensors[key].shape)
        if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
            raise CheckpointError(f"{key} has shape {shape}, not that of a square convolution")
    dim, in_chans, patch_size, _ = sizes["stem.0.weight"]
    head = tensors.get("head.weight")
    kernel = {"kernel_size": sizes["blocks.0.0.fn.0.weight"][-1]} if depth else {}
    return Arch(
        dim=dim,
        depth=depth,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=0 if head is None or head.ndim == 0 else head.shape[0],
        act=None,
        **kernel,
    )


def tensor_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor under timm's names."""
    c, k, p = arch.dim, arch.kernel_size, arch.patch_size
    convs = [(c, arch.in_chans, p, p)] + [(c, 1, k, k), (c, c, 1, 1)] * arch.depth
    *bodies, head = LAYOUTS["timm"].modules(arch.depth)
    shapes: dict[str, tuple[int, ...]] = {}
    for conv, norm, weight in zip(bodies[::2], bodies[1::2], convs, strict=True):
        shapes |= {f"{conv}.weight": weight, f"{conv}.bias": (c,)}
        shapes |= {f"{norm}.{leaf}": (c,) for leaf in NORM_LEAVES}
        shapes[f"{norm}.num_batches_tracked"] = ()
    if arch.num_classes:
        shapes |= {f"{head}.weight": (arch.num_classes, c), f"{head}.bias": (arch.num_classes,)}
    return shapes


def few(names: Iterable[str], shown: int = 3) -> str:
    """The first names and the count of the others, on one line of bounded length."""
    names = [one_line(name)[:160] for name in names]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def one_line(thing: object) -> str:
    """The text of an object on one line, unprintable characters replaced by spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(thing)).split())
