"""Files are judged by their content, run no code, and fail in one line."""

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
import threading
import types
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import (
    ARCH,
    assert_holds,
    assert_same_bits,
    refusal,
    snapshot,
    torch_bytes,
    trained,
    weights,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from convmixer_fast.arch import Arch
from convmixer_fast.checkpoint import (
    CheckpointError,
    convert_state_dict,
    load_checkpoint,
    read_checkpoint,
)
from convmixer_fast.checkpoint.storage import SAFE_GLOBALS
from convmixer_fast.reference import ReferenceConvMixer

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
    "builtins": [{1, 2}, frozenset({3}), slice(1, 2), range(3), b"", b"ab", bytearray(b"c"),
                 int, float, str],
    "uuid": uuid.UUID(int=7),
}  # fmt: skip

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


class Call:
    """Unpickling this calls a function with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "pth.tar", "safetensors", "weights", ""])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_files_are_judged_by_content_not_by_extension(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    state = trained("tweet").state_dict()
    path = tmp_path / f"weights.{suffix}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        with path.open("wb") as file:
            torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    checkpoint = read_checkpoint(str(path))
    assert checkpoint.format == "tweet"
    assert checkpoint.source == str(path)
    assert_same_bits(convert_state_dict(checkpoint.state_dict, "tweet"), dict(state))


@pytest.mark.parametrize("legacy", [False, True])
def test_command_line_arguments_in_a_training_checkpoint_are_allowed(
    legacy: bool, tmp_path: Path
) -> None:
    args = argparse.Namespace(model="convmixer_768_32", lr=0.01, mean=[0.5], opt=None)
    state = trained("timm").state_dict()
    held = {"epoch": 3, "arch": "convmixer", "args": args, "state_dict": state, "metric": 0.5}
    (tmp_path / "last.pth.tar").write_bytes(torch_bytes(held, legacy))
    checkpoint = read_checkpoint(tmp_path / "last.pth.tar")
    assert_same_bits(checkpoint.state_dict, dict(state))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", INERT)
def test_inert_values_next_to_the_weights_load(kind: str, legacy: bool, tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    state = weights()
    for value in INERT[kind] if isinstance(INERT[kind], list) else [INERT[kind]]:
        held = {"meta": {"deep": [value]}, kind: value, "state_dict": state}
        (tmp_path / "a.pth").write_bytes(torch_bytes(held, legacy))
        assert_holds(tmp_path / "a.pth", state, "timm")
    assert set(torch.serialization.get_safe_globals()) == before


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
    held["other"] = value
    (tmp_path / "a.pth").write_bytes(torch_bytes(held))
    assert_holds(tmp_path / "a.pth", state, "timm")


def test_numpy_arrays_can_be_the_weights(tmp_path: Path) -> None:
    state = weights()
    arrays = {key: value.numpy() for key, value in state.items()}
    (tmp_path / "a.pth").write_bytes(torch_bytes({"net": arrays}))
    assert_holds(tmp_path / "a.pth", state, "timm")


def test_inert_values_are_replaced_by_placeholders() -> None:
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        data = torch_bytes({"path": pathlib.Path("a"), "when": MOMENT, "array": np.ones(2)})
        held = torch.load(io.BytesIO(data), weights_only=True)
    assert {type(held["path"]).__name__, type(held["when"]).__name__} == {"Inert"}
    assert np.array_equal(held["array"], np.ones(2))


def test_allowed_globals_only_build_values() -> None:
    allowed = {"Inert", "_dict", "_list", "bytes", "_reconstruct", "scalar", "ndarray", "dtype"}
    names = {function.__name__ for function, _ in SAFE_GLOBALS}
    assert {name for name in names - allowed if not name.endswith("DType")} == set()


@pytest.mark.parametrize("place", ["next to", "within", "as argument", "as key", "as factory"])
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
        "next to": {"bomb": bomb},
        "within": {"a": collections.defaultdict(list, {"b": collections.deque([bomb])})},
        "as argument": {"path": Call(pathlib.PurePosixPath, bomb)},
        "as key": {"array": Call(np.dtype, bomb)},
        "as factory": {"map": Call(collections.defaultdict, bomb)},
    }[place]
    path.write_bytes(torch_bytes({"state_dict": weights(), **held}))
    with pytest.raises(CheckpointError, match="refused") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "raw 0", "raw 2", "raw 4", "inside weights"])
def test_a_pickle_that_runs_code_is_refused_in_every_container(kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "exploded", tmp_path / "weights.pth"
    bomb = Call(os.mkdir, str(marker))
    pickle.loads(pickle.dumps(bomb))
    assert marker.is_dir(), "the bomb must be live for this test to mean anything"
    marker.rmdir()
    if kind == "inside weights":
        path.write_bytes(torch_bytes({**trained("timm").state_dict(), "bomb": bomb}))
    elif kind.startswith("raw"):
        path.write_bytes(pickle.dumps(bomb, protocol=int(kind[-1])))
    else:
        path.write_bytes(torch_bytes({"state_dict": bomb}, legacy=kind == "legacy"))
    model = trained("timm")
    before = snapshot(model)
    words = () if kind == "raw 0" else ("refused", "trust")
    words += ("mkdir",) if kind in ("zip", "legacy", "raw 2", "inside weights") else ()
    refusal(lambda: load_checkpoint(model, path), str(path), *words)
    assert not marker.exists()
    assert_same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize(
    ("held", "name"),
    [
        ({"model": ReferenceConvMixer(ARCH)}, "convmixer_fast.reference.ReferenceConvMixer"),
        ({"lock": threading.Thread}, "threading.Thread"),
    ],
    ids=["whole model", "class"],
)
def test_a_refused_global_is_named(held: Any, name: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(torch_bytes(held))
    refusal(
        lambda: read_checkpoint(tmp_path / "a.pth"),
        str(tmp_path / "a.pth"),
        name,
        "save_checkpoint",
    )


def test_files_without_weights_are_one_line_each(tmp_path: Path) -> None:
    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    script = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), script)
    loop: dict[str, Any] = {"epoch": 1}
    loop["model"] = loop
    cases = [
        (tmp_path / "absent.pth", ["absent.pth", "no such file"]),
        (tmp_path, ["is a folder"]),
        (tmp_path / "a\0b", ["cannot be opened"]),
        (file("empty.pth", b""), ["empty.pth is empty"]),
        (file("text.pth", b"hello\nthere\n" * 9), ["text.pth", "not a checkpoint", "hello"]),
        (file("short.pth", b"\x80"), ["short.pth"]),
        (file("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid"), ["git lfs pull"]),
        (file("page.safetensors", b"\n<!DOCTYPE html><html>"), ["a web page"]),
        (file("archive.zip", b"PK\x03\x04" + b"x" * 99), ["truncated", "archive.zip"]),
        (file("script.pt", script.getvalue()), ["TorchScript", "torch.jit.load"]),
        (file("list.pth", torch_bytes([1, 2])), ["no state dict", "list"]),
        (file("nothing.pth", torch_bytes({})), ["no state dict", "empty"]),
        (file("epoch.pth", torch_bytes({"epoch": 3})), ["no state dict", "epoch", "model_ema"]),
        (file("hollow.pth", torch_bytes({"model": {"a": 1}})), ["no state dict"]),
        (file("tensor.pth", torch_bytes(torch.ones(3))), ["no state dict", "Tensor"]),
        (file("loop.pth", torch_bytes(loop)), ["no state dict"]),
        (file("number.pth", torch_bytes({3: torch.ones(2)})), ["3", "not a string"]),
        (file("conv.pth", torch_bytes({"conv\n1": torch.ones(2)})), ["not a ConvMixer", "conv 1"]),
        (file("head\nline.pth", b"x"), ["head line.pth"]),
    ]
    model = trained("timm")
    before = snapshot(model)
    for path, words in cases:
        refusal(lambda path=path: read_checkpoint(path), *words)
        refusal(lambda path=path: load_checkpoint(model, path, strict=False))
    refusal(lambda: read_checkpoint(3), "int")  # type: ignore[arg-type]
    assert_same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_one_line_at_any_length(kind: str, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut.pth"
    state = trained("timm").state_dict()
    if kind == "safetensors":
        save_file(state, whole)
    else:
        whole.write_bytes(torch_bytes(state, legacy=kind == "legacy"))
    data = whole.read_bytes()
    read_checkpoint(whole)
    model = trained("timm", seed=2)
    before = snapshot(model)
    for length in [1, 2, 7, 8, 9, 40, *range(100, len(data), len(data) // 23), len(data) - 1]:
        cut.write_bytes(data[:length])
        line = refusal(lambda: load_checkpoint(model, cut), str(cut))
        assert length < 64 or "truncated" in line or "damaged" in line, line
    assert_same_bits(dict(model.state_dict()), before)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=120), start=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04"]))
def test_any_bytes_are_refused_in_one_line(data: bytes, start: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(start + data)
    refusal(lambda: read_checkpoint(tmp_path / "a.pth"), "a.pth")


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(["zip", "legacy", "safetensors"]),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    reach=st.sampled_from([100, 3000, 10**6]),
)
def test_a_damaged_file_is_read_or_refused_in_one_line(
    kind: str, damage: list[tuple[float, int]], reach: int, tmp_path: Path
) -> None:
    state = ReferenceConvMixer(Arch(4, 1, 3, 2, num_classes=2)).state_dict()
    legacy = kind == "legacy"
    data = bytearray(save(state) if kind == "safetensors" else torch_bytes(state, legacy))
    for place, value in damage:
        data[int(place * (min(len(data), reach) - 1))] = value
    (tmp_path / "a.pth").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        line = ""
        try:
            read_checkpoint(tmp_path / "a.pth")
        except CheckpointError as error:
            line = str(error)
    assert line == " ".join(line.split())
