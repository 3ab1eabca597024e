"""What the suites share: their options, where rows go, and the tables at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report
import torch
from presets import PRESETS, Preset
from recording import Recorder
from systems import SYSTEMS


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _names(text))


def _systems(text: str) -> tuple[str, ...]:
    return tuple(SYSTEMS) if text == "all" else _names(text)


#: Options that take the place of one of the preset's values: how their text is read.
_OVERRIDES = {
    "variants": (_names, "models, separated by commas"),
    "batches": (_numbers, "batch sizes of whole models"),
    "threads": (_numbers, "thread counts"),
    "block-batches": (_numbers, "batch sizes of blocks and their halves"),
    "memory-batches": (_numbers, "batch sizes of the memory suite"),
    "large": (_names, "models that get an image of 2048 x 2048 pixels"),
    "resolution": (_names, "models of the resolution suite"),
    "sides": (_numbers, "its images' sides, in pixels"),
    "resolution-batches": (_numbers, "its batches of the usual size"),
    "training-batches": (_numbers, "batch sizes of a training step"),
    "systems": (_systems, "peers, or 'all'"),
    "least-rounds": (int, "interleaved rounds of each system, at least"),
    "most-rounds": (int, "and at most"),
    "budget": (float, "seconds for the rounds of one group of systems"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("convmixer_fast")
    group.addoption("--preset", choices=sorted(PRESETS), default="quick", help="how much of it all")
    for name, (read, text) in _OVERRIDES.items():
        group.addoption(f"--{name}", type=read, help=f"{text}; default: the preset's")
    group.addoption("--rows", type=Path, help="merge every measured group into this JSON file")
    group.addoption(
        "--resume",
        action="store_true",
        help="skip groups that the file of --rows has from this build of the engine",
    )


def _preset(config: pytest.Config) -> Preset:
    given = {name.replace("-", "_"): config.getoption(f"--{name}") for name in _OVERRIDES}
    preset = PRESETS[config.getoption("--preset")]
    return dataclasses.replace(preset, **{k: v for k, v in given.items() if v is not None})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    preset = _preset(metafunc.config)
    lists: dict[str, tuple[Any, ...]] = {
        "variant": preset.variants,
        "large_variant": preset.large,
        "resolution_variant": preset.resolution,
        "side": preset.sides,
        "resolution_batch": preset.resolution_batches,
        "training_batch": preset.training_batches,
        "batch": preset.batches,
        "block_batch": preset.block_batches,
        "memory_batch": preset.memory_batches,
        "threads": preset.threads,
    }
    for name, values in lists.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The kernels want the allocator set up in a way that whole models should not be measured in.
    items.sort(key=lambda item: item.path.name == "test_kernels.py")


@pytest.fixture(scope="session")
def preset(pytestconfig: pytest.Config) -> Preset:
    return _preset(pytestconfig)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


_RECORDER = pytest.StashKey[Recorder]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDER] = Recorder(config.getoption("--rows"), config.getoption("--resume"))


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Recorder:
    return pytestconfig.stash[_RECORDER]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    recorder = config.stash[_RECORDER]
    if recorder.session is None:
        return
    terminalreporter.section("convmixer_fast beside its peers")
    terminalreporter.write_line(
        report.text(recorder.session, report.tables(recorder.session, unmeasured=False))
    )
    if recorder.path is not None:
        terminalreporter.write_line(f"rows merged into {recorder.path}")
