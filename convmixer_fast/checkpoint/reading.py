"""How do the weights of anybody's ConvMixer file become ours, and ours theirs?

Four ways of naming the same tensors are in use. ``i`` counts the blocks from 0, ``d`` is the depth:

=================  =================  =====================  =======================  =============
part               timm               locuslab (Sequential)  mmpretrain               tweet
=================  =================  =====================  =======================  =============
stem conv, norm    stem.0, 2          0, 2                   backbone.stem.0, 2       0.0, 0.2
depthwise, norm    blocks.i.0.fn.0,2  3+i.0.fn.0, 2          backbone.stages.i.0.fn…  1+i.0.0.0, 2
pointwise, norm    blocks.i.1, 3      3+i.1, 3               backbone.stages.i.1, 3   1+i.1.0, 2
classifier         head               d+5                    head.fc                  d+3
=================  =================  =====================  =======================  =============

Files of one name exist under different names of keys (two releases of the original repository do
that), so only the keys are asked, never the file's name. Dim, depth, kernel, patch, channels and
classes follow from the shapes. The activation does not: it comes from the published variant, from
the metadata that `save_checkpoint` writes into safetensors files, or from the user.

Nothing in a file is ever executed: pickles go through PyTorch's weights-only loader.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..arch import (
    ACTIVATIONS,
    VARIANTS,
    Arch,
    activation_layer,
    activation_name,
    known_activation,
)
from ..files import replacement
from .storage import SAFE_GLOBALS

#: The key formats, ours (timm's) first.
FORMATS = ("timm", "locuslab", "mmpretrain", "tweet")

#: Where a checkpoint may come from: a file, or the object that such a file holds.
Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, loaded or written; the message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a ConvMixer under timm's key names, and what their shapes say.

    Attributes:
        state_dict: every tensor of the network, in the network's order, as it was stored.
        arch: read from the shapes; ``num_classes`` is 0 without a classifier and ``act`` is None
            where nothing tells the activation.
        format: the key format it was read from, one of `FORMATS`.
        source: where it came from, for messages.
        pretrained_cfg: how images are prepared and what the classes are called, under timm's names
            (`RECIPE`); what the file does not say is absent.
        normalize: of a model that takes uint8 images, see `ConvMixer`.
    """

    state_dict: dict[str, Tensor]
    arch: Arch
    format: str
    source: str
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None


class LoadResult(NamedTuple):
    """What `load_checkpoint` left alone, and the key format of the checkpoint.

    ``missing_keys`` are the model's own names, the other two are named as in the checkpoint
    (timm's names where they have one). ``skipped`` is the classifier, when the model has none or
    one of another shape.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    skipped: list[str]
    format: str


@dataclass(frozen=True)
class _Layout:
    """Names of the modules in one format; ``{}`` is the number of a block or of the head."""

    stem: tuple[str, str]
    block: str
    mixing: tuple[str, str, str, str]
    head: str
    first_block: int = 0

    def modules(self, depth: int) -> list[str]:
        """Every module that holds tensors, in the network's order; the classifier is the last."""
        numbers = range(self.first_block, self.first_block + depth)
        blocks = [f"{self.block.format(n)}.{part}" for n in numbers for part in self.mixing]
        # After the blocks come the pool and the flattening, then the classifier.
        return [*self.stem, *blocks, self.head.format(self.first_block + depth + 2)]

    def pattern(self, template: str, parts: Iterable[str] = ()) -> str:
        # Six digits are enough for any network and keep a hostile number from becoming a long loop.
        number = re.escape(template).replace(r"\{\}", "([0-9]{1,6})")
        choice = "|".join(map(re.escape, parts))
        return number + (rf"\.(?:{choice})" if choice else "") + r"\.[a-z_]+"


_LAYOUTS: Mapping[str, _Layout] = MappingProxyType(
    {
        "timm": _Layout(("stem.0", "stem.2"), "blocks.{}", ("0.fn.0", "0.fn.2", "1", "3"), "head"),
        "locuslab": _Layout(("0", "2"), "{}", ("0.fn.0", "0.fn.2", "1", "3"), "{}", first_block=3),
        "mmpretrain": _Layout(
            ("backbone.stem.0", "backbone.stem.2"),
            "backbone.stages.{}",
            ("0.fn.0", "0.fn.2", "1", "3"),
            "head.fc",
        ),
        "tweet": _Layout(
            ("0.0", "0.2"), "{}", ("0.0.0", "0.0.2", "1.0", "1.2"), "{}", first_block=1
        ),
    }
)
_BLOCK_KEY = {f: re.compile(one.pattern(one.block, one.mixing)) for f, one in _LAYOUTS.items()}
_ANY_KEY = {
    f: re.compile(
        "|".join(
            [*map(one.pattern, one.stem), one.pattern(one.block, one.mixing), one.pattern(one.head)]
        )
    )
    for f, one in _LAYOUTS.items()
}
#: First parts of the keys in each format; mmpretrain's backbone alone leaves out ``backbone``.
_OWN_PART = {
    "timm": re.compile("stem|blocks|head"),
    "locuslab": re.compile("[0-9]+"),
    "mmpretrain": re.compile("backbone|stem|stages|head"),
    "tweet": re.compile("[0-9]+"),
}
#: Parts of the longest key, ``backbone.stages.0.0.fn.0.weight``.
_MOST_PARTS = 7

_CONV = ("weight", "bias")
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

#: What a name says that stands above averaged weights: ``state_dict_ema``, ``params_ema``, ``swa``.
_AVERAGED = re.compile(r"(?:^|[^a-zA-Z])(?:ema|swa|averaged?)(?:[^a-zA-Z]|$)", re.IGNORECASE)
_PADDLE_LEAVES = {"_mean": "running_mean", "_variance": "running_var"}

_META_FORMAT = "convmixer_fast.format"
_META_ACT = "convmixer_fast.act"
_META_CFG = "convmixer_fast.pretrained_cfg"
_META_NORMALIZE = "convmixer_fast.normalize"

