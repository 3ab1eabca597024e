"""Weights are found by structure, under any names; values beside them are inert."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import io
import os
import pathlib
import pickle
import types
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convmixer_fast import ConvMixer
from convmixer_fast.arch import Arch
from convmixer_fast.checkpoint import (
    FORMATS,
    CheckpointError,
    convert_state_dict,
    detect_format,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from convmixer_fast.checkpoint.storage import SAFE_GLOBALS

ARCHES = [Arch(4, 1, 3, 2, num_classes=3), Arch(6, 4, 4, 3, in_chans=1, num_classes=2)]
#: Names of training scripts, and those that a format has itself: the hardest to tell.
NAMES = [
    "model_state_dict", "net", "params", "generator", "encoder", "student", "weights", "module",
    "model", "_orig_mod", "state_dict", "stem", "blocks", "head", "backbone", "stages", "fc", "0",
    "1", "3", "fn", "a b", "größe",
]  # fmt: skip
name = st.one_of(
    st.sampled_from(NAMES), st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,9}", fullmatch=True)
)


def weights(arch: Arch = ARCHES[0], form: str = "timm", seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = ConvMixer(arch.dim, arch.depth, arch.kernel_size, arch.patch_size, arch.in_chans,
                      arch.num_classes)  # fmt: skip
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randint(0, 1000, value.shape))
    return convert_state_dict(model.state_dict(), form)


def assert_holds(held: Any, expected: dict[str, Tensor], form: str, **options: Any) -> None:
    found = read_checkpoint(held, **options)
    assert found.format == form
    back = convert_state_dict(found.state_dict, form)
    assert list(back) == list(expected)
    assert all(torch.equal(back[key], expected[key]) for key in expected)


COMPANY: dict[str, dict[str, Any]] = {
    "a weight": {"criterion.weight": torch.ones(3)},
    "a network": {"loss.0.weight": torch.ones(2, 2), "loss.0.bias": torch.ones(2)},
    "numpy": {"margin": np.ones(2, np.float32)},
}
DISTRACTIONS: dict[str, Any] = {
    "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(4, 3, 2, 2)}},
                  "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    "epoch": 3,
    "history": [{"loss": 0.5}],
    "rng": [torch.zeros(5, dtype=torch.uint8), (1, 2)],
    "classifier": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2)).state_dict(),
    "ema_decay": 0.99,
    "model_ema": None,
}  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(
    arch=st.sampled_from(ARCHES),
    form=st.sampled_from(FORMATS),
    wrappers=st.lists(name, max_size=4),
    prefix=st.lists(name, max_size=3),
    distractions=st.sets(st.sampled_from(sorted(DISTRACTIONS))),
    company=st.sets(st.sampled_from(sorted(COMPANY))),
    nesting=st.sampled_from(["dict", "list"]),
    headless=st.booleans(),
)
def test_weights_are_found_under_any_wrapper_and_any_prefix(
    arch: Arch, form: str, wrappers: list[str], prefix: list[str], distractions: set[str],
    company: set[str], nesting: str, headless: bool,
) -> None:  # fmt: skip
    expected = weights(arch, form)
    if headless:
        heads = list(expected)[-2:]
        expected = {key: value for key, value in expected.items() if key not in heads}
    held: Any = {"".join(f"{part}." for part in prefix) + k: v for k, v in expected.items()}
    left_out = []
    for kind in sorted(company):
        held |= COMPANY[kind]
        left_out += COMPANY[kind]
    for wrapper in wrappers:
        held = {wrapper: held}
    held = {**{k: DISTRACTIONS[k] for k in sorted(distractions - set(held))}, **held}
    if nesting == "list":
        held = [{"epoch": 1}, held]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = read_checkpoint({"top": held})
    assert found.format == form
    back = found.state_dict
    want = read_checkpoint(expected).state_dict
    assert list(back) == list(want)
    assert all(torch.equal(back[key], want[key]) for key in want)
    lines = [str(w.message) for w in told if w.category is UserWarning]
    assert len(lines) == bool(left_out)
    if left_out:
        assert sorted(left_out)[0] in lines[0] or "and" in lines[0]


@pytest.mark.parametrize(
    "averaged", ["ema", "params_ema", "model-ema", "swa_model", "EMA.averaged"]
)
@pytest.mark.parametrize("place", ["wrapper", "prefix"])
def test_averaged_weights_are_preferred_under_any_such_name(averaged: str, place: str) -> None:
    plain, mean = weights(seed=1), weights(seed=2)
    if place == "wrapper":
        held: dict[str, Any] = {averaged: {"deeper": mean, "decay": 0.9}, "net": plain}
    else:
        held = {f"{averaged}.{key}": value for key, value in mean.items()}
        held |= {f"net.{key}": value for key, value in plain.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_holds(held, mean, "timm")
        assert_holds(held, plain, "timm", use_ema=False)
    only = {averaged: mean}
    with pytest.raises(CheckpointError, match=r"averaged weights only .*use_ema=True"):
        read_checkpoint(only, use_ema=False)


@pytest.mark.parametrize("word", ["schema", "cinema", "demand", "remap"])
def test_a_name_that_only_contains_the_letters_is_not_averaged(word: str) -> None:
    assert_holds({word: weights()}, weights(), "timm", use_ema=False)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("form", FORMATS)
def test_two_networks_are_an_error_that_names_both(form: str) -> None:
    one, other = weights(form=form, seed=1), weights(form=form, seed=2)
    deep = weights(ARCHES[1], form)
    for held, names in [
        ({"student": one, "teacher": other}, ["'student'", "'teacher'"]),
        ({"student": one, "teacher": deep}, ["'student'", "'teacher'"]),
        ({"state_dict": one, "model": other}, ["'state_dict'", "'model'"]),
        (prefixed("encoder_q.", one) | prefixed("encoder_k.", other), ["encoder_q", "encoder_k"]),
        ({"net": prefixed("a.", one) | prefixed("b.", deep)}, ["net.a", "net.b"]),
        ({"a_ema": one, "b_ema": other, "plain": deep}, ["a_ema", "b_ema"]),
        ([one, other], ["nets.0", "nets.1"]),
    ]:
        model = ConvMixer(4, 1, 3, 2, num_classes=3)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match="holds 2 ConvMixers") as caught:
            load_checkpoint(model, held if isinstance(held, dict) else {"nets": held}, strict=False)
        assert all(name in str(caught.value) for name in names), caught.value
        assert "\n" not in str(caught.value)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_one_network_under_two_names_is_one() -> None:
    state = weights()
    copy = {key: value.clone() for key, value in state.items()}
    assert_holds({"model": state, "state_dict": state}, state, "timm")
    assert_holds({"model": state, "state_dict": copy}, state, "timm")
    assert_holds({"ema": state, "net": state}, state, "timm", use_ema=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_holds(prefixed("net.", state) | prefixed("loss.net.", state), state, "timm")


def test_a_part_of_the_network_that_no_convmixer_has_is_still_an_error() -> None:
    for prefix in ("", "net."):
        for key in (
            "blocks.0.4.weight",
            "blocks.0.1.lora_A.weight",
            "stem.3.weight",
            "head.1.bias",
        ):
            held = prefixed(prefix, weights()) | {prefix + key: torch.ones(2)}
            with pytest.raises(CheckpointError, match=rf"{prefix}{key}.*left over"):
                read_checkpoint(held)


def test_company_is_reported_and_counters_are_not() -> None:
    held = prefixed("net.", weights()) | {
        "criterion.weight": torch.ones(3),
        "temperature": torch.tensor(0.07),
        "n_averaged": torch.tensor(5),
        "global_step": torch.tensor([3], dtype=torch.int32),
    }
    model = ConvMixer(4, 1, 3, 2, num_classes=3)
    with pytest.warns(UserWarning, match=r"left out: criterion\.weight, temperature;") as told:
        result = load_checkpoint(model, held)
    assert len(told) == 1
    assert result == ([], ["criterion.weight", "temperature"], [], "timm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = load_checkpoint(model, held, strict=False)
    assert result.unexpected_keys == ["criterion.weight", "temperature"]
    assert detect_format(held) == "timm"


def test_a_module_around_the_model_is_filled_and_saved(tmp_path: Path) -> None:
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ConvMixer(4, 1, 3, 2, num_classes=3)

    trainer, state = Trainer(), weights()
    load_checkpoint(trainer, {"net_ema": state})
    assert all(torch.equal(trainer.net.state_dict()[key], state[key]) for key in state)
    save_checkpoint(trainer, tmp_path / "a.pth")
    assert_holds(tmp_path / "a.pth", state, "timm")


# Values beside the weights

MOMENT = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.timezone.utc)
INERT: dict[str, Any] = {
    "scalars": [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.str_("a"),
                np.datetime64("2026-01-02"), np.complex64(1j), np.float16(1)],
    "arrays": [np.arange(6.0).reshape(2, 3), np.array(["a", "bc"]), np.array([1, None], object),
               np.zeros(0), np.zeros(2, [("a", "f4"), ("b", "i8")]), np.asfortranarray(np.eye(3))],
    "numpy types": [np.float32, np.dtype("int16"), np.int64],
    "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("/c"), pathlib.PureWindowsPath("c:/d")],
    "dates": [MOMENT, MOMENT.date(), MOMENT.time(), datetime.timedelta(days=1),
              datetime.timezone(datetime.timedelta(hours=2))],
    "defaultdicts": [collections.defaultdict(list, {"a": [1]}), collections.defaultdict(int),
                     collections.defaultdict(dict, {"a": {"b": 1}}), collections.defaultdict()],
    "deques": [collections.deque([1, 2]), collections.deque([1.0], maxlen=3), collections.deque()],
    "ordered": collections.OrderedDict(a=1),
    "counted": collections.Counter("abba"),
    "arguments": argparse.Namespace(lr=0.1, data=pathlib.Path("x"), mean=[np.float32(0.5)]),
    "simple": types.SimpleNamespace(a=1),
    "numbers": [decimal.Decimal("1.5"), fractions.Fraction(1, 3), 1j, 2**70],
    "builtins": [{1, 2}, frozenset({3}), slice(1, 2), range(3), b"", b"ab", bytearray(b"c"), ...,
                 int, float, str],
    "uuid": uuid.UUID(int=7),
}  # fmt: skip
INERT["builtins"].remove(...)


def saved(held: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", INERT)
def test_inert_values_beside_the_weights_load(kind: str, legacy: bool, tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    state = weights()
    for value in INERT[kind] if isinstance(INERT[kind], list) else [INERT[kind]]:
        held = {"meta": {"deep": [value]}, kind: value, "state_dict": state}
        (tmp_path / "a.pth").write_bytes(saved(held, legacy))
        assert_holds(tmp_path / "a.pth", state, "timm")
    assert set(torch.serialization.get_safe_globals()) == before


inert = st.recursive(
    st.sampled_from([v for g in INERT.values() for v in (g if isinstance(g, list) else [g])]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
        st.lists(inner, max_size=3).map(collections.deque),
        st.dictionaries(st.text(max_size=5), inner, max_size=2).map(
            lambda d: collections.defaultdict(list, d)
        ),
        inner.map(lambda value: argparse.Namespace(value=value)),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=inert, wrapper=st.sampled_from(["dict", "defaultdict", "deque", "OrderedDict"]))
def test_any_nest_of_inert_values_loads_and_may_hold_the_weights(
    value: Any, wrapper: str, tmp_path: Path
) -> None:
    state: Any = weights()
    held: Any = {
        "dict": {"net": state},
        "defaultdict": collections.defaultdict(dict, {"net": collections.defaultdict(None, state)}),
        "deque": {"nets": collections.deque([state])},
        "OrderedDict": collections.OrderedDict(net=collections.OrderedDict(state)),
    }[wrapper]
    held["beside"] = value
    (tmp_path / "a.pth").write_bytes(saved(held))
    assert_holds(tmp_path / "a.pth", state, "timm")


def test_numpy_arrays_can_be_the_weights(tmp_path: Path) -> None:
    state = weights()
    arrays = {key: value.numpy() for key, value in state.items()}
    (tmp_path / "a.pth").write_bytes(saved({"net": arrays}))
    assert_holds(tmp_path / "a.pth", state, "timm")


def test_inert_values_are_replaced_not_made() -> None:
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        data = io.BytesIO(saved({"path": pathlib.Path("a"), "when": MOMENT, "array": np.ones(2)}))
        held = torch.load(data, weights_only=True)
    assert {type(held["path"]).__name__, type(held["when"]).__name__} == {"Inert"}
    assert np.array_equal(held["array"], np.ones(2))


class Call:
    """Unpickling this calls a function with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize("place", ["beside", "within", "as argument", "as key", "as factory"])
