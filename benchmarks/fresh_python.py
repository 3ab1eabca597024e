"""Start another Python that imports the same package as this process, for tests and benchmarks.

``python -c``, ``-m`` and a script search the current folder for modules first. In a checkout whose
package is installed elsewhere that is the source tree, which need not hold the compiled engine,
while pytest itself imports the installed package. So every new interpreter starts in an empty
folder; PYTHONPATH names the package's folder if the interpreter would not find it.
"""

from __future__ import annotations

import functools
import os
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import convmixer_fast

#: The folder from which this process imported the package.
HOME = Path(convmixer_fast.__file__).resolve().parents[1]


def run(
    *arguments: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of this Python with the arguments; its output is captured as text.

    Args:
        arguments: what follows ``python`` on a command line.
        env: variables on top of this process's.
        timeout: seconds.
        options: for `subprocess.run`.
    """
    return subprocess.run(
        [sys.executable, *arguments],
        **{"capture_output": True, "text": True, "timeout": timeout} | surroundings(env) | options,
    )


def start(
    *arguments: str | os.PathLike[str], env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """`subprocess.Popen` of this Python with the arguments, in text mode; ``env`` as for `run`."""
    return subprocess.Popen(
        [sys.executable, *arguments], **{"text": True} | surroundings(env) | options
    )


def surroundings(env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The ``cwd`` and ``env`` of a process that imports the package which this one imported.

    Also for programs that start Pythons, as Ray does, which passes its folder on to its workers.
    """
    variables = {**os.environ, **(env or {})}
    # An inner pytest must not inherit this run's options: it has its own coverage, and the outer
    # run's workers must not disable its benchmarks.
    for name in [n for n in variables if n == "PYTEST_ADDOPTS" or n.startswith("PYTEST_XDIST_")]:
        del variables[name]
    if not _is_found_anywhere():
        paths = [str(HOME), *filter(None, [variables.get("PYTHONPATH")])]
        variables["PYTHONPATH"] = os.pathsep.join(paths)
    return {"cwd": _empty_folder().name, "env": variables}


@functools.cache
def _is_found_anywhere() -> bool:
    """Whether the package is installed where every Python of this environment looks.

    Such a folder must not be in PYTHONPATH: it would come before the standard library.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += site.getsitepackages() if hasattr(site, "getsitepackages") else []
    return HOME in {Path(f).resolve() for f in [*folders, site.getusersitepackages()]}


@functools.cache
def _empty_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="convmixer_fast-", ignore_cleanup_errors=True)