#: What a file keeps of timm's ``pretrained_cfg``, and ``native_size``: images keep their size.
RECIPE = (
    "input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "native_size",
    "label_names", "label_descriptions",
)  # fmt: skip
_LABELS = ("label_names", "label_descriptions")


def detect_format(keys: Iterable[str]) -> str:
    """The format, one of `FORMATS`, of the ConvMixer among the keys, under whatever prefix.

    Raises:
        CheckpointError: no key is a ConvMixer's in any format, or the keys of several are there.
    """
    return _identify([_Leaf((), key, None) for key in keys], "the state dict").format


def read_checkpoint(source: Source, *, use_ema: bool = True) -> Checkpoint:
    """Read a whole ConvMixer from a file or from a state dict, whatever its names and wrappers.

    Files are judged by their content: safetensors, PyTorch's zip files and its old pickles. The
    weights are found by structure: the mapping, at any depth and under any names, whose keys
    behind one common prefix are a ConvMixer's. Of several ConvMixers the averaged weights are
    taken, those below a name with the word "ema", "swa" or "averaged" in it, as in
    ``state_dict_ema`` and ``ema_model.``; where that leaves more than one, it is an error that
    names them. Tensors keep their dtype and, where possible, their memory; they are on the CPU when
    they come from a file. Where no ``num_batches_tracked`` is stored at all, zeros are filled in,
    as PyTorch does. PaddleViT's names and its transposed classifier are understood in mappings, of
    numpy arrays too.

    Args:
        source: a path, or what such a file holds: names to tensors, in any wrapper.
        use_ema: take the averaged weights where there are any.

    Warns:
        UserWarning: other parameters stand beside the ConvMixer's, or weights hold NaN or infinity.

    Raises:
        CheckpointError: not a checkpoint, damaged, unsafe, not a ConvMixer or several, keys missing
            or left over, shapes that contradict each other.
    """
    parsed = _parse(source, use_ema)
    arch = _check_whole(parsed)
    _warn_of_company(parsed)
    _warn_if_not_finite(parsed)
    cfg, normalize = parsed.cfg, parsed.normalize
    return Checkpoint(parsed.tensors, arch, parsed.format, parsed.source, cfg, normalize)


def convert_state_dict(
    state_dict: Mapping[str, Any], to: str, depth: int | None = None
) -> dict[str, Any]:
    """Rename the keys of a state dict in timm's names; the values are the same objects.

    Without a classifier the mmpretrain names are those of the backbone alone.

    Args:
        state_dict: tensors, or anything else, under timm's names.
        to: one of `FORMATS`.
        depth: blocks of the network; counted from the keys when not given. Needed where the keys
            are a part of the network only, for the classifier's name depends on it.

    Raises:
        CheckpointError: an unknown format, or keys that are not timm's at that depth.
    """
    if to not in FORMATS:
        raise CheckpointError(f"unknown format {to!r}: use one of {', '.join(FORMATS)}")
    if depth is None:
        numbers = {int(m[1]) for key in state_dict if (m := _BLOCK_KEY["timm"].fullmatch(key))}
        depth = max(numbers, default=-1) + 1
        _refuse_gap(numbers, 0, "the state dict")
    names = {ours: theirs for theirs, ours in _key_table(to, depth).items()}
    strange = [key for key in state_dict if key not in names]
    if strange:
        raise CheckpointError(
            f"the state dict holds {_few(strange)}, no key of a ConvMixer of depth {depth} under "
            "timm's names: pass it through read_checkpoint first"
        )
    if to == "mmpretrain" and not any(key.startswith("head.") for key in state_dict):
        names = {ours: theirs.removeprefix("backbone.") for ours, theirs in names.items()}
    return {names[key]: value for key, value in state_dict.items()}


def load_checkpoint(
    model: nn.Module, source: Source | Checkpoint, *, strict: bool = True, use_ema: bool = True
) -> LoadResult:
    """Load a checkpoint of any format into a ConvMixer whose keys are in any format.

    The model may be ours, timm's, mmpretrain's backbone or classifier, a Sequential of locuslab's,
    optimised or not, wrapped in DDP, DataParallel or torch.compile. Every key and shape is checked
    before the first tensor is written: on an error the model is as it was. A model without a
    classifier takes a checkpoint that has one. Values are copied bit for bit where the dtypes agree
    and cast as ``load_state_dict`` does where they do not. What the file says about preprocessing
    and labels goes into the model's ``pretrained_cfg``, where it has one.

    Args:
        model: the model to fill, on any device but "meta".
        source: see `read_checkpoint`, or what it returned.
        strict: when False, missing and surplus keys and a classifier of another shape are left out
            and reported; other shapes that differ are an error still.
        use_ema: take the averaged weights where there are any.

    Warns:
        UserWarning: the model's activation is not the one the weights were trained with, the
            weights hold NaN or infinity, or (if strict) other parameters stand beside them.

    Raises:
        CheckpointError: see `read_checkpoint`; or the checkpoint does not fit the model.
    """
    parsed = _parsed_again(source) if isinstance(source, Checkpoint) else _parse(source, use_ema)
    if strict:
        parsed = replace(parsed, act=_check_whole(parsed).act)
    elif parsed.act is None and not parsed.act_is_settled:
        with contextlib.suppress(CheckpointError):
            parsed = replace(parsed, act=known_activation(_read_arch(parsed.tensors, parsed.depth)))

    names = _identify(_leaves(model.state_dict()), "the model")
    model_names = {ours: leaf.key for ours, leaf in names.known.items()}
    model_tensors = {ours: leaf.value for ours, leaf in names.known.items()}
    heads = [key for key in parsed.tensors if key.startswith("head.")]
    model_heads = [key for key in model_tensors if key.startswith("head.")]

    misfits = [
        key
        for key, tensor in parsed.tensors.items()
        if key in model_tensors and tensor.shape != model_tensors[key].shape
    ]
    skipped: list[str] = []
    if not model_heads or (not strict and any(key in misfits for key in heads)):
        skipped = heads
    misfits = [key for key in misfits if key not in skipped]
    missing = [own for ours, own in model_names.items() if ours not in parsed.tensors]
    missing += names.surplus + names.company
    unexpected = [k for k in parsed.tensors if k not in model_tensors and k not in skipped]
    unexpected += parsed.surplus
    if misfits or (strict and (missing or unexpected)):
        raise CheckpointError(
            _does_not_fit(parsed, model_tensors, names.depth, misfits, missing, unexpected)
        )
    unexpected += parsed.company

    wanted = [key for key in parsed.tensors if key in model_tensors and key not in skipped]
    for key in wanted:
        if model_tensors[key].is_meta:
            raise CheckpointError(
                f"the model has no memory for {model_names[key]} (device 'meta'): call "
                "model.to_empty(device=...) before loading"
            )
    _refuse_meta(parsed.source, {key: parsed.tensors[key] for key in wanted})
    if not isinstance(source, Checkpoint):  # `read_checkpoint` has told it
        _warn_if_not_finite(parsed)
        if strict:
            _warn_of_company(parsed)
    found = _activations(model)
    if parsed.act is not None and found and parsed.act not in found:
        warnings.warn(
            f"the weights of {parsed.source} were trained with {parsed.act}, but the model's "
            f"activation is {' and '.join(sorted(found))}: results will be wrong; build the model "
            f"with {parsed.act} (act_layer=nn.{ACTIVATIONS[parsed.act].__name__})",
            UserWarning,
            stacklevel=2,
        )
    model.load_state_dict({model_names[k]: parsed.tensors[k] for k in wanted}, strict=False)
    _hand_over(parsed.cfg, model, labels=not skipped)
    return LoadResult(missing, unexpected, skipped, parsed.format)