@pytest.mark.parametrize("how", ["mkdir", "exec", "eval", "getattr", "import", "write"])
def test_code_in_a_pickle_never_runs(how: str, place: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "a.pth"
    text = f"__import__('os').mkdir({str(marker)!r})"
    bomb = {
        "mkdir": Call(os.mkdir, str(marker)),
        "exec": Call(exec, text),
        "eval": Call(eval, text),
        "getattr": Call(getattr, Call(__import__, "os"), "mkdir"),
        "import": Call(__import__, "os"),
        "write": Call(np.ndarray.tofile, np.ones(1), str(marker)),
    }[how]
    if how in ("mkdir", "exec", "eval"):
        pickle.loads(pickle.dumps(bomb))
        assert marker.is_dir(), "the bomb must be live for this test to mean anything"
        marker.rmdir()
    held: Any = {
        "beside": {"bomb": bomb},
        "within": {"a": collections.defaultdict(list, {"b": collections.deque([bomb])})},
        "as argument": {"path": Call(pathlib.PurePosixPath, bomb)},
        "as key": {"array": Call(np.dtype, bomb)},
        "as factory": {"map": Call(collections.defaultdict, bomb)},
    }[place]
    path.write_bytes(saved({"state_dict": weights(), **held}))
    with pytest.raises(CheckpointError, match="refused") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_no_function_that_is_made_known_can_do_more_than_make_a_value() -> None:
    allowed = {"Inert", "_dict", "_list", "bytes", "_reconstruct", "scalar", "ndarray", "dtype"}
    names = {function.__name__ for function, _ in SAFE_GLOBALS}
    assert {name for name in names - allowed if not name.endswith("DType")} == set()
