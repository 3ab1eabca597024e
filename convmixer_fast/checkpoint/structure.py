"""Search for a ConvMixer among nested mappings: its format, its prefix and its blocks.

Only the structure of the keys counts, never the name of a file or of a wrapper: two releases of
the original repository ship files of one name under different key formats.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .formats import (
    FORMATS,
    LAYOUTS,
    MAX_KEY_PARTS,
    NORM_LEAVES,
    PADDLE_LEAVES,
    CheckpointError,
    block_numbers,
    few,
    full_key,
    is_counter,
    is_head,
    key_table,
    require_every_block,
)

#: A word in a name above averaged weights: ``state_dict_ema``, ``params_ema``, ``swa``.
_AVERAGED = re.compile(r"(?:^|[^a-zA-Z])(?:ema|swa|averaged?)(?:[^a-zA-Z]|$)", re.IGNORECASE)


class Leaf(NamedTuple):
    """A value of a state dict: the names of the mappings above it, its key, and the value."""

    path: tuple[str, ...]
    key: str
    value: Any

    @property
    def parts(self) -> tuple[str, ...]:
        """The names on the way to the leaf, without those that wrapping modules added to its key.

        Wrappers keep the wrapped module under a private name (torch.compile, FSDP, activation
        checkpointing), as ``module`` (DDP, averaged models) or as ``model``; no format has such a
        part.
        """
        if not isinstance(self.key, str):
            return ()
        *parts, last = self.key.split(".")
        last = PADDLE_LEAVES.get(last, last) if parts else last
        own = [
            part
            for part in parts
            if _AVERAGED.search(part) or not (part.startswith("_") or part in ("module", "model"))
        ]
        return (*self.path, *own, last)


@dataclass(frozen=True)
class Network:
    """The values of a state dict, sorted.

    Attributes:
        format, depth: of the network.
        known: the network's values under timm's names.
        unexpected: keys inside the network that a ConvMixer lacks (``blocks.0.4.weight``).
        unrelated: keys of parameters outside the network (``criterion.weight``).
    """

    format: str
    depth: int
    known: dict[str, Leaf]
    unexpected: list[str]
    unrelated: list[str]


@dataclass(frozen=True)
class _Candidate:
    """Keys of one format under one prefix, each with the index of its leaf."""

    prefix: tuple[str, ...]
    format: str
    keys: list[tuple[str, int]]

    @property
    def numbers(self) -> set[int]:
        """The blocks."""
        return block_numbers((key for key, _ in self.keys), self.format)

    @property
    def is_whole(self) -> bool:
        """Whether at most the classifier and BatchNorm's counters are missing."""
        table = key_table(self.format, len(self.numbers))
        needed = {key for key, ours in table.items() if not (is_head(ours) or is_counter(ours))}
        return needed <= {key for key, _ in self.keys}

    @property
    def is_averaged(self) -> bool:
        return any(map(_AVERAGED.search, self.prefix))

    def __str__(self) -> str:
        return repr(".".join(self.prefix)) if self.prefix else "the top"


def detect_format(keys: Iterable[str]) -> str:
    """The format, one of `FORMATS`, of the ConvMixer among the keys, under whatever prefix.

    Raises:
        CheckpointError: no key is a ConvMixer's in any format, or the keys of several are there.
    """
    return identify([Leaf((), key, None) for key in keys], "the state dict").format


def flatten(held: Any) -> list[Leaf]:
    """Every value in nested mappings, and in sequences of them; each mapping is visited once.

    Mappings of averaged weights come last: a mapping under two names counts as not averaged.
    """
    found: list[Leaf] = []
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
                found.append(Leaf(path, key, value))  # type: ignore[arg-type]
    return found