def save_checkpoint(
    model: nn.Module | Checkpoint | Mapping[str, Any],
    path: str | os.PathLike[str],
    format: str = "timm",
    *,
    preprocessing: Any = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write the weights of a ConvMixer to a file, in any of the formats.

    A name that ends in ``.safetensors`` makes a safetensors file. Its metadata carries the format,
    the activation, and where they are known the preprocessing, the labels and the normalisation of
    uint8 images: `Predictor` and the command line then prepare images as the model was trained. Any
    other name makes a PyTorch file: the bare state dict, as timm and
    locuslab publish them, or ``{"state_dict": ...}`` for mmpretrain. The file appears whole or not
    at all, and a file that was there before is replaced only then.

    Args:
        model: a model that `load_checkpoint` takes, a `Predictor`, what `read_checkpoint` returned,
            or a state dict in any format.
        path: the file to write; its folder must exist.
        format: one of `FORMATS`.
        preprocessing: a `Preprocessing`, a `NativeSize`, or a mapping under timm's names
            (``input_size``, ``crop_pct``, ``interpolation``, ``mean``, ``std``); default: the
            Predictor's, else the model's ``pretrained_cfg``.
        labels: a name for each class; default: likewise.

    Warns:
        UserWarning: the model's own preprocessing is not the published one, and the file is no
            safetensors file, the only kind that can keep it.

    Raises:
        CheckpointError: an unknown format, not a whole ConvMixer, the file cannot be written, or
            ``preprocessing`` or ``labels`` cannot be kept.
    """
    if format not in FORMATS:
        raise CheckpointError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
    asked = preprocessing is not None or labels is not None
    if not isinstance(model, nn.Module | Mapping | Checkpoint) and hasattr(model, "preprocessing"):
        # A Predictor, which is of a module above this one.
        preprocessing = model.preprocessing if preprocessing is None else preprocessing
        labels = model.labels if labels is None else labels
        model = model.model
    recipe, normalize = _recipe_of(model, preprocessing, labels)
    if isinstance(model, Checkpoint):
        checkpoint, act = model, model.arch.act
    elif isinstance(model, nn.Module):
        checkpoint = read_checkpoint(model.state_dict())
        act = " and ".join(sorted(_activations(model)))
    else:
        checkpoint = read_checkpoint(model)
        act = checkpoint.arch.act
    _refuse_meta(checkpoint.source, checkpoint.state_dict)
    names = recipe.get("label_names")
    if names is not None and len(names) != checkpoint.arch.num_classes:
        if labels is not None:
            classes = checkpoint.arch.num_classes
            raise CheckpointError(f"{len(names)} labels for a model of {classes} classes")
        recipe = {key: value for key, value in recipe.items() if key not in _LABELS}
    if not _has_metadata(path):
        _refuse_to_lose(recipe, checkpoint.arch, path, asked)
    # Copies, since tensors that share memory or are slices of larger ones would be refused by
    # safetensors and stored with all their surroundings by PyTorch.
    tensors = {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in convert_state_dict(checkpoint.state_dict, format).items()
    }
    try:
        with replacement(Path(path)) as unfinished:
            if _has_metadata(path):
                # An activation without a name is written as "unknown": left out, a reader would
                # take the published variant's for it.
                metadata = {"format": "pt", _META_FORMAT: format, _META_ACT: act or "unknown"}
                if recipe:
                    metadata[_META_CFG] = json.dumps(recipe)
                if normalize:
                    metadata[_META_NORMALIZE] = json.dumps(normalize)
                save_file(tensors, unfinished, metadata)
            else:
                held = {"state_dict": tensors} if format == "mmpretrain" else tensors
                torch.save(held, unfinished)
    except (OSError, RuntimeError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else _one_line(e)
        raise CheckpointError(
            f"cannot write {path}: {reason}; nothing was written, choose a folder that exists, "
            "is writable and has room"
        ) from None


def build_model_kwargs(
    checkpoint: Checkpoint, act: str | Callable[[], nn.Module] | None = None
) -> dict[str, Any]:
    """The arguments of `ConvMixer` that make the model of a checkpoint.

    Args:
        checkpoint: what `read_checkpoint` returned.
        act: the activation, by name or as a module class, where the checkpoint cannot tell it.

    Warns:
        UserWarning: ``act`` is not the activation the weights were trained with.

    Raises:
        CheckpointError: the activation is not known and not given, or is no known name.
    """
    arch = checkpoint.arch
    if act is None and arch.act is None:
        raise CheckpointError(
            f"the activation of {checkpoint.source} cannot be read from its weights: pass "
            f"act='gelu' (the paper's default) or another of {', '.join(ACTIVATIONS)}"
        )
    try:
        act_layer = activation_layer(act if act is not None else arch.act or "")
    except ValueError as e:
        raise CheckpointError(str(e)) from None
    if act is not None and arch.act is not None and activation_name(act_layer()) != arch.act:
        given = act if isinstance(act, str) else getattr(act, "__name__", repr(act))
        warnings.warn(
            f"the weights of {checkpoint.source} were trained with {arch.act}, but act is {given}: "
            f"results will be wrong; leave act out or pass act={arch.act!r}",
            UserWarning,
            stacklevel=2,
        )
    kwargs: dict[str, Any] = {
        "dim": arch.dim,
        "depth": arch.depth,
        "kernel_size": arch.kernel_size,
        "patch_size": arch.patch_size,
        "in_chans": arch.in_chans,
        "num_classes": arch.num_classes,
        "act_layer": act_layer,
    }
    if arch.num_classes and checkpoint.state_dict["head.weight"].shape[1] == 2 * arch.dim:
        kwargs["global_pool"] = "catavgmax"
    if checkpoint.normalize is not None:
        kwargs["normalize"] = checkpoint.normalize
    return kwargs


@dataclass(frozen=True)
class _Parsed:
    """A checkpoint sorted by timm's names, not yet checked for being whole."""

    source: str
    format: str
    depth: int
    tensors: dict[str, Tensor]
    surplus: list[str]
    company: list[str]
    act: str | None
    #: The file itself speaks about its activation; None then means one that has no name.
    act_is_settled: bool
    cfg: dict[str, Any]
    normalize: Any


class _Leaf(NamedTuple):
    """A value of a state dict: the names of the mappings above it, its key, and the value."""

    path: tuple[str, ...]
    key: str
    value: Any


@dataclass(frozen=True)
class _Names:
    """The values of a state dict by what they are.

    Attributes:
        format, depth: of the network.
        known: under timm's names.
        surplus: keys where a ConvMixer has its own, but not this one (``blocks.0.4.weight``).
        company: keys of parameters that stand beside the network (``criterion.weight``).
    """

    format: str
    depth: int
    known: dict[str, _Leaf]
    surplus: list[str]
    company: list[str]


@dataclass(frozen=True)
class _Candidate:
    """Keys that look like a ConvMixer's: (format's key, index of the leaf) under one prefix."""

    prefix: tuple[str, ...]
    format: str
    keys: list[tuple[str, int]]

    @property
    def numbers(self) -> set[int]:
        """The blocks."""
        found = (_BLOCK_KEY[self.format].fullmatch(key) for key, _ in self.keys)
        return {int(match[1]) for match in found if match}

    @property
    def is_whole(self) -> bool:
        """Whether at most the classifier and BatchNorm's counters are missing."""
        table = _key_table(self.format, len(self.numbers))
        needed = {
            key
            for key, ours in table.items()
            if not ours.startswith("head.") and not ours.endswith(".num_batches_tracked")
        }
        return needed <= {key for key, _ in self.keys}

    @property
    def is_averaged(self) -> bool:
        return any(_AVERAGED.search(name) for name in self.prefix)

    def __str__(self) -> str:
        return repr(".".join(self.prefix)) if self.prefix else "the top"


def _parse(source: Source, use_ema: bool) -> _Parsed:
    held, metadata, label = _open(source)
    leaves = _leaves(held)
    if not any(_is_tensor(leaf.value) for leaf in leaves):
        raise CheckpointError(_no_state_dict(label, held))
    names = _identify(leaves, label, use_ema)
    tensors = {}
    for name, (_, key, value) in names.known.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.array(value))
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            kind = value.layout if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{label}: {_few([key])} is a {kind}, not a dense tensor")
        if not (value.is_floating_point() or name.endswith(".num_batches_tracked")):
            raise CheckpointError(
                f"{label}: {_few([key])} is {value.dtype}, not floating-point: convert it from the "
                "checkpoint it was quantised from"
            )
        tensors[name] = value.detach()
    if any(leaf.key.split(".")[-1] in _PADDLE_LEAVES for leaf in names.known.values()):
        head = tensors.get("head.weight")
        if head is not None and head.ndim == 2:
            tensors["head.weight"] = head.t().contiguous()
    if not any(name.endswith(".num_batches_tracked") for name in tensors):
        for name in [name for name in tensors if name.endswith(".running_mean")]:
            counter = torch.zeros((), dtype=torch.int64, device=tensors[name].device)
            tensors[name.replace("running_mean", "num_batches_tracked")] = counter
    order = _key_table("timm", names.depth)
    return _Parsed(
        source=label,
        format=names.format,
        depth=names.depth,
        tensors={name: tensors[name] for name in order if name in tensors},
        surplus=names.surplus,
        company=names.company,
        act=activation_name(metadata.get(_META_ACT)),
        act_is_settled=_META_ACT in metadata,
        cfg=_read_recipe(source, metadata, tensors, label),
        normalize=_read_normalize(metadata, label),
    )


