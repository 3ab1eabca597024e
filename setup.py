"""Build the compiled core with CMake and Ninja from csrc/, and record why an extension is absent.

Two extensions, without torch: `_cpu`, by a C++ compiler, and `_cuda`, by nvcc as well. The other
settings of the distribution are in pyproject.toml. Environment:

    CONVMIXER_FAST_CPU, CONVMIXER_FAST_CUDA
        0: leave that extension out; 1: fail where it cannot be built
        (unset: install without it and record the reason)
    CONVMIXER_FAST_WERROR       1: -Wall -Wextra -Werror
    CONVMIXER_FAST_CUTLASS      the include folder of CUTLASS 3.x, for the Hopper kernels
                                (unset: that of nvidia-cutlass, a build requirement
                                where a list or GPU asks for 9.0a)
    CONVMIXER_FAST_BUILD_CACHE  a folder that keeps the objects of CUDA sources between builds
    TORCH_CUDA_ARCH_LIST        what to compile CUDA kernels for, in torch's words: "8.0;8.6+PTX"
                                (unset: the visible GPUs; without one those of
                                csrc/cuda/toolkit.cmake)
    CUDA_HOME                   where nvcc is, if not on PATH
    CXX, CXXFLAGS, LDFLAGS, NVCC_APPEND_FLAGS, MAX_JOBS as usual

The outcome is printed and kept in convmixer_fast/_build_info.json.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "convmixer_fast"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
#: ptxas reports as information that a kernel waits after every tensor-core instruction.
SERIALISED = re.compile(r"\(C75\d\d\)")


class Unavailable(Exception):
    """An extension cannot be built; the message is the reason."""


def switch(name: str) -> bool | None:
    """A variable that is on, off or absent (None), as convmixer_fast/environment.py reads it."""
    value = os.environ.get(name, "").strip().lower()
    allowed = {"": None, "1": True, "true": True, "yes": True, "on": True}
    allowed |= {"0": False, "false": False, "no": False, "off": False}
    if value not in allowed:
        raise SystemExit(
            f"{name}: unknown switch {value}; use one of {', '.join(filter(None, allowed))}"
        )
    return allowed[value]


def first_error(output: str) -> str:
    """The reason in a failed build's output: CMake's first sentence, the compiler's first error."""
    text = re.search(r"^CMake Error[^\n]*:\n((?:  [^\n]*\n|\n)+)", output, re.MULTILINE)
    said = " ".join(text[1].split()) if text else "compilation failed"
    said = said.partition(". It fails with")[0]
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    error = [line for line in lines if re.search(r"(error|fatal)\s*:", line)]
    error += [line for line in lines if SERIALISED.search(line)]
    return ": ".join([said, *(error or ([] if text else lines[-1:]))[:1]])


def find_tool(name: str, folder: str) -> str:
    """cmake or ninja: that of the package, in its attribute `folder`, else the one on PATH."""
    with contextlib.suppress(ImportError, AttributeError):
        found = shutil.which(name, path=getattr(importlib.import_module(name), folder))
        if found:
            return found
    found = shutil.which(name)
    if not found:
        raise Unavailable(f"{name} is missing from the build environment: pip install {name}")
    return found


class Part:
    """One extension: what CMake found for it (`info`), and why it is absent (`reason`, else "")."""

    def __init__(self, name: str, version: str) -> None:
        self.name = name
        self.variable = f"CONVMIXER_FAST{name.upper()}"
        self.folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / name
        self.module = self.folder / (name + SUFFIX)
        self.info: dict[str, Any] = {}
        self.reason = f"left out: {self.variable}=0" if switch(self.variable) is False else ""
        if not self.reason:
            self.attempt(lambda: self.configure(version))

    def attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Unavailable as why:
            self.reason = str(why)

    def configure(self, version: str) -> None:
        """Let CMake look at the machine, before anything is built."""
        if find_spec("pybind11") is None:
            raise Unavailable(
                "pybind11 is missing from the build environment: pip install pybind11"
            )
        import pybind11

        python = [sysconfig.get_path(kind) for kind in ("include", "platinclude")]
        ninja = find_tool("ninja", "BIN_DIR")
        options = {
            "PART": self.name,
            "VERSION": version,
            "EXTENSION_SUFFIX": SUFFIX,
            "EXTENSION_INCLUDES": ";".join(dict.fromkeys([*python, pybind11.get_include()])),
            "CMAKE_MAKE_PROGRAM": ninja,
        }
        if self.name == "_cuda":
            spec = find_spec("cutlass_library")
            options["CUTLASS_PACKAGE"] = str(Path(spec.origin or "").parent) if spec else ""
        # CMake keeps the tools that it found: with others the folder is made from nothing.
        tools = f"{find_tool('cmake', 'CMAKE_BIN_DIR')}\n{ninja}\n{os.environ.get('CXX')}\n"
        record = self.folder / "tools"
        if not record.is_file() or record.read_text() != tools:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        folders = ["-S", str(ROOT / "csrc"), "-B", str(self.folder)]
        cmake("-GNinja", *folders, *(f"-D{name}={value}" for name, value in options.items()))
        record.write_text(tools)
        self.info = json.loads((self.folder / "info.json").read_text())
        if self.name == "_cpu":  # CMake sorts them by name
            isas = self.info["isas"]
            self.info["isas"] = dict(sorted(isas.items(), key=lambda isa: isa[1]["lanes"]))

    def build(self) -> None:
        """Compile what has changed."""
        jobs = os.environ.get("MAX_JOBS")
        build = ["--build", str(self.folder)]
        told = cmake(*build, *(["--parallel", jobs] if jobs else []))
        if SERIALISED.search(told):
            cmake(*build, "--target", "clean")  # the next build reports it again
            raise Unavailable(first_error(told))

    def report(self) -> None:
        """Print the lines about this extension that end a build."""
        kind = self.name[1:].upper()
        if self.reason:
            print(f"{PACKAGE}: {kind} extension NOT built: {self.reason}")
            return
        targets = self.info.get("isas") or self.info["architectures"]
        print(
            f"{PACKAGE}: {kind} extension built for {', '.join(targets)} by {self.info['compiler']}"
        )
        for name, why in self.info["omitted"].items():
            print(f"{PACKAGE}: without {name}: {why}")


