"""Atomic writes: a file takes its place whole or not at all, and nothing but a file is replaced.

`whole_or_absent` is the one way in which this package writes a file for a user. By what stands
under the name:

* nothing, or a file: the new file is written beside it and then takes its place;
* a symbolic link: the same for the file that it leads to; the link stays;
* a character device or a pipe (``/dev/null``, ``/dev/stdout``, a shell's ``>(command)``): the whole
  content is written into it;
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
    """A file to write that takes the name ``path`` at the end of the block, if nothing failed.

    By then its bytes are on the disk, so that not even a power cut leaves half of it. Text is
    UTF-8, and carries file names that are not.

    Args:
        shown: the name that the user knows, for errors.

    Raises:
        OSError: see `replacement`.
    """
    with replacement(path, shown) as unfinished, open(unfinished, mode, **_text(mode)) as file:
        yield file


@contextmanager
def replacement(path: Path, shown: Path | None = None) -> Iterator[Path]:
    """As `whole_or_absent`, for what writes to a file's name: the name to write to.

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
            # For the permissions of a new file: a writer may put a file of its own there.
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
    """Write ``text`` (UTF-8) to ``path``; a write that fails leaves what was there before.

    Raises:
        OSError: it cannot be written.
    """
    with whole_or_absent(Path(path)) as file:
        file.write(text)


def check_output(path: str | os.PathLike[str]) -> None:
    """Find out before the work what `replacement` would find out after it; changes nothing.

    A name in ``.zarr`` is that of a folder.

    Raises:
        OSError: as there.
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
    """Whether a name is that of a device or a pipe, which can be written but not replaced.

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
    """The file that a name or a link leads to, there or not, for what cannot go into a device.

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
        # Not opened again: a file that the shell made of it would be cut, or written twice over.
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
    """The same error, of a file that the user knows."""
    if error.errno is None:  # pyarrow's own
        return OSError(errno.EIO, str(error), str(path))
    return type(error)(error.errno, error.strerror, str(path))


def _text(mode: str) -> dict[str, Any]:
    return {} if "b" in mode else {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}


def _real(path: Path) -> Path:
    """The file that a link leads to, there or not."""
    return Path(os.path.realpath(path))


def _sync_folder(folder: Path) -> None:
    # A file's new name is kept in its folder, which has to reach the disk too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