def _parsed_again(checkpoint: Checkpoint) -> _Parsed:
    return _Parsed(
        source=checkpoint.source,
        format=checkpoint.format,
        depth=checkpoint.arch.depth,
        tensors=checkpoint.state_dict,
        surplus=[],
        company=[],
        act=checkpoint.arch.act,
        act_is_settled=True,
        cfg=checkpoint.pretrained_cfg,
        normalize=checkpoint.normalize,
    )


def _recipe_of(
    model: Any, preprocessing: Any, labels: Sequence[str] | None
) -> tuple[dict[str, Any], Any]:
    """What a model, or what is given beside it, says about its images and classes."""
    known: Mapping[str, Any] = {}
    normalize = None
    if isinstance(model, Checkpoint):
        known, normalize = model.pretrained_cfg, model.normalize
    elif isinstance(model, nn.Module):
        modules = list(model.modules())
        known = next(filter(None, (getattr(m, "pretrained_cfg", None) for m in modules)), {})
        normalize = next(filter(None, (getattr(m, "normalize", None) for m in modules)), None)
        if not isinstance(normalize, tuple) or len(normalize) != 2:
            normalize = None
    recipe = {key: known[key] for key in RECIPE if known.get(key) is not None}
    if normalize is not None:
        recipe.setdefault("mean", normalize[0])
        recipe.setdefault("std", normalize[1])
    if preprocessing is not None:
        recipe = {key: recipe[key] for key in _LABELS if key in recipe}
        if not isinstance(preprocessing, Mapping):
            if not hasattr(preprocessing, "mean") or not hasattr(preprocessing, "std"):
                raise CheckpointError(
                    f"a {type(preprocessing).__name__} cannot be kept in a file: pass a "
                    "Preprocessing, or a mapping with input_size, crop_pct, mean and std"
                )
            native = {} if hasattr(preprocessing, "input_size") else {"native_size": True}
            preprocessing = {k: getattr(preprocessing, k, None) for k in RECIPE} | native
        recipe |= {k: preprocessing[k] for k in RECIPE if preprocessing.get(k) is not None}
    if labels is not None and list(labels) != [str(i) for i in range(len(labels))]:
        recipe = {key: value for key, value in recipe.items() if key not in _LABELS}
        recipe["label_names"] = list(map(str, labels))
    return recipe, normalize