def cmake(*arguments: str) -> str:
    """What CMake prints, printed here too.

    Raises:
        Unavailable: it failed; the message is the first error.
    """
    command = [find_tool("cmake", "CMAKE_BIN_DIR"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="")
    if done.returncode:
        raise Unavailable(first_error(done.stdout))
    return done.stdout


class Core(Distribution):
    """A distribution whose extensions are those that CMake can build here."""

    @cached_property
    def parts(self) -> list[Part]:
        return [Part(name, self.get_version()) for name in ("_cpu", "_cuda")]

    @cached_property
    def can_build(self) -> bool:
        return not all(part.reason for part in self.parts)

    def has_ext_modules(self) -> bool:
        # setuptools asks before and after the build, and expects one answer.
        return self.can_build

    def record(self, folder: Path) -> None:
        """Print what became of both extensions and write it to `folder`/_build_info.json.

        Raises:
            SystemExit: one that its variable demands was not built.
        """
        info: dict[str, Any] = {"version": self.get_version()}
        info |= {"python": platform.python_version(), "platform": sysconfig.get_platform()}
        for part, place in zip(self.parts, (info, info.setdefault("cuda", {})), strict=True):
            place |= {"built": not part.reason, "reason": part.reason}
            place |= {"omitted": part.info.get("omitted", {})} if part.reason else part.info
            part.report()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        for part in self.parts:
            if part.reason and switch(part.variable):
                raise SystemExit(
                    f"{part.variable}=1, but the extension was not built: {part.reason}"
                )


class BuildExtensions(build_ext):
    """CMake instead of setuptools' compiler driver."""

    def run(self) -> None:
        built = []
        for part in self.distribution.parts:
            name = f"{PACKAGE}.{part.name}"
            in_place = self.inplace or self.editable_mode
            target = in_place_module(part) if in_place else Path(self.get_ext_fullpath(name))
            if not part.reason:
                part.attempt(part.build)
            if part.reason:
                target.unlink(missing_ok=True)
            else:
                install_file(part.module, target)
                built.append(name)
        # What a wheel is said to hold.
        self.extensions = [e for e in self.extensions if e.name in built]
        self.distribution.record(target.parent)


class BuildPython(build_py):
    """Where there is no extension to build, the reasons are recorded with the Python files."""

    def run(self) -> None:
        super().run()
        if not self.distribution.has_ext_modules():
            if self.editable_mode:
                for part in self.distribution.parts:
                    in_place_module(part).unlink(missing_ok=True)
            place = ROOT if self.editable_mode else Path(self.build_lib)
            self.distribution.record(place / PACKAGE)


def is_asked_for_requirements() -> bool:
    return "setuptools.build_meta" in sys.modules and "egg_info" in sys.argv


def build_requirements() -> list[str]:
    """nvidia-cutlass, where a list or a visible GPU asks for the kernels of 9.0a.

    Not for the list of architectures that is built without either: the package brings much along.
    """
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not shutil.which("nvidia-smi"):
        return []
    omitted = Part("_cuda", "").info.get("omitted", {})
    return ["nvidia-cutlass"] if "nvidia-cutlass" in omitted.get("wgmma", "") else []


def in_place_module(part: Part) -> Path:
    return ROOT / PACKAGE / part.module.name


def install_file(source: Path, target: Path) -> None:
    """Put a copy at `target` in one step: a process that has the old file mapped keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy(source, scratch)
    os.replace(scratch, target)


# Build frontends run this file as __main__; tests import it.
if __name__ == "__main__":
    setup(
        distclass=Core,
        ext_modules=[Extension(f"{PACKAGE}.{name}", []) for name in ("_cpu", "_cuda")],
        cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython},
        # For the build frontend that asks; else setuptools itself would install them.
        setup_requires=build_requirements() if is_asked_for_requirements() else [],
    )
