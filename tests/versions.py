"""Run the tests on other versions of torch and Python.

    python tests/versions.py  # torch 2.11 on this Python, as CI does
    python tests/versions.py 2.8 2.9:3.12  # torch 2.8 on this Python, torch 2.9 on Python 3.12
    python tests/versions.py --record all  # every pair of the table in docs/reference/support.md

Each version gets a virtual environment of about 7 GB. At most one exists at a time: the next one
replaces it, and the last one is removed unless ``--keep`` is given. The package is built once per
Python, because its compiled engine links no torch. Environments, wheels and logs are in
``--cache``.

``--record`` writes one entry a version into tests/versions.json, at once after its tests. A version
whose entry is of the same sources is not run again, so that an interrupted run continues where it
stopped. ``python benchmarks/report.py --readme`` puts the
entries into docs/reference/support.md.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "tests" / "versions.json"

#: Run on every version: drop-in modules, foreign models, operators, checkpoints, the engine and,
#: with a fake GPU, the GPU path. "folder/name" is tests/folder/test_name.py, "folder/" a folder.
FILES = (
    *("ops/", "modules/", "compat/", "checkpoint/", "project/import"),
    *("backends/native", "backends/gpu_path", "backends/cuda_path", "backends/self_check"),
    *("backends/kernels_after_product", "backends/bound_launches"),
)

#: torch x Python of the table in docs/reference/support.md.
TORCHES = tuple(f"2.{minor}" for minor in range(8, 15))
PAIRS = (
    *((torch, "3.11") for torch in TORCHES),
    *(("2.8", "3.10"), ("2.11", "3.10")),
    *(("2.11", "3.12"), ("2.14", "3.12")),
    *(("2.11", "3.13"), ("2.14", "3.13")),
)

#: What the tests need besides torch. Triton 3.4, that of torch 2.8, cannot interpret kernels with
#: NumPy 2.4.
REQUIREMENTS = (
    *("numpy<2.4", "safetensors", "pillow", "tqdm", "timm"),
    *("pytest", "pytest-xdist", "hypothesis"),
)

#: Python's minor version here.
THIS = "{}.{}".format(*sys.version_info)

#: Printed by an environment about itself.
_VERSIONS = """
import importlib.metadata as metadata, json, platform
found = {"python": platform.python_version()}
for name in ("torch", "triton", "numpy"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = ""
print(json.dumps(found))
"""


class NotRun(Exception):
    """A version whose tests cannot run; ``lasting`` if another attempt has the same end."""

    def __init__(self, reason: str, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


@dataclass(frozen=True)
class Pair:
    """Minor versions of torch and Python."""

    torch: str
    python: str

    def __str__(self) -> str:
        return f"{self.torch}:{self.python}"

    def requirements(self) -> list[str]:
        """What is installed. timm needs torchvision, whose 0.N is made for torch 2.(N - 15)."""
        major, minor = map(int, self.torch.split("."))
        vision = [f"torchvision==0.{minor + 15}.*"] if major == 2 else []
        return [f"torch=={self.torch}.*", *vision, *REQUIREMENTS]


def parse(text: str) -> Pair:
    """A pair from ``TORCH`` or ``TORCH:PYTHON``, such as ``2.11`` or ``2.8:3.13``.

    Raises:
        ArgumentTypeError: the text is neither.
    """
    found = re.fullmatch(r"(\d+\.\d+)(?::(\d+\.\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"version {text!r}: use TORCH or TORCH:PYTHON, as in 2.11 or 2.8:3.13, or 'all'"
        )
    return Pair(found[1], found[2] or THIS)


def interpreter(minor: str) -> str:
    """The path of a Python of this minor version: this one, on the PATH, or pyenv's.

    Raises:
        NotRun: there is none.
    """
    if minor == THIS:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for place in (shutil.which(f"python{minor}"), *sorted(pyenv.glob(f"{minor}.*/bin/python3"))):
        # A pyenv shim of a version that is not active fails.
        if place and not subprocess.run([place, "-c", ""], capture_output=True).returncode:
            return str(place)
    raise NotRun(f"there is no Python {minor} on this machine")


def path_of(name: str) -> Path:
    """The test file or the folder of tests that an entry of `FILES` names."""
    folder, _, test = name.rpartition("/")
    return ROOT / "tests" / folder / (f"test_{test}.py" if test else "")


def sources() -> list[Path]:
    """Every tracked file that the tests' results depend on."""
    wanted = ("convmixer_fast", "csrc", "tests", "setup.py", "pyproject.toml", "README.md")
    shared = ("tools/ptxsim", "benchmarks/fresh_python.py", "benchmarks/photographs.py")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *wanted, *shared, "LICENSE", "MANIFEST.in"],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": True},
    ).stdout
    found = {ROOT / name for name in listed.split("\0") if name} - {RECORDS}
    return sorted(path for path in found if path.is_file())