def _refuse_to_lose(
    recipe: Mapping[str, Any], arch: Arch, path: str | os.PathLike[str], asked: bool
) -> None:
    """PyTorch's files hold the bare state dict, as others expect it."""
    lost = f"{path} has no place for preprocessing and labels: name a .safetensors file"
    if asked:
        raise CheckpointError(lost)
    usual = next((v.pretrained_cfg for v in VARIANTS.values() if v.arch.shape == arch.shape), {})
    if any(_plain(usual.get(key)) != _plain(value) for key, value in recipe.items()):
        warnings.warn(f"{lost}, or pass them where the file is used", UserWarning, stacklevel=3)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_recipe(
    source: Any, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], label: str
) -> dict[str, Any]:
    """The recipe in a file's metadata, else that of timm's or Hugging Face's config.json beside."""
    if _META_CFG in metadata:
        held = _json(metadata[_META_CFG], f"{label}: its metadata")
        return _recipe_in(held, f"{label}: its metadata")
    if isinstance(source, Mapping):
        return {}
    beside = Path(source).with_name("config.json")
    try:
        text = beside.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    held = _json(text, str(beside))
    cfg = held.get("pretrained_cfg") or held
    if not isinstance(cfg, Mapping):
        return {}
    labels = {key: cfg.get(key) or held.get(key) for key in _LABELS}
    by_index = held.get("id2label")
    if not labels["label_names"] and isinstance(by_index, Mapping):
        with contextlib.suppress(ValueError):
            labels["label_names"] = [by_index[i] for i in sorted(by_index, key=int)]
    recipe = _recipe_in({**cfg, **labels}, str(beside))
    # A config.json of another model is no news about this one.
    architecture = str(held.get("architecture") or cfg.get("architecture") or "convmixer")
    stem, head = tensors.get("stem.0.weight"), tensors.get("head.weight")
    classes = cfg.get("num_classes") or held.get("num_classes")
    other = "convmixer" not in architecture.lower()
    other |= stem is not None and recipe.get("input_size", (stem.shape[1],))[0] != stem.shape[1]
    other |= head is not None and classes not in (None, head.shape[0])
    names = recipe.get("label_names")
    if names and (head is None or len(names) != head.shape[0]):
        recipe = {key: value for key, value in recipe.items() if key not in _LABELS}
    return {} if other else recipe