def identify(leaves: list[Leaf], label: str, use_ema: bool | None = None) -> Network:
    """Find the ConvMixer, count its blocks and give every key its name in timm.

    Args:
        leaves: what `flatten` returned.
        label: the source, for messages.
        use_ema: see `_choose`.

    Raises:
        CheckpointError: no ConvMixer's keys, or those of several, a gap in the blocks, or one key
            under two names.
    """
    found = _candidates(leaves)
    if not found:
        raise CheckpointError(_not_a_convmixer(label, leaves))
    chosen = _choose(found, leaves, label, use_ema)
    form, prefix, depth = chosen.format, chosen.prefix, len(chosen.numbers)
    require_every_block(chosen.numbers, form, label)
    table = key_table(form, depth)
    paths = {leaves[i].path for _, i in chosen.keys}
    known: dict[str, Leaf] = {}
    unexpected: list[str] = []
    unrelated: list[str] = []
    for leaf in leaves:
        parts = leaf.parts
        if leaf.path not in paths or not parts:
            continue
        inside = parts[: len(prefix)] == prefix
        name = table.get(full_key(".".join(parts[len(prefix) :]), form)) if inside else None
        if name is None:
            own = inside and re.fullmatch(LAYOUTS[form].top, parts[len(prefix)])
            if own and is_tensor(leaf.value):
                unexpected.append(leaf.key)
            elif is_tensor(leaf.value, floating=True):
                unrelated.append(leaf.key)
        elif name in known:
            both = few([known[name].key, leaf.key])
            raise CheckpointError(f"{label} holds one tensor under two names ({both}): remove one")
        else:
            known[name] = leaf
    return Network(form, depth, known, unexpected, unrelated)


def is_tensor(value: Any, floating: bool = False) -> bool:
    """Whether a value is a tensor or an array, optionally of floating-point numbers only.

    Integers next to a network are counters (``n_averaged``, ``steps``), not parameters.
    """
    if isinstance(value, np.ndarray):
        return not floating or value.dtype.kind == "f"
    return isinstance(value, Tensor) and (not floating or value.is_floating_point())


def _candidates(leaves: list[Leaf]) -> list[_Candidate]:
    """The ConvMixers among the leaves, the one with the most keys first; none shares a leaf."""
    groups: dict[tuple[tuple[str, ...], str], list[tuple[str, int]]] = {}
    for i, leaf in enumerate(leaves):
        parts = leaf.parts
        if not parts or parts[-1] not in NORM_LEAVES:
            continue
        for start in range(max(0, len(parts) - MAX_KEY_PARTS), len(parts) - 1):
            short = ".".join(parts[start:])
            for form in FORMATS:
                key = full_key(short, form)
                if LAYOUTS[form].any_key.fullmatch(key):
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
    # The keys of a block are unmistakable. Two convolutions and a norm of any network resemble a
    # stem: without blocks, the stem must be whole or its keys bare.
    deep = [c for c in apart if c.numbers]
    return deep or [c for c in apart if c.is_whole] or [c for c in apart if not c.prefix]


def _choose(
    found: list[_Candidate], leaves: list[Leaf], label: str, use_ema: bool | None
) -> _Candidate:
    """The one candidate to take.

    ``use_ema`` True prefers averaged weights, False excludes them, None treats all alike.

    Raises:
        CheckpointError: several candidates hold different values, or the only one is excluded.
    """
    # A candidate neither whole nor large is a part of another network that resembles a ConvMixer.
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
    if not all(_same_values(first, other, leaves) for other in others):
        raise CheckpointError(
            f"{label} holds {len(rivals)} ConvMixers, under {few(map(str, rivals))}: pass a "
            "state dict with the keys of one of them"
        )
    return first


def _same_values(one: _Candidate, other: _Candidate, leaves: list[Leaf]) -> bool:
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


def _not_a_convmixer(label: str, leaves: list[Leaf]) -> str:
    keys = [leaf.key for leaf in leaves if is_tensor(leaf.value)] or [leaf.key for leaf in leaves]
    strange = [key for key in keys if not isinstance(key, str)]
    if strange:
        return f"{label}: the key {few([repr(strange[0])])} is not a string"
    formats = ", ".join(FORMATS)
    held = few(keys) or "no keys"
    return f"{label} is not a ConvMixer in any known format ({formats}): it has {held}"