def digest(paths: Iterable[Path]) -> str:
    """Names and contents of files as 16 hexadecimal digits."""
    told = hashlib.sha256()
    for path in paths:
        told.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return told.hexdigest()[:16]


def call(
    command: Sequence[str | Path],
    log: Path,
    timeout: float,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a command with its output in a log; the output.

    Without PYTHONPATH and PYTEST_ADDOPTS: the package, the options and the plugins are those of the
    environment.

    Raises:
        NotRun: it failed or took longer than ``timeout`` seconds.
    """
    variables = {**os.environ, **(env or {})}
    for name in ("PYTHONPATH", "PYTEST_ADDOPTS"):
        variables.pop(name, None)
    with log.open("w") as out:
        # A session of its own: what the command started ends with it.
        running = subprocess.Popen(
            [*map(str, command)],
            **{"stdout": out, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL},
            **{"start_new_session": True, "cwd": cwd, "env": variables},
        )
        try:
            status = running.wait(timeout)
        except BaseException as error:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise NotRun(f"no end after {timeout / 60:.0f} minutes: see {log}") from None
            raise
    if status:
        raise NotRun(f"exit status {status}: see {log}")
    return log.read_text()


class Runner:
    """Environments, wheels and logs under one cache folder."""

    def __init__(self, cache: Path, jobs: str, minutes: float, wheel: Path | None) -> None:
        self.cache = cache
        self.jobs = jobs
        self.minutes = minutes
        self.sources = digest(sources())
        self.wheels = {THIS: wheel} if wheel else {}
        (cache / "logs").mkdir(parents=True, exist_ok=True)

    def log(self, pair: Pair, step: str) -> Path:
        return self.cache / "logs" / f"torch-{pair.torch}-python-{pair.python}-{step}.log"

    def environment(self, pair: Pair) -> Path:
        """A virtual environment with this torch; the one that was there is removed.

        Raises:
            NotRun: the Python or the torch is not to be had, or fits no torchvision.
        """
        base = interpreter(pair.python)
        wanted = pair.requirements()
        told = subprocess.run([base, "-VV"], capture_output=True, text=True, check=True).stdout
        key = hashlib.sha256(json.dumps([told, wanted]).encode()).hexdigest()[:16]
        place = self.cache / f"torch-{pair.torch}-{pair.python}-{key}"
        if (place / "complete").exists():
            return place
        self.clear()
        call([base, "-m", "venv", place], self.log(pair, "venv"), 600)
        log = self.log(pair, "install")
        install = ["-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        try:
            call([place / "bin/python", *install, *wanted], log, 3600)
        except NotRun:
            shutil.rmtree(place)
            # Anything else, as a network's failure, says nothing about the version.
            if f"No matching distribution found for torch=={pair.torch}" in log.read_text():
                reason = f"pip finds no torch {pair.torch} for Python {pair.python}"
                raise NotRun(reason, lasting=True) from None
            raise
        log = self.log(pair, "torchvision")
        try:
            call([place / "bin/python", "-c", "import torchvision"], log, 600)
        except NotRun:
            shutil.rmtree(place)
            reason = f"the torch {pair.torch} that pip finds does not fit its torchvision"
            raise NotRun(reason, lasting=True) from None
        (place / "complete").touch()
        return place

    def clear(self) -> None:
        """Remove the environments."""
        for place in self.cache.glob("torch-*"):
            shutil.rmtree(place)

    def wheel(self, pair: Pair, environment: Path) -> Path:
        """The package built for a Python from the tracked files, without the CUDA extension."""
        if pair.python in self.wheels:
            return self.wheels[pair.python]
        out = self.cache / "wheels" / f"{self.sources}-{pair.python}"
        if not list(out.glob("*.whl")):
            for old in (self.cache / "wheels").glob(f"*-{pair.python}"):
                shutil.rmtree(old)
            # From a copy: a build leaves its folders in the tree.
            copy = self.cache / "source"
            shutil.rmtree(copy, ignore_errors=True)
            for path in sources():
                target = copy / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            build = ["-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, copy]
            call(
                [environment / "bin/python", *build],
                *(self.log(pair, "build"), 3600),
                env={"CONVMIXER_FAST_CUDA": "0", "CONVMIXER_FAST_CPU": "1"},
            )
            shutil.rmtree(copy)
        (self.wheels[pair.python],) = out.glob("*.whl")
        return self.wheels[pair.python]

    def run(self, pair: Pair, files: Sequence[str]) -> dict[str, Any]:
        """Versions and results of the tests on one pair.

        Raises:
            NotRun: there are no results.
        """
        environment = self.environment(pair)
        python = environment / "bin/python"
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        install += ["--disable-pip-version-check", "--force-reinstall"]
        call([python, *install, self.wheel(pair, environment)], self.log(pair, "package"), 600)
        # An empty folder: the package of the checkout is not the one that is imported.
        scratch = self.cache / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        where = "import convmixer_fast; print(convmixer_fast.__file__)"
        found = call([python, "-c", where], self.log(pair, "import"), 300, cwd=scratch)
        if not Path(found.split("\n")[-2]).is_relative_to(environment):
            raise NotRun(f"imported {found.strip()}, not the wheel's")
        told = json.loads(call([python, "-c", _VERSIONS], self.log(pair, "versions"), 300))
        report = scratch / "report.xml"
        # Workers, so that a crash of the interpreter fails one test.
        options = ["-q", "-p", "no:cacheprovider", "-n", self.jobs, "--dist", "loadfile"]
        options += ["--durations=10", f"--junitxml={report}", f"--rootdir={ROOT}"]
        tests = [str(path_of(name)) for name in files]
        log = self.log(pair, "tests")
        try:
            call([python, "-m", "pytest", *options, *tests], log, 60 * self.minutes, cwd=scratch)
        except NotRun:
            if not report.exists():
                raise
        told |= counted(report)
        shutil.rmtree(scratch)
        return {**told, "date": datetime.date.today().isoformat(), "sources": self.sources}


def counted(report: Path) -> dict[str, Any]:
    """passed, failed, skipped and the names of what failed, from pytest's JUnit file."""
    # A test has an entry more for its teardown, if that fails.
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}".removeprefix("::")
        name = name.removeprefix("tests.")
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes[name] = "failed"
        elif outcomes.get(name) != "failed":
            outcomes[name] = "skipped" if case.find("skipped") is not None else "passed"
    counts = {key: [*outcomes.values()].count(key) for key in ("passed", "failed", "skipped")}
    return {
        **counts,
        "failures": sorted(n for n, outcome in outcomes.items() if outcome == "failed"),
    }


