"""Is the C++ core clean under sanitizers, and right on other instruction sets?

    python tests/native/run.py plain wide asan tsan aarch64

builds csrc/cpu and the test driver beside this file with ninja, in build/native/MODE, and runs it:

    plain    as the extension is built, for every instruction set that the compiler takes
    wide     AVX-512's panels and tiles for AVX2, in vectors that the compiler splits: for machines
             without AVX-512
    asan     with AddressSanitizer and UndefinedBehaviorSanitizer; fresh memory holds NaN
    tsan     with ThreadSanitizer, on std::thread: OpenMP runtimes are not instrumented
    aarch64  with a cross compiler for NEON, run by qemu-user (natively on an aarch64 machine)

Sources, instruction sets and flags are setup.py's, and so are CXX, CXXFLAGS, LDFLAGS, MAX_JOBS and
CONVMIXER_FAST_WERROR; CXX is the compiler of aarch64 too where that is its target.

Exit status 1: something is wrong. What cannot be had here is skipped with its reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LONGEST = 1200  # seconds of one run; what takes longer hangs
DRIVER = ("main.cpp", "kernels_test.cpp", "threads_test.cpp")
CROSS = "aarch64-linux-gnu"
NATIVE = ("aarch64", "arm64")  # machines that run what CROSS makes
APT_PACKAGES = (f"g++-{CROSS}", "qemu-user")


class Unavailable(Exception):
    """This machine lacks what the mode needs; the message says what."""


class Broken(Exception):
    """The core does not compile, or a test failed; the message says which."""


@dataclass(frozen=True)
class Mode:
    """How the core is built and run in one way."""

    flags: str = ""
    #: More of them, used where the compiler takes them.
    gcc_flags: str = ""
    link: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    #: Problems of `native_test kernels` and of `native_test threads`.
    kernels: int = 400
    threads: int = 100
    cross: bool = False
    #: Instead of setup.py's instruction sets: lanes and flags of those that are built.
    isas: tuple[tuple[str, tuple[int, str]], ...] = ()


# A sanitizer's code makes GCC see uninitialised values where there are none: -Wno-error. Line
# numbers are all that a report needs: -g1, since tracking variables takes longer than compiling.
_SANITIZED = "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all -Wno-error"
# Checks of each access to memory that AddressSanitizer or the processor makes too (a misaligned
# vector instruction faults), at five times the time that the kernels take to compile.
_DOUBLED = "-fno-sanitize=null,alignment,object-size,pointer-overflow,vptr"
# GCC: a call for each check instead of its code, which takes twice as long to compile.
_OUTLINED = "--param asan-instrumentation-with-call-threshold=0"
MODES = {
    "plain": Mode(environment=(("MALLOC_PERTURB_", "128"),)),
    "wide": Mode(
        environment=(("MALLOC_PERTURB_", "128"),),
        isas=(
            ("baseline", (4, "")),
            ("avx2", (16, "-mavx2 -mfma -DCONVMIXER_FAST_WIDE -Wno-psabi")),
        ),
    ),
    "asan": Mode(
        flags=f"{_SANITIZED} -fsanitize=address,undefined {_DOUBLED} -D_GLIBCXX_ASSERTIONS",
        gcc_flags=_OUTLINED,
        link="-fsanitize=address,undefined",
        environment=(
            # 0xFF in all bytes is NaN: memory that is read before it was written shows in results.
            ("ASAN_OPTIONS", "malloc_fill_byte=255:max_malloc_fill_size=1000000000"),
            ("UBSAN_OPTIONS", "print_stacktrace=1"),
        ),
    ),
    "tsan": Mode(
        flags=f"{_SANITIZED} -fsanitize=thread",
        link="-fsanitize=thread",
        environment=(("TSAN_OPTIONS", "halt_on_error=1:second_deadlock_stack=1"),),
        kernels=100,
    ),
    "aarch64": Mode(cross=True, environment=(("MALLOC_PERTURB_", "128"),), kernels=500),
}


@cache
def setup() -> ModuleType:
    """setup.py, which knows how the core is built."""
    spec = importlib.util.spec_from_file_location("convmixer_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def target(compiler: list[str]) -> str:
    """What a compiler makes programs for, such as x86_64-linux-gnu; empty when it does not run."""
    try:
        done = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def apt_install() -> str:
    """Install the cross compiler and the emulator; the reason where that was not possible."""
    if platform.machine() in NATIVE:
        return ""
    if shutil.which(f"{CROSS}-g++") and shutil.which("qemu-aarch64"):
        return ""
    if not shutil.which("apt-get"):
        return "there is no apt-get"
    if os.geteuid() != 0:
        return "not root"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    options = ["install", "-qq", "-y", "--no-install-recommends"]
    for arguments in (["update", "-qq"], [*options, *APT_PACKAGES]):
        done = subprocess.run(
            ["apt-get", *arguments], env=quiet, stdin=subprocess.DEVNULL, capture_output=True
        )
    if done.returncode:
        return f"apt-get: {setup().last_lines(done.stderr.decode(errors='replace'), 'E:')}"
    return ""


@cache
def find_compiler(name: str) -> tuple[list[str], str]:
    """The compiler of a mode, tried on a program of the mode's flags, and those flags.

    Raises:
        Unavailable: there is none, or it lacks the sanitizer's runtime.
    """
    mode = MODES[name]
    candidates = setup().compilers()
    if mode.cross:
        candidates = [c for c in candidates if target(c).startswith("aarch64")]
        if not candidates and shutil.which(f"{CROSS}-g++"):
            candidates = [[f"{CROSS}-g++"]]
        if not candidates:
            raise Unavailable(
                f"no C++ compiler for aarch64: apt-get install {' '.join(APT_PACKAGES)}"
            )
    if not candidates:
        raise Unavailable(setup().NO_COMPILER)
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), str(Path(folder, "probe"))
        source.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
        rest = [*mode.link.split(), "-pthread", str(source), "-o", program]
        flags = f"{mode.flags} {mode.gcc_flags}".strip()
        if mode.gcc_flags and setup().attempt([*candidates[0], *flags.split(), *rest]):
            flags = mode.flags
        refused = setup().attempt([*candidates[0], *flags.split(), *rest])
        if not refused and not mode.cross:
            refused = setup().attempt([program])
    if refused:
        raise Unavailable(f"{shlex.join(candidates[0])} makes no {name} program: {refused}")
    return candidates[0], flags


def emulator(compiler: list[str]) -> list[str]:
    """The command that runs what `compiler` made, before the program's path.

    Raises:
        Unavailable: another machine's program, and no qemu-user.
    """
    if platform.machine() in NATIVE:
        return []
    found = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not found:
        raise Unavailable(f"no qemu-aarch64: apt-get install {APT_PACKAGES[1]}")
    library = subprocess.run(
        [*compiler, "-print-file-name=libc.so.6"], capture_output=True, text=True
    ).stdout.strip()
    return [found, "-L", str(Path(library).resolve().parents[1])]


def build(name: str, folder: Path | None = None) -> Path:
    """Build the driver of a mode, again only what has changed; its path.

    Raises:
        Unavailable: no compiler or no ninja for it.
        Broken: it does not compile.
    """
    mode = MODES[name]
    ninja = setup().find_ninja()
    if not ninja:
        raise Unavailable("no ninja: pip install ninja")
    compiler, flags = find_compiler(name)
    plan = setup().plan_for(compiler, ninja)
    if mode.isas:
        if "avx2" not in plan.isas:
            raise Unavailable(plan.omitted["avx2"])
        plan.isas = dict(mode.isas)
    elif not mode.cross:
        for isa, why in plan.omitted.items():
            print(f"{name}: without {isa}: {why}")
    sources = [s for s in setup().SOURCES if s.startswith("csrc/cpu/")]
    sources += [str((HERE / s).relative_to(ROOT)) for s in DRIVER]
    link = [*mode.link.split(), "-pthread", *(["-ldl"] if sys.platform == "linux" else [])]
    try:
        program: Path = setup().run_ninja(
            plan,
            (folder or ROOT / "build" / "native") / name,
            "native_test",
            "tests",
            sources,
            f"{setup().all_flags()} {flags}",
            link,
        )
    except RuntimeError as error:
        raise Broken(f"{name}: {error}") from None
    return program


def run(name: str, program: Path, seed: int = 1, scale: float = 1.0) -> list[str]:
    """Run a mode's driver on its numbers of problems times `scale`; the lines that it printed.

    Raises:
        Unavailable: this machine cannot run it.
        Broken: a test failed; the message holds the whole report.
    """
    mode = MODES[name]
    prefix = emulator(find_compiler(name)[0]) if mode.cross else []
    lines = []
    for what, problems in (("kernels", mode.kernels), ("threads", mode.threads)):
        number = max(1, round(problems * scale))
        command = [*prefix, str(program), what, "--problems", str(number), "--seed", str(seed)]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **dict(mode.environment)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired:
            raise Broken(
                f"{name}: {shlex.join(command)}: still running after {LONGEST} s"
            ) from None
        if done.returncode:
            report = done.stdout.strip() or "no output"
            raise Broken(f"{name}: {shlex.join(command)}: exit {done.returncode}\n{report}")
        lines.append(f"{name}: {done.stdout.strip()}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modes", nargs="+", choices=MODES, metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--seed", type=int, default=1, help="of the random problems (default: 1)")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many problems")
    parser.add_argument("--folder", type=Path, help="where to build (default: build/native)")
    parser.add_argument("--build-only", action="store_true", help="compile, run nothing")
    parser.add_argument(
        "--install", action="store_true", help="apt-get install what aarch64 needs, where allowed"
    )
    options = parser.parse_args(arguments)
    if options.install and "aarch64" in options.modes:
        refused = apt_install()
        if refused:
            print(f"aarch64: {' and '.join(APT_PACKAGES)} not installed: {refused}")
    failed = False
    for name in options.modes:
        start = time.monotonic()
        try:
            program = build(name, options.folder)
            print(f"{name}: built in {time.monotonic() - start:.0f} s", flush=True)
            if not options.build_only:
                print("\n".join(run(name, program, options.seed, options.scale)), flush=True)
        except Unavailable as why:
            print(f"{name}: SKIPPED: {why}", flush=True)
        except Broken as error:
            print(f"{error}\n{name}: FAILED", flush=True)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
