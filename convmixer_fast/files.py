"""How does a file take its place whole or not at all?"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def whole_or_absent(path: Path, mode: str = "w", shown: Path | None = None) -> Iterator[IO[Any]]:
    """A file to write that takes the name ``path`` at the end of the block, if nothing failed.

    By then its bytes are on the disk, so that not even a power cut leaves half of it. Text is
    UTF-8, and carries file names that are not.

    Args:
        shown: the name that the user knows, for errors.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    text: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    try:
        with open(partial, mode, **({} if "b" in mode else text)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise about_file(error, shown or path) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``; a write that fails leaves what was there before.

    A device or a pipe, which no file can replace, is written to.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        target.write_text(text, encoding="utf-8")
        return
    with whole_or_absent(target, shown=Path(path)) as file:
        file.write(text)


def about_file(error: OSError, path: Path) -> OSError:
    """The same error, of a file that the user knows."""
    if error.errno is None:  # pyarrow's own
        return OSError(errno.EIO, str(error), str(path))
    return type(error)(error.errno, error.strerror, str(path))


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
