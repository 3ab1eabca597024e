"""Options of the suites, recording of their rows, and the tables at the end."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import devices
import pytest
import report
import torch
from competitors import SYSTEMS
from presets import DEVICES, PRESETS, THREADS, Preset, preset_of
from recording import BenchmarkRecorder, Recorder
from settings import SETTINGS


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _names(text))


def _systems(text: str) -> tuple[str, ...]:
    known = tuple(dict.fromkeys(name for table in SYSTEMS.values() for name in table))
    names = known if text == "all" else _names(text)
    if unknown := set(names) - set(known):
        raise pytest.UsageError(
            f"unknown system {', '.join(sorted(unknown))}: use {', '.join(known)}"
        )
    return names


def _settings(text: str) -> tuple[str, ...]:
    names = _names(text)
    if unknown := set(names) - set(SETTINGS):
        raise pytest.UsageError(
            f"unknown setting {', '.join(sorted(unknown))}: use {', '.join(SETTINGS)}"
        )
    return names


def _devices(text: str) -> tuple[str, ...]:
    names = _names(text)
    if unknown := set(names) - set(DEVICES):
        raise pytest.UsageError(
            f"unknown device {', '.join(sorted(unknown))}: use {', '.join(DEVICES)}"
        )
    return names


#: Options that replace a value of the preset: how their text is read.
_OVERRIDES = {
    "variants": (_names, "models, separated by commas"),
    "batches": (_numbers, "batch sizes of whole models"),
    "threads": (_numbers, "thread counts of a CPU"),
    "dtypes": (_names, "dtypes of a GPU"),
    "block-batches": (_numbers, "batch sizes of blocks and their halves"),
    "memory-batches": (_numbers, "batch sizes of the memory suite"),
    "large": (_names, "models that get an image of 2048 x 2048 pixels"),
    "resolution": (_names, "models of the resolution suite"),
    "sides": (_numbers, "its images' sides, in pixels"),
    "resolution-batches": (_numbers, "its batches of the usual size"),
    "training-batches": (_numbers, "batch sizes of a training step"),
    "step-batches": (_numbers, "batch sizes of the steps of fusion"),
    "photographs": (int, "images of the batch pipeline"),
    "systems": (_systems, "peers, or 'all'"),
    "cell-variants": (_names, "models of the suite never_slower"),
    "cell-settings": (_settings, f"of {', '.join(SETTINGS)}"),
    "cell-batches": (_numbers, "its batch sizes"),
    "cell-sides": (_numbers, "its images' sides, in pixels"),
    "cell-budget": (float, "seconds for the rounds of one of its cells"),
    "cell-call-seconds": (float, "its longest call, in seconds; longer ones are left out"),
    "stock": (_systems, "what it holds ours against"),
    "least-rounds": (int, "interleaved rounds of each system, at least"),
    "most-rounds": (int, "and at most"),
    "budget": (float, "seconds for the rounds of one group of systems"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("convmixer_fast")
    group.addoption(
        "--devices", type=_devices, help=f"of {', '.join(DEVICES)}; default: all that are there"
    )
    group.addoption("--preset", choices=sorted(PRESETS), default="quick", help="how much of it all")
    for name, (read, text) in _OVERRIDES.items():
        group.addoption(f"--{name}", type=read, help=f"{text}; default: the preset's")
    group.addoption("--rows", type=Path, help="merge every measured group into this JSON file")
    group.addoption(
        "--resume",
        action="store_true",
        help="skip groups that the file of --rows has from this build of the engine",
    )


def _preset(config: pytest.Config, kind: str = "cpu") -> Preset:
    given = {name.replace("-", "_"): config.getoption(f"--{name}") for name in _OVERRIDES}
    given = {name: value for name, value in given.items() if value is not None}
    if kind == "cpu":
        given.pop("dtypes", None)
    if "systems" in given:
        given["systems"] = tuple(name for name in given["systems"] if name in SYSTEMS[kind])
    return dataclasses.replace(preset_of(config.getoption("--preset"), kind), **given)


def _used_devices(config: pytest.Config) -> tuple[str, ...]:
    """The requested devices, else all that torch sees."""
    asked: tuple[str, ...] | None = config.getoption("--devices")
    missing = devices.unavailable_reason()
    if asked and "cuda" in asked and missing:
        raise pytest.UsageError(f"--devices cuda: {missing}")
    return asked or tuple(d for d in DEVICES if d == "cpu" or not missing)


#: Parameter of a test -> field of the preset.
_LISTS = {
    "variant": "variants",
    "large_variant": "large",
    "resolution_variant": "resolution",
    "side": "sides",
    "resolution_batch": "resolution_batches",
    "training_batch": "training_batches",
    "step_batch": "step_batches",
    "batch": "batches",
    "block_batch": "block_batches",
    "memory_batch": "memory_batches",
    "dtype": "dtypes",
    "cell_variant": "cell_variants",
    "setting": "cell_settings",
    "threads": "threads",
    "cell_batch": "cell_batches",
    "cell_side": "cell_sides",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [name for name in _LISTS if name in metafunc.fixturenames]
    where = "kind" in metafunc.fixturenames
    cases = []
    for kind in _used_devices(metafunc.config) if where else ("cpu",):
        preset = _preset(metafunc.config, kind)
        # Only a CPU has thread counts.
        lists = [
            (0,) if name == "threads" and kind != "cpu" else getattr(preset, _LISTS[name])
            for name in names
        ]
        cases += [(kind,) * where + values for values in itertools.product(*lists)]
    if names or where:
        metafunc.parametrize(("kind",) * where + tuple(names), cases)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Last, because it changes settings of the allocator that whole models must not have.
    items.sort(key=lambda item: item.path.name == "test_kernels.py")


def _parameter(request: pytest.FixtureRequest, name: str, default: Any) -> Any:
    call = getattr(request.node, "callspec", None)
    return default if call is None else call.params.get(name, default)


@pytest.fixture
def preset(request: pytest.FixtureRequest) -> Preset:
    return _preset(request.config, _parameter(request, "kind", "cpu"))


@pytest.fixture
def device(request: pytest.FixtureRequest, kind: str, dtype: str) -> devices.Device:
    """The CPU with the threads of the test's parameter, or the GPU."""
    if kind == "cpu":
        return devices.Cpu(_parameter(request, "threads", THREADS))
    return devices.gpu(dtype)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


_RECORDER = pytest.StashKey[Recorder]()


def pytest_configure(config: pytest.Config) -> None:
    gpu = devices.gpu("float32").name() if "cuda" in _used_devices(config) else ""
    config.stash[_RECORDER] = Recorder(
        config.getoption("--rows"), config.getoption("--resume"), gpu
    )


@pytest.fixture
def record(pytestconfig: pytest.Config, benchmark: Any) -> BenchmarkRecorder:
    return BenchmarkRecorder(pytestconfig.stash[_RECORDER], benchmark)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    recorder = config.stash[_RECORDER]
    if recorder.session is None:
        return
    terminalreporter.section("convmixer_fast and its peers")
    terminalreporter.write_line(report.text(recorder.session, report.tables(recorder.session)))
    if recorder.path is not None:
        terminalreporter.write_line(f"rows merged into {recorder.path}")