def load() -> dict[str, dict[str, Any]]:
    """The entries of tests/versions.json by ``TORCH:PYTHON``."""
    if not RECORDS.exists():
        return {}
    entries: dict[str, dict[str, Any]] = json.loads(RECORDS.read_text())
    return entries


def record(pair: Pair, entry: dict[str, Any]) -> None:
    """Put an entry into tests/versions.json."""
    entries = load() | {str(pair): entry}
    ordered = sorted(entries, key=lambda key: [int(part) for part in re.split("[.:]", key)])
    scratch = RECORDS.with_suffix(".new")
    scratch.write_text(json.dumps({key: entries[key] for key in ordered}, indent=2) + "\n")
    os.replace(scratch, RECORDS)


def line(pair: Pair, entry: dict[str, Any]) -> str:
    """What is printed of an entry."""
    if "reason" in entry:
        return f"{pair}: not run: {entry['reason']}"
    counts = ", ".join(f"{entry[key]} {key}" for key in ("passed", "failed", "skipped"))
    triton = entry["triton"] or "none"
    return f"{pair}: {counts} (torch {entry['torch']}, Triton {triton}, Python {entry['python']})"


def main(arguments: Sequence[str] | None = None) -> int:
    default = os.environ.get("CONVMIXER_FAST_CI_CACHE")
    if not default:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        default = str(caches / "convmixer_fast-ci")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("versions", nargs="*", help="TORCH, TORCH:PYTHON or 'all' (default: 2.11)")
    add("--record", action="store_true", help="write tests/versions.json")
    add("--again", action="store_true", help="with --record: also what is recorded already")
    add("--files", help=f"names of test files by commas (default: {','.join(FILES)})")
    add("--keep", action="store_true", help="leave the last environment for the next run")
    add("--wheel", type=Path, help="the package, built for this Python (default: it is built)")
    add("--jobs", default="auto", help="processes that run tests (default: one a processor)")
    add("--minutes", type=float, default=60, help="limit of the tests of a version (default: 60)")
    add("--cache", type=Path, default=Path(default), help="folder (default: CI's, %(default)s)")
    options = parser.parse_args(arguments)
    if options.record and options.files:
        parser.error("--record runs all files: leave out --files")
    try:
        pairs = [
            pair
            for text in options.versions or ["2.11"]
            for pair in ([Pair(*p) for p in PAIRS] if text == "all" else [parse(text)])
        ]
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    files = options.files.split(",") if options.files else FILES
    wheel = options.wheel.resolve() if options.wheel else None
    runner = Runner(options.cache.resolve(), options.jobs, options.minutes, wheel)
    failed = False
    for pair in dict.fromkeys(pairs):
        entry = load().get(str(pair), {}) if options.record and not options.again else {}
        known = entry.get("sources") == runner.sources
        if not known:
            try:
                entry = runner.run(pair, files)
            except NotRun as error:
                entry = {"reason": str(error)}
                entry |= {"date": datetime.date.today().isoformat(), "sources": runner.sources}
                failed |= not error.lasting
                known = not error.lasting
        if options.record and not known:
            record(pair, entry)
        failed |= bool(entry.get("failed"))
        print(line(pair, entry), *entry.get("failures", ()), sep="\n    ", flush=True)
    if not options.keep:
        runner.clear()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