def _recipe_in(held: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The keys of `RECIPE`, as timm has them.

    Raises:
        CheckpointError: a value is of a wrong kind.
    """
    kinds: dict[str, Any] = {
        "crop_pct": int | float,
        "crop_mode": str,
        "interpolation": str,
        "native_size": bool,
        "label_descriptions": dict,
    }
    recipe = {}
    for key in RECIPE:
        value = held.get(key)
        if value is None:
            continue
        if key in kinds:
            good = isinstance(value, kinds[key])
        else:
            number = str if key == "label_names" else int | float
            good = isinstance(value, list | tuple) and all(isinstance(v, number) for v in value)
            good = good and (key != "input_size" or len(value) == 3)
        if not good:
            raise CheckpointError(
                f"{label}: {key} is {_one_line(value)[:80]}, which makes no sense"
            )
        recipe[key] = tuple(value) if key in ("input_size", "mean", "std") else value
    return recipe


def _read_normalize(metadata: Mapping[str, str], label: str) -> Any:
    if _META_NORMALIZE not in metadata:
        return None
    try:
        mean, std = json.loads(metadata[_META_NORMALIZE])
        return tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError):
        raise CheckpointError(f"{label}: the normalisation in its metadata is damaged") from None


def _json(text: str, label: str) -> dict[str, Any]:
    try:
        held = json.loads(text)
    except ValueError as e:
        raise CheckpointError(f"{label} is no valid JSON ({_one_line(e)})") from None
    return held if isinstance(held, dict) else {}


def _hand_over(cfg: Mapping[str, Any], model: nn.Module, labels: bool) -> None:
    """Put a file's recipe into the ``pretrained_cfg`` of a model that has one."""
    found = {key: value for key, value in cfg.items() if labels or key not in _LABELS}
    if not found:
        return
    for module in model.modules():
        held = getattr(module, "pretrained_cfg", None)
        if isinstance(held, dict):
            kept = {key: value for key, value in held.items() if key not in RECIPE}
            module.pretrained_cfg = {**kept, **found}  # type: ignore[assignment]
            return


def _open(source: Source) -> tuple[Any, Mapping[str, str], str]:
    """What a source holds, the metadata of its file, and its name for messages."""
    if isinstance(source, Mapping):
        return source, {}, "the state dict"
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise CheckpointError(f"cannot read a checkpoint from a {kind}: pass a path or a mapping")
    label = " ".join(os.fspath(source).split())
    try:
        with open(source, "rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{label}: no such file, check the path") from None
    except IsADirectoryError:
        raise CheckpointError(f"{label} is a folder: name the checkpoint file in it") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{label} cannot be opened: {_one_line(e)}") from None
    if not head:
        raise CheckpointError(f"{label} is empty: download or copy it again")
    # safetensors: the length of a JSON header in eight bytes, then the header.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return *_open_safetensors(os.fspath(source), label), label
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _open_pickle(os.fspath(source), label), {}, label
    if head.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer instead of the weights: run 'git lfs pull'"
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        what = "a web page instead of the weights: download the file itself"
    else:
        what = (
            f"not a checkpoint (it begins with {head[:12]!r}): a safetensors file or one written "
            "by torch.save is expected"
        )
    raise CheckpointError(f"{label} is {what}")


def _open_safetensors(path: str, label: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(
            f"{label} is a truncated or damaged safetensors file ({_one_line(e)[:200]}): "
            "download or copy it again"
        ) from None


def _open_pickle(path: str, label: str) -> Any:
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            # Warnings about foreign files would come on top of the one line of the error.
            warnings.simplefilter("ignore")
            # An open file: by its path, torch.load would judge it by its extension.
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(e))
        what = f"wants {wanted[1][:160]}" if wanted else "is damaged or holds pickled objects"
        raise CheckpointError(
            f"{label} {what}: PyTorch's weights-only loading takes plain weights alone, and more "
            "could run code, so it is refused; if you trust where it comes from, load it in the "
            "environment that made it and save its state_dict() with save_checkpoint or safetensors"
        ) from None
    # A damaged file can make the unpickler fail in any way at all.
    except Exception as e:
        if "TorchScript" in str(e):
            raise CheckpointError(
                f"{label} is a TorchScript program, not weights: load it with torch.jit.load and "
                "save its state_dict()"
            ) from None
        reason = _one_line(e).split(". ")[0][:200] or type(e).__name__
        raise CheckpointError(
            f"{label} is truncated, damaged or not a PyTorch checkpoint ({reason}): download or "
            "copy it again"
        ) from None


def _leaves(held: Any) -> list[_Leaf]:
    """Every value in nested mappings, and in sequences of them; each mapping is visited once.

    Mappings of averaged weights come last: what a file holds under two names is plain.
    """
    found: list[_Leaf] = []
    seen: set[int] = set()
    waiting: deque[tuple[tuple[str, ...], Any]] = deque()
    if isinstance(held, Mapping | list | tuple):
        waiting.append(((), held))
    averaged: deque[tuple[tuple[str, ...], Any]] = deque()
    while waiting or averaged:
        path, group = (waiting or averaged).popleft()
        if id(group) in seen:
            continue
        seen.add(id(group))
        for key, value in group.items() if isinstance(group, Mapping) else enumerate(group):
            if isinstance(value, Mapping | list | tuple):
                later = averaged if _AVERAGED.search(str(key)) else waiting
                later.append(((*path, str(key)), value))
            elif isinstance(group, Mapping):
                found.append(_Leaf(path, key, value))  # type: ignore[arg-type]
    return found


def _candidates(leaves: list[_Leaf]) -> list[_Candidate]:
    """The ConvMixers among the leaves, the one with the most keys first; none shares a leaf."""
    groups: dict[tuple[tuple[str, ...], str], list[tuple[str, int]]] = {}
    for i, leaf in enumerate(leaves):
        parts = _parts(leaf)
        if not parts or parts[-1] not in _NORM:
            continue
        for start in range(max(0, len(parts) - _MOST_PARTS), len(parts) - 1):
            short = ".".join(parts[start:])
            for form in FORMATS:
                key = _in_full(short, form)
                if _ANY_KEY[form].fullmatch(key):
                    groups.setdefault((parts[:start], form), []).append((key, i))
    found = [_Candidate(prefix, form, keys) for (prefix, form), keys in groups.items()]
    found.sort(key=lambda c: (-len(c.keys), len(c.prefix), FORMATS.index(c.format)))
    taken: set[int] = set()
    apart = []
    for candidate in found:
        members = {i for _, i in candidate.keys}
        if not members & taken:
            apart.append(candidate)
            taken |= members
    # Two convolutions and a norm can be a stem. Keys of a block are no chance; without any, the
    # stem of a network of no blocks has to be whole, or the keys bare.
    deep = [c for c in apart if c.numbers]
    return deep or [c for c in apart if c.is_whole] or [c for c in apart if not c.prefix]


def _choose(found: list[_Candidate], leaves: list[_Leaf], label: str, use_ema: bool | None) -> Any:
    """The candidate that is meant; ``use_ema`` None makes no difference between averaged and not.

    Raises:
        CheckpointError: it cannot be told.
    """
    # What is neither whole nor large is a part of some other network that happens to be alike.
    rivals = [c for c in found if c.is_whole or 2 * len(c.keys) >= len(found[0].keys)]
    averaged = [c for c in rivals if c.is_averaged]
    plain = [c for c in rivals if not c.is_averaged]
    if use_ema is False and not plain:
        raise CheckpointError(
            f"{label} holds averaged weights only ({averaged[0]}): pass use_ema=True to take them"
        )
    if use_ema is not None:
        rivals = (averaged or plain) if use_ema else plain
    first, *others = rivals
    for other in others:
        if not _same_values(first, other, leaves):
            raise CheckpointError(
                f"{label} holds {len(rivals)} ConvMixers, under {_few(map(str, rivals))}: pass a "
                "state dict with the keys of one of them"
            )
    return first


def _same_values(one: _Candidate, other: _Candidate, leaves: list[_Leaf]) -> bool:
    """Whether two candidates are one network under two names."""
    mine, theirs = dict(one.keys), dict(other.keys)
    if one.format != other.format or mine.keys() != theirs.keys():
        return False
    pairs = [(leaves[i].value, leaves[theirs[key]].value) for key, i in mine.items()]
    return all(
        a is b
        or (
            (isinstance(a, Tensor) and isinstance(b, Tensor) and not a.is_meta and not b.is_meta)
            and a.dtype == b.dtype
            and a.device == b.device
            and torch.equal(a, b)
        )
        for a, b in pairs
    )


def _identify(leaves: list[_Leaf], label: str, use_ema: bool | None = None) -> _Names:
    """Find the ConvMixer, count its blocks and give every key its name in timm.

    Raises:
        CheckpointError: no ConvMixer's keys, or those of several, a gap in the blocks, or one key
            under two names.
    """
    found = _candidates(leaves)
    if not found:
        raise CheckpointError(_not_a_convmixer(label, leaves))
    chosen = _choose(found, leaves, label, use_ema)
    form, prefix = chosen.format, chosen.prefix
    _refuse_gap(chosen.numbers, _LAYOUTS[form].first_block, label)
    table = _key_table(form, len(chosen.numbers))
    paths = {leaves[i].path for _, i in chosen.keys}
    known: dict[str, _Leaf] = {}
    surplus: list[str] = []
    company: list[str] = []
    for leaf in leaves:
        parts = _parts(leaf)
        if leaf.path not in paths or not parts:
            continue
        inside = parts[: len(prefix)] == prefix
        name = table.get(_in_full(".".join(parts[len(prefix) :]), form)) if inside else None
        if name is None:
            if inside and _is_tensor(leaf.value) and _OWN_PART[form].fullmatch(parts[len(prefix)]):
                surplus.append(leaf.key)
            elif _is_tensor(leaf.value, floating=True):
                company.append(leaf.key)
        elif name in known:
            both = _few([known[name].key, leaf.key])
            raise CheckpointError(f"{label} holds one tensor under two names ({both}): remove one")
        else:
            known[name] = leaf
    return _Names(form, len(chosen.numbers), known, surplus, company)


def _is_tensor(value: Any, floating: bool = False) -> bool:
    """Integers beside a network are counters (``n_averaged``, ``steps``) and no parameters."""
    if isinstance(value, np.ndarray):
        return not floating or value.dtype.kind == "f"
    return isinstance(value, Tensor) and (not floating or value.is_floating_point())


def _parts(leaf: _Leaf) -> tuple[str, ...]:
    """The names on the way to a leaf, without what wrapping modules added within its key.

    Wrappers keep the wrapped module under a private name (torch.compile, FSDP, activation
    checkpointing), as ``module`` (DDP, averaged models) or as ``model``; no format has such a part.
    """
    if not isinstance(leaf.key, str):
        return ()
    *parts, last = leaf.key.split(".")
    last = _PADDLE_LEAVES.get(last, last) if parts else last
    own = [
        part
        for part in parts
        if _AVERAGED.search(part) or not (part.startswith("_") or part in ("module", "model"))
    ]
    return (*leaf.path, *own, last)


def _in_full(short: str, form: str) -> str:
    """mmpretrain's backbone alone names its keys without ``backbone.``; give it back."""
    if form == "mmpretrain" and not short.startswith(("backbone.", "head.")):
        return f"backbone.{short}"
    return short


def _key_table(form: str, depth: int) -> dict[str, str]:
    """Every key of a format -> timm's key, in the network's order."""
    leaves = [_CONV, _NORM] * (1 + 2 * depth) + [_CONV]
    theirs, ours = _LAYOUTS[form].modules(depth), _LAYOUTS["timm"].modules(depth)
    return {
        f"{their}.{leaf}": f"{our}.{leaf}"
        for their, our, tensors in zip(theirs, ours, leaves, strict=True)
        for leaf in tensors
    }


def _refuse_gap(numbers: set[int], first: int, label: str) -> None:
    for i in range(first, first + len(numbers)):
        if i not in numbers:
            raise CheckpointError(
                f"{label}: block {i} is missing, though blocks go up to {max(numbers)}: the "
                "checkpoint is incomplete"
            )


def _read_arch(tensors: Mapping[str, Tensor], depth: int) -> Arch:
    """The architecture as the shapes of the first convolutions and the classifier tell it."""
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


def _shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor under timm's names."""
    c, k, p = arch.dim, arch.kernel_size, arch.patch_size
    convs = [(c, arch.in_chans, p, p)] + [(c, 1, k, k), (c, c, 1, 1)] * arch.depth
    *bodies, head = _LAYOUTS["timm"].modules(arch.depth)
    shapes: dict[str, tuple[int, ...]] = {}
    for conv, norm, weight in zip(bodies[::2], bodies[1::2], convs, strict=True):
        shapes |= {f"{conv}.weight": weight, f"{conv}.bias": (c,)}
        shapes |= {f"{norm}.{leaf}": (c,) for leaf in _NORM} | {f"{norm}.num_batches_tracked": ()}
    if arch.num_classes:
        shapes |= {
            f"{head}.weight": (arch.num_classes, c),
            f"{head}.bias": (arch.num_classes,),
        }
    return shapes


def _check_whole(parsed: _Parsed) -> Arch:
    """The architecture of a checkpoint in which nothing is missing, left over or out of shape."""
    tensors, label = parsed.tensors, parsed.source
    names = _key_table("timm", parsed.depth)
    has_head = any(name.startswith("head.") for name in tensors)
    missing = [n for n in names if n not in tensors and (has_head or not n.startswith("head."))]
    if missing or parsed.surplus:
        shown = {ours: theirs for theirs, ours in _key_table(parsed.format, parsed.depth).items()}
        faults = [f"{_few(shown[n] for n in missing)} missing"] if missing else []
        left = [*parsed.company, *parsed.surplus]
        faults += [f"{_few(left)} left over"] if parsed.surplus else []
        raise CheckpointError(
            f"{label} is not a whole ConvMixer of depth {parsed.depth} in the {parsed.format} "
            f"format: {' and '.join(faults)}; load_checkpoint(..., strict=False) takes what fits"
        )
    try:
        arch = _read_arch(tensors, parsed.depth)
    except CheckpointError as e:
        raise CheckpointError(f"{label}: {e}") from None
    shapes = _shapes(arch)
    wide = (arch.num_classes, 2 * arch.dim)
    if has_head and tuple(tensors["head.weight"].shape) == wide:
        # global_pool="catavgmax" hands the classifier the mean and the maximum of each channel.
        shapes["head.weight"] = wide
    wrong = [
        f"{n} is {tuple(tensors[n].shape)} and should be {shape}"
        for n, shape in shapes.items()
        if tuple(tensors[n].shape) != shape
    ]
    if wrong:
        raise CheckpointError(f"{label} is not a ConvMixer, by its shapes: {_few(wrong)}")
    act = parsed.act if parsed.act_is_settled else known_activation(arch)
    return replace(arch, act=act)


def _does_not_fit(
    parsed: _Parsed,
    model_tensors: Mapping[str, Tensor],
    model_depth: int,
    misfits: list[str],
    missing: list[str],
    unexpected: list[str],
) -> str:
    """The line that says what a checkpoint and a model disagree on, in the field's own terms."""
    with contextlib.suppress(CheckpointError):
        file = _read_arch(parsed.tensors, parsed.depth)
        ours = _read_arch(model_tensors, model_depth)
        differ = [
            f.name
            for f in fields(Arch)
            if f.name != "act" and getattr(file, f.name) != getattr(ours, f.name)
        ]
        if ours.num_classes == 0 or file.num_classes == 0:
            differ = [name for name in differ if name != "num_classes"]
        if differ:
            table = ", ".join(
                f"{n} is {getattr(file, n)} in the checkpoint and {getattr(ours, n)} in the model"
                for n in differ
            )
            mend = ", ".join(f"{n}={getattr(file, n)}" for n in differ)
            mend = f"build the model with {mend}"
            if differ == ["num_classes"]:
                mend += ", or keep its own classifier with load_checkpoint(..., strict=False)"
            return f"{parsed.source} does not fit the model: {table}; {mend}"
    faults = [
        f"{n} is {tuple(parsed.tensors[n].shape)} in the checkpoint and "
        f"{tuple(model_tensors[n].shape)} in the model"
        for n in misfits
    ]
    parts = [_few(faults)] if faults else []
    parts += [f"the checkpoint lacks {_few(missing)}"] if missing else []
    parts += [f"the model has no {_few(unexpected)}"] if unexpected else []
    mend = "build the model that the checkpoint was made for"
    if not misfits:
        mend = "load_checkpoint(..., strict=False) takes what fits"
    return f"{parsed.source} does not fit the model: {' and '.join(parts)}; {mend}"


def _activations(model: nn.Module) -> set[str]:
    """Names of a model's activations: as in `ACTIVATIONS`, else how the module prints itself."""
    for m in model.modules():
        arch = getattr(m, "arch", None)
        if isinstance(arch, Arch) and arch.act is not None:
            return {arch.act}
    found = set()
    for m in model.modules():
        # Identity stands for so many things (a dropped path, no classifier) that it tells nothing.
        if isinstance(m, nn.Identity) or next(m.children(), None) is not None:
            continue
        name = activation_name(m)
        if name is None and type(m).__module__.rpartition(".")[2].startswith("activation"):
            # timm has activation classes of its own under the names of PyTorch's.
            plain = type(m).__name__.lower()
            is_torch = type(m).__module__.startswith("torch.")
            name = plain if plain in ACTIVATIONS and not is_torch else repr(m)
        if name is not None:
            found.add(name)
    return found


def _refuse_meta(label: str, tensors: Mapping[str, Tensor]) -> None:
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"{label} holds no values for {_few(empty)} (device 'meta'): make it on a real device"
        )


