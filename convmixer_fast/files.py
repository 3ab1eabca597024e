"""Atomic writes: a name gets a complete file or keeps its old one, and only files are replaced.

`whole_or_absent` is the only way in which this package writes a file for a user. The name may be
that of

* nothing, or a file: the new file is written in the same folder and then renamed;
* a symbolic link: as above for the file that it leads to; the link stays;
* a character device or a pipe (``/dev/null``, ``/dev/stdout``, a shell's ``>(command)``): the
  complete content is written into it;
* a folder, a block device or a socket: an error.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

#: Names of this process's own open files.
_DESCRIPTOR = re.compile(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/([0-9]+)")
#: Seconds to wait for a reader of a named pipe.
PIPE_PATIENCE = 5.0


@contextmanager
def whole_or_absent(path: Path, mode: str = "w", shown: Path | None = None) -> Iterator[IO[Any]]:
    """A file to write, which gets the name ``path`` at the end of a block without an error.

    Its bytes are on the disk before the rename, so that a power cut leaves no partial file. Text is
    UTF-8 with surrogateescape, which preserves file names that are not UTF-8.

    Args:
        shown: the name in errors, where it is not ``path``.

    Raises:
        OSError: see `replacement`.
    """
    with replacement(path, shown) as unfinished, open(unfinished, mode, **_text(mode)) as file:
        yield file


@contextmanager
def replacement(path: Path, shown: Path | None = None) -> Iterator[Path]:
    """As `whole_or_absent`, for writers that take a name: the name to write to.

    Raises:
        OSError: the folder cannot be written, the disk is full, or the name is that of a folder, a
            block device, a socket, or a pipe that nothing reads.
    """
    try:
        if is_special(path):
            with tempfile.TemporaryDirectory() as folder:
                unfinished = Path(folder, path.name)
                yield unfinished
                with open(unfinished, "rb") as whole, open_special(path, "wb") as device:
                    shutil.copyfileobj(whole, device)
            return
        target = _real(path)
        unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            # Creates the file for its permissions, because a writer may replace the file.
            unfinished.open("xb").close()
            if target.exists():
                shutil.copymode(target, unfinished)
            permissions = unfinished.stat().st_mode
            yield unfinished
            unfinished.chmod(permissions)
            with open(unfinished, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, target)
            _sync_folder(target.parent)
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise about_file(error, shown or path) from error


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``; a write that fails keeps the old file.

    Raises:
        OSError: it cannot be written.
    """
    with whole_or_absent(Path(path)) as file:
        file.write(text)


def check_output(path: str | os.PathLike[str]) -> None:
    """Check before the work that `replacement` can write after it; changes nothing.

    A name that ends in ``.zarr`` may be a folder's.

    Raises:
        OSError: see `replacement`.
    """
    path = Path(path)
    if path.suffix != ".zarr" and is_special(path):
        return
    target = _real(path)
    if not target.parent.is_dir():
        reason = f"{os.strerror(errno.ENOENT)}: there is no folder {path.parent}"
        raise FileNotFoundError(errno.ENOENT, reason, str(path))
    if not os.access(target.parent, os.W_OK | os.X_OK):
        reason = f"{os.strerror(errno.EACCES)}: choose a folder that can be written"
        raise PermissionError(errno.EACCES, reason, str(path))


def is_special(path: Path) -> bool:
    """Whether a name is that of a device or a pipe, which can be written and not replaced.

    Raises:
        OSError: it is a folder, a block device or a socket, which can be neither.
    """
    if _DESCRIPTOR.fullmatch(str(path)):
        return True
    try:
        kind = path.stat().st_mode
    except OSError:
        return False
    if stat.S_ISDIR(kind):
        reason = f"{os.strerror(errno.EISDIR)}: it is a folder, name a file in it"
        raise IsADirectoryError(errno.EISDIR, reason, str(path))
    if stat.S_ISBLK(kind) or stat.S_ISSOCK(kind):
        what = "a block device" if stat.S_ISBLK(kind) else "a socket"
        raise OSError(errno.EINVAL, f"it is {what}: name a file", str(path))
    return not stat.S_ISREG(kind)


def replaceable(path: str | os.PathLike[str]) -> Path:
    """The file of a name or a link, existing or not, for content that cannot go into a device.

    Raises:
        OSError: it is a device, a pipe, a folder or a socket, or its folder cannot be written.
    """
    path = Path(path)
    if is_special(path):
        reason = "it is a device or a pipe, which cannot hold this: name a file"
        raise OSError(errno.EINVAL, reason, str(path))
    check_output(path)
    return _real(path)


def open_special(path: Path, mode: str = "w") -> IO[Any]:
    """Open a device or a pipe for writing.

    Raises:
        OSError: it cannot be opened, or it is a pipe that nothing reads.
    """
    if own := _DESCRIPTOR.fullmatch(str(path)):
        # Not reopened: a file that the shell redirects to would be truncated or overwritten.
        number = int(own[2]) if own[2] else {"stdout": 1, "stderr": 2}[own[1]]
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        return open(os.dup(number), mode, **_text(mode))
    deadline = time.monotonic() + PIPE_PATIENCE
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                reason = "it is a device or a pipe that nothing reads: start the reader first"
                raise OSError(errno.ENXIO, reason, str(path)) from error
            time.sleep(0.02)
    os.set_blocking(descriptor, True)
    return open(descriptor, mode, **_text(mode))


def about_file(error: OSError, path: Path) -> OSError:
    """The same error with the name of a file that the user knows."""
    if error.errno is None:  # pyarrow's own
        return OSError(errno.EIO, str(error), str(path))
    return type(error)(error.errno, error.strerror, str(path))


def _text(mode: str) -> dict[str, Any]:
    return {} if "b" in mode else {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}


def _real(path: Path) -> Path:
    """The file that a link leads to, existing or not."""
    return Path(os.path.realpath(path))


def _sync_folder(folder: Path) -> None:
    # A file's new name is data of its folder, which must reach the disk too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # unsupported by some network file systems
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
