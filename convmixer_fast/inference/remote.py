"""Images in buckets and other stores that have URLs, by fsspec.

torch depends on fsspec. Most stores need another package (s3fs for s3://, gcsfs for gs://, adlfs
for az://, aiohttp for https://), which also finds credentials: environment variables, configuration
files, the machine's role.
"""

from __future__ import annotations

import errno
import glob
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

#: A local file, or a URL as text, because a `Path` would merge its slashes.
Location: TypeAlias = Path | str

# Two letters at least: a single one is a Windows drive.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


def is_url(name: str | os.PathLike[str]) -> bool:
    """Whether it is of the form ``scheme://...``."""
    return isinstance(name, str) and _SCHEME.match(name) is not None


def located(name: str | os.PathLike[str], root: str | os.PathLike[str] = "") -> Location:
    """A path or a URL, relative to a folder, which may be either."""
    if isinstance(name, str) and is_url(name):
        return name
    if isinstance(root, str) and is_url(root) and not os.path.isabs(name):
        return f"{root.rstrip('/')}/{os.fspath(name)}"
    return Path(root, name)


def folder_name(location: Location) -> str:
    """The name of the folder that contains a file."""
    return os.path.basename(os.path.dirname(location))


def check_stores(locations: list[Location]) -> None:
    """Check before a run that the packages for all stores are installed.

    Raises:
        ImportError: a package is missing; the message says which.
        ValueError: there is no such kind of store.
    """
    schemes: dict[str, str] = {}
    for name in locations:
        if isinstance(name, str) and (match := _SCHEME.match(name)):
            schemes.setdefault(match[1].lower(), name)
    for url in schemes.values():
        _store(url)


def _store(url: str) -> tuple[Any, str]:
    """fsspec's file system, and the file's name in it."""
    try:
        import fsspec.core
    except ImportError as error:
        raise ImportError(f"{url}: URLs need fsspec: pip install fsspec") from error
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        # fsspec's own words: "Install s3fs to access S3".
        raise ImportError(f"{url}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error


def check_regular(path: Path) -> None:
    """Check for a regular file or a link to one: reading a pipe or a device may never end.

    Raises:
        OSError: it is something else, or not there.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    kind = kinds.get(stat.S_IFMT(mode), "something else")
    raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))


def read_regular(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: see `check_regular`; or it cannot be read.
    """
    check_regular(path)
    return path.read_bytes()


def read_url(url: str) -> bytes:
    """The content of a file.

    Raises:
        OSError: it cannot be read; raised for any error of a store's package, with the reason.
        ImportError: see `check_stores`.
    """
    store, name = _store(url)
    with _plain_errors():
        if "file" in _protocols(store):
            return read_regular(Path(name))
        content: bytes = store.cat_file(name)
    return content


def _protocols(store: Any) -> tuple[str, ...]:
    return (store.protocol,) if isinstance(store.protocol, str) else tuple(store.protocol)


def find_urls(url: str) -> Iterator[tuple[str, bool]]:
    """The files of a URL (a file, a folder, a pattern), in no order.

    Args:
        url: of a file; of a folder, with or without a slash at its end; or with ``*``, ``?``,
            ``[..]``, ``**`` for any folders.

    Yields:
        A file, and whether it is taken regardless of its suffix: it is named, or its pattern ends
        in a suffix.

    Raises:
        FileNotFoundError: there is nothing.
        OSError, ImportError: see `read_url`.
    """
    store, name = _store(url)
    with _plain_errors():
        try:
            found = {name: store.info(name)}
            any_file = True
        except FileNotFoundError:
            if not glob.has_magic(name):
                raise
            found = expanded(name, store.exists, lambda p: store.glob(p, detail=True))
            own = os.path.splitext(name)[1]
            any_file = len(own) > 1 and not glob.has_magic(own)
        for file, about in found.items():
            if about["type"] == "directory":
                for inside in store.find(file):
                    yield store.unstrip_protocol(inside), False
            else:
                yield url if file == name else store.unstrip_protocol(file), any_file


def expanded(pattern: str, exists: Callable[[str], bool], find: Callable[[str], Any]) -> Any:
    """The result of ``find`` for a pattern with slashes, in which brackets may be literal.

    From the left, steps that exist verbatim are literal. Brackets in later steps are sets of
    characters (``[0-9]``), or literal if nothing matches otherwise.
    """
    steps = pattern.split("/")
    for i, step in enumerate(steps):
        if glob.has_magic(step):
            if not exists("/".join([*pattern.split("/")[:i], step])):
                break
            steps[i] = glob.escape(step)
    readings = [
        (step, step.replace("[", "[[]")) if "[" in step and at >= i else (step,)
        for at, step in enumerate(steps)
    ]
    found: Any = {}
    for reading in itertools.product(*readings):
        found = find("/".join(reading))
        if found:
            break
    return found


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn the errors of a store's package (lost connection, credentials) into OSError."""
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        if error.strerror is not None:
            raise
        # fsspec puts the name alone into these two, where the reason should be.
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "no such file or folder") from error
        if isinstance(error, PermissionError):
            raise PermissionError(errno.EACCES, "permission denied") from error
        raise OSError(errno.EIO, _line(error)) from error
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