def _warn_of_company(parsed: _Parsed) -> None:
    if parsed.company:
        warnings.warn(
            f"{parsed.source} holds parameters beside the ConvMixer's, which are left out: "
            f"{_few(parsed.company)}; if the network needs them, results will be wrong",
            UserWarning,
            stacklevel=3,
        )


def _warn_if_not_finite(parsed: _Parsed) -> None:
    bad = [
        key
        for key, tensor in parsed.tensors.items()
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all()
    ]
    if bad:
        warnings.warn(
            f"{parsed.source} holds NaN or infinity in {_few(bad)}: its training diverged or the "
            "file is damaged, and every result will be NaN; take an earlier checkpoint",
            UserWarning,
            stacklevel=3,
        )


def _has_metadata(path: str | os.PathLike[str]) -> bool:
    """Whether the name is that of a safetensors file, or of a link to one."""
    return Path(os.path.realpath(path)).suffix.lower() == ".safetensors"


def _no_state_dict(label: str, held: Any) -> str:
    kind = f"has {_few(map(str, held))}" if isinstance(held, Mapping) and held else "is empty"
    if not isinstance(held, Mapping):
        kind = f"is a {type(held).__name__}"
    return (
        f"{label} holds no state dict (it {kind}): tensors are looked for at any depth, at the top "
        "as below names such as state_dict and model_ema"
    )


def _not_a_convmixer(label: str, leaves: list[_Leaf]) -> str:
    keys = [leaf.key for leaf in leaves if _is_tensor(leaf.value)] or [leaf.key for leaf in leaves]
    strange = [key for key in keys if not isinstance(key, str)]
    if strange:
        return f"{label}: the key {_few([repr(strange[0])])} is not a string"
    formats = ", ".join(FORMATS)
    held = _few(keys) or "no keys"
    return f"{label} is not a ConvMixer in any known format ({formats}): it has {held}"


def _few(names: Iterable[str], shown: int = 3) -> str:
    """The first names and the count of the others, on one line of bounded length."""
    names = [_one_line(name)[:160] for name in names]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _one_line(thing: object) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(thing)).split())
