"""What does an installation get? With a compiler, without one, and from the source archive.

Nothing is downloaded: builds run in a copy of the project, in this environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("ninja")
pytest.importorskip("pybind11")
pytest.importorskip("setuptools", minversion="77")

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(sys.platform == "win32", reason="the extension is not built on Windows"),
]

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build_info.json", "tests"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not run from a source tree")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("build") / "project", ignore=SKIPPED))


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CONVMIXER_FAST_")}
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS", "PYTHONPATH"):
        clean.pop(name, None)
    return subprocess.run(
        command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=540
    )


def build_wheel(project: Path, out: Path, **environment: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-w", str(out), str(project)]
    done = run(*pip, *options, cwd=project, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def contents(wheel: Path) -> tuple[list[str], dict]:
    """The names of a wheel's files, and what the build put on record."""
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read("convmixer_fast/_build_info.json"))
        return archive.namelist(), record


def reason_told_by(wheel: Path, folder: Path) -> str:
    """What the unpacked wheel says about its engine."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    # An editable install in this environment would lend its own extension to the package.
    script = (
        "import sys; "
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in f.__module__]; "
        "from convmixer_fast import _native; "
        "print(_native.why_unavailable(), _native.__file__)"
    )
    done = run(sys.executable, "-c", script, cwd=folder, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout
    return done.stdout


def assert_pure(wheel: Path, folder: Path, reason: str) -> None:
    names, record = contents(wheel)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]
    assert record["built"] is False
    assert reason in record["reason"]
    assert reason in reason_told_by(wheel, folder)


def test_without_a_compiler_the_wheel_is_pure_and_says_why(project: Path, tmp_path: Path) -> None:
    wheel = build_wheel(project, tmp_path / "dist", CXX="/bin/false")
    assert_pure(wheel, tmp_path / "installed", "/bin/false cannot build an extension module")


def test_with_nothing_on_path_the_wheel_is_pure_and_says_why(project: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wheel = build_wheel(project, tmp_path / "dist", PATH=str(tmp_path / "empty"))
    assert_pure(wheel, tmp_path / "installed", "no C++ compiler")


def test_extension_can_be_left_out(project: Path, tmp_path: Path) -> None:
    wheel = build_wheel(project, tmp_path / "dist", CONVMIXER_FAST_CPU="0")
    assert_pure(wheel, tmp_path / "installed", "CONVMIXER_FAST_CPU=0")


def test_extension_can_be_demanded(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    done = run(*command, cwd=project, CXX="/bin/false", CONVMIXER_FAST_CPU="1")
    assert done.returncode != 0
    assert "CONVMIXER_FAST_CPU=1, but the extension was not built: /bin/false" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_failed_compilation_is_recorded(project: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(project, tmp_path / "broken", ignore=SKIPPED))
    with open(broken / "csrc" / "cpu" / "threads.cpp", "a") as source:
        source.write("\n#error the moon is in the wrong house\n")
    # The kernels take long and are not what fails.
    for kernel in broken.glob("csrc/cpu/*_kernel.cpp"):
        kernel.write_text("")
    wheel = build_wheel(broken, tmp_path / "dist")
    names, record = contents(wheel)
    assert not [name for name in names if name.endswith(".so")]
    assert record["built"] is False
    assert "the moon is in the wrong house" in record["reason"]
    assert "the moon is in the wrong house" in reason_told_by(wheel, tmp_path / "installed")


class Compiler:
    """The machine's C++ compiler behind a script that logs its calls and refuses AVX-512."""

    def __init__(self, folder: Path) -> None:
        real = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if real is None:
            pytest.skip("no C++ compiler")
        self.log = folder / "calls.log"
        self.path = folder / "compiler"
        self.path.write_text(
            "#!/bin/sh\n"
            f'echo "$*" >> "{self.log}"\n'
            'case "$*" in *-mavx512f*) echo "error: no AVX-512 in this house" >&2; exit 1;; esac\n'
            f'exec "{real}" "$@"\n'
        )
        self.path.chmod(0o755)

    def compiled(self) -> int:
        """How many sources of the core were compiled so far."""
        return sum("csrc/" in line and " -c " in line for line in self.log.read_text().splitlines())


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return Compiler(tmp_path_factory.mktemp("compiler"))


@pytest.fixture(scope="module")
def wheel(project: Path, compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # -O1 comes after the build's own -O3: a quick build serves here.
    environment = {"CXX": str(compiler.path), "CXXFLAGS": "-O1", "CONVMIXER_FAST_CPU": "1"}
    return build_wheel(project, tmp_path_factory.mktemp("dist"), **environment)


def test_with_a_compiler_the_wheel_holds_the_extension(wheel: Path, tmp_path: Path) -> None:
    names, record = contents(wheel)
    assert "none-any" not in wheel.name
    assert sum(name.startswith("convmixer_fast/_cpu.") for name in names) == 1
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks"))]
    assert {"convmixer_fast/py.typed", "convmixer_fast/_native.py"} <= set(names)
    assert record["built"] is True
    assert record["reason"] == ""
    assert record["compiler"]
    assert "baseline" in record["isas"]
    assert reason_told_by(wheel, tmp_path).startswith(" ")


def test_refused_instruction_set_is_left_out_and_named(wheel: Path) -> None:
    _, record = contents(wheel)
    assert "avx512" not in record["isas"]
    why = record["omitted"]["avx512"]
    assert "no AVX-512 in this house" in why or "not x86-64" in why


def test_second_build_compiles_nothing(
    project: Path, compiler: Compiler, wheel: Path, tmp_path: Path
) -> None:
    before = compiler.compiled()
    assert before > 5
    build_wheel(project, tmp_path, CXX=str(compiler.path), CXXFLAGS="-O1", CONVMIXER_FAST_CPU="1")
    assert compiler.compiled() == before


def test_kernel_objects_share_nothing_with_other_code(project: Path, wheel: Path) -> None:
    """A symbol that the linker may merge would let wide instructions into the other objects."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    objects = list(project.glob("build/**/*_kernel.*.o"))
    assert len(objects) >= 2
    for path in objects:
        listing = run("nm", "--defined-only", "--extern-only", "-P", str(path), cwd=project).stdout
        symbols = [line.split()[0] for line in listing.splitlines()]
        isa = path.name.split(".")[1]
        assert len(symbols) == 1, f"{path.name} exports {symbols}"
        assert isa in symbols[0]
        assert symbols[0].endswith("_kernelsE")


def test_source_archive_holds_what_the_build_needs(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    done = run(*command, cwd=project, CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {str(p.relative_to(project)) for p in (project / "csrc").rglob("*") if p.is_file()}
    assert len(needed) > 10
    assert needed | {"setup.py", "pyproject.toml", "convmixer_fast/_native.py"} <= names
    assert not [n for n in names if n.endswith(".so") or n.endswith("_build_info.json")]
