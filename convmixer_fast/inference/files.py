"""Result files that neither lose nor repeat a row after a kill, a crash or a full disk.

Rows are collected for some seconds and written as a part: a file in a folder next to the result
(``results.csv.parts``), under another name until it is complete and on the disk. At any moment the
parts hold exactly what was done. At the end they are joined into the result, which gets its name
only when it is complete, and the folder is removed.
"""

from __future__ import annotations

import csv
import errno
import glob
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from ..files import about_file, is_special, open_special, whole_or_absent
from .results import Columns, Failure, Row, Vector

#: In the folder of parts: the settings of the run. Without this file, parts belong to no run.
RUN = "run.json"
_ADOPTS = "goes on with a finished file"
_FAILURE_COLUMNS = ["filename", "error"]


def _sweep(path: Path) -> None:
    """Remove unfinished writes of a file that a kill has left."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        partial.unlink(missing_ok=True)


def _short(score: float) -> float:
    """The float with the shortest text that reads back as the same float32."""
    return float(str(np.float32(score)))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_short(v) for v in value]
    return _short(value) if isinstance(value, float) else value


class Csv:
    """``filename,index,...``; a vector takes a column for each of its numbers, ``prob_0`` on."""

    suffix = part_suffix = "csv"

    @staticmethod
    def header(columns: Columns, rows: Sequence[Row]) -> list[str]:
        if not columns.is_vector:
            return columns.names
        width = len(rows[0].values) if rows and isinstance(rows[0], Vector) else 0
        return ["filename", *(f"{columns.output_type}_{i}" for i in range(width))]

    @staticmethod
    def cells(columns: Columns, row: Row) -> list[str]:
        if isinstance(row, Vector):
            return [row.filename, *map(str, row.values)]
        return [str(np.float32(c)) if isinstance(c, float) else c for c in columns.cells(row)]

    @classmethod
    def write(cls, file: IO[Any], columns: Columns, rows: Sequence[Row]) -> None:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(cls.header(columns, rows))
        writer.writerows(cls.cells(columns, row) for row in rows)

    @staticmethod
    def filenames(path: Path) -> Iterator[str]:
        with _reading(path) as file:
            lines = csv.reader(file)
            next(lines, None)
            yield from (line[0] for line in lines)

    @staticmethod
    def columns(path: Path) -> list[str]:
        with _reading(path) as file:
            return next(csv.reader(file), [])

    @staticmethod
    def join(parts: Sequence[Path], file: IO[Any]) -> None:
        for i, part in enumerate(parts):
            with _reading(part) as source:
                header = source.readline()
                if i == 0:
                    file.write(header)
                shutil.copyfileobj(source, file)


def _reading(path: Path) -> IO[str]:
    return open(path, newline="", encoding="utf-8", errors="surrogateescape")


class JsonLines:
    """A JSON object in each line."""

    suffix = part_suffix = "jsonl"

    @staticmethod
    def text(columns: Columns, row: Row) -> str:
        cells = (_plain(cell) for cell in columns.cells(row))
        return json.dumps(dict(zip(columns.names, cells, strict=True)))

    @classmethod
    def write(cls, file: IO[Any], columns: Columns, rows: Sequence[Row]) -> None:
        file.writelines(cls.text(columns, row) + "\n" for row in rows)

    @staticmethod
    def filenames(path: Path) -> Iterator[str]:
        with _reading(path) as file:
            for line in file:
                yield json.loads(line)["filename"]

    @staticmethod
    def columns(path: Path) -> list[str]:
        with _reading(path) as file:
            return list(json.loads(file.readline() or "{}"))

    @staticmethod
    def join(parts: Sequence[Path], file: IO[Any]) -> None:
        for part in parts:
            with _reading(part) as source:
                shutil.copyfileobj(source, file)


class Json(JsonLines):
    """One list of objects, a line each; the parts are JSON lines."""

    suffix = "json"

    @staticmethod
    def filenames(path: Path) -> Iterator[str]:
        if path.suffix == ".jsonl":
            yield from JsonLines.filenames(path)
        else:
            yield from (row["filename"] for row in json.loads(path.read_text("utf-8")))

    @staticmethod
    def columns(path: Path) -> list[str]:
        return list(next(iter(json.loads(path.read_text("utf-8"))), {}))

    @staticmethod
    def join(parts: Sequence[Path], file: IO[Any]) -> None:
        separator = "[\n"
        for part in parts:
            with _reading(part) as source:
                for line in source:
                    file.write(separator + line.rstrip("\n"))
                    separator = ",\n"
        file.write("\n]\n" if separator == ",\n" else "[]\n")


class Parquet:
    """A table with int64, string and float32 columns; a vector is a list column."""

    suffix = part_suffix = "parquet"

    @staticmethod
    def table(columns: Columns, rows: Sequence[Row]) -> Any:
        pa = pyarrow()
        types = {np.int64: pa.int64(), np.float32: pa.float32(), object: pa.string()}
        fields = [pa.field(name, types[columns.dtype(name)]) for name in columns.names]
        if columns.is_vector:
            fields[1] = pa.field(columns.output_type, pa.list_(pa.float32()))
        cells = list(zip(*(columns.cells(row) for row in rows), strict=True))
        cells = cells or [() for _ in fields]
        names = [storable(name) for name in cells[0]]
        arrays = [
            pa.array(values, field.type)
            for values, field in zip([names, *cells[1:]], fields, strict=True)
        ]
        return pa.table(arrays, schema=pa.schema(fields))

    @classmethod
    def write(cls, file: IO[Any], columns: Columns, rows: Sequence[Row]) -> None:
        pyarrow().parquet.write_table(cls.table(columns, rows), file)

    @staticmethod
    def filenames(path: Path) -> Iterator[str]:
        with pyarrow().parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["filename"]):
                yield from batch.column(0).to_pylist()

    @staticmethod
    def columns(path: Path) -> list[str]:
        return list(pyarrow().parquet.read_schema(path).names)

    @staticmethod
    def join(parts: Sequence[Path], file: IO[Any]) -> None:
        parquet = pyarrow().parquet
        with parquet.ParquetWriter(file, parquet.read_schema(parts[0])) as writer:
            for part in parts:
                with parquet.ParquetFile(part) as source:
                    for batch in source.iter_batches():
                        writer.write_batch(batch)


def pyarrow() -> Any:
    """The library, with its Parquet module.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Parquet needs pyarrow: pip install 'convmixer_fast[infer]', or use another format"
        ) from error
    return pyarrow


def storable(filename: str) -> str:
    """A name as Parquet can hold it: bytes that are not UTF-8 are spelled out (``\\udcff``)."""
    return filename.encode("utf-8", "backslashreplace").decode()


Format = type[Csv] | type[JsonLines] | type[Json] | type[Parquet]
#: By the names that timm's ``--results-format`` takes, and ``jsonl``.
FORMATS: Mapping[str, Format] = {"csv": Csv, "json": Json, "jsonl": JsonLines, "parquet": Parquet}


def format_of(path: Path, name: str | None = None) -> str:
    """The format asked for by name, else by the file's suffix, else CSV."""
    if name is not None:
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}: use one of {', '.join(FORMATS)}")
        return name
    suffix = path.suffix.lower().removeprefix(".")
    return {"pq": "parquet", "ndjson": "jsonl"}.get(suffix, suffix if suffix in FORMATS else "csv")


class ResultFile:
    """A file of predictions that survives a kill of the run; used in a ``with`` block.

    The rows of a run are in ``PATH.parts`` until the block ends without an error; then ``path``
    holds all of them, and a file next to it the images that could not be read (``STEM.errors.csv``,
    columns filename and error; absent if there are none). A block that fails keeps its rows for a
    later run with ``resume``.

    Args:
        path: the result; a device or a pipe is written to directly, in CSV or JSON lines.
        columns: of the rows.
        format: a name in `FORMATS`; default: by the suffix of ``path``, else CSV.
        resume: continue an unfinished run's parts or a finished file. `done` then names the images
            that need not be predicted again.
        overwrite: remove an unfinished run's parts, and replace a finished file at the end.
        settings: other settings that must be the same in a run that continues, kept as JSON.
        errors_file: another name for the file of images that could not be read.
        part_seconds: time between two parts; at least a hundredth of the time that the run has
            taken, so that long runs do not write millions of parts.

    Raises:
        OSError: the folder cannot be written, the disk is full, ``path`` is a folder.
        ValueError: there is a result or an unfinished run, and neither ``resume`` nor ``overwrite``
            is set; the run to continue had other settings; another run is writing here.
        ImportError: Parquet, without pyarrow.
    """

    #: Most rows in memory before the next part.
    MOST_ROWS = 100_000

    def __init__(
        self,
        path: str | os.PathLike[str],
        columns: Columns,
        *,
        format: str | None = None,
        resume: bool = False,
        overwrite: bool = False,
        settings: Mapping[str, Any] | None = None,
        errors_file: str | os.PathLike[str] | None = None,
        part_seconds: float = 5.0,
    ) -> None:
        self.path = Path(path)
        self.columns = columns
        name = format_of(self.path, format)
        self.format = FORMATS[name]
        self.done: set[str] = set()
        #: Those of `done` that are among the errors.
        self.unread: set[str] = set()
        #: Images with and without a result, in this run and those that it continues.
        self.kept = self.failed = 0
        self.parts: Path | None = None
        self.errors_file: Path | None = None
        self._rows: list[Row] = []
        self._failures: list[Failure] = []
        #: Failures of a run whose results go to a device, for ``errors_file`` at the end.
        self._told: list[Failure] = []
        self._part_seconds = part_seconds
        self._start = self._last = time.monotonic()
        self._number = 0
        self._finished: Path | None = None
        self._lock: IO[Any] | None = None
        self._out: IO[Any] | None = None
        if name == "parquet":
            pyarrow()
        if errors_file is not None:
            self.errors_file = Path(errors_file)
            is_special(self.errors_file)  # raises before the work if it cannot be written
        # A device or a pipe cannot be replaced by a file and is written to directly.
        if is_special(self.path):
            if name not in ("csv", "jsonl"):
                raise ValueError(f"{self.path}: a device or a pipe takes csv or jsonl, not {name}")
            self._out = open_special(self.path)
            return
        self._target = Path(os.path.realpath(self.path))
        if self.errors_file is None:
            self.errors_file = self.path.with_name(f"{self.path.stem}.errors.csv")
        self.parts = self._target.with_name(self._target.name + ".parts")
        self._settings = {
            "format": name,
            "columns": columns.names,
            **json.loads(json.dumps(dict(settings or {}))),
        }
        unfinished = (self.parts / RUN).exists()
        if not (resume or overwrite):
            if unfinished:
                raise ValueError(
                    f"{self.parts} holds an unfinished run: --resume goes on with it, "
                    "--overwrite starts anew"
                )
            if self._target.exists():
                raise ValueError(
                    f"{self.path} exists: --resume adds the images that it lacks, --overwrite "
                    "replaces it"
                )
        try:
            self.parts.mkdir(exist_ok=True)
            self._lock = open(self.parts / "lock", "w")  # noqa: SIM115 - closed in __exit__
        except OSError as error:
            # The error names the result, because the user does not know the folder's name.
            raise about_file(error, self.path) from error
        try:
            self._claim()
            _sweep(self._target)
            _sweep(Path(os.path.realpath(self.errors_file)))
            self._begin(unfinished and not overwrite, resume and not overwrite)
        except BaseException:
            self._release()
            raise

    def _claim(self) -> None:
        import fcntl

        assert self._lock is not None
        try:
            # The system releases the lock whenever the process ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing {self.path}: wait, or stop it") from error
        except OSError as error:
            if error.errno != errno.ENOLCK:  # a network file system without locks
                raise

    def _begin(self, unfinished: bool, resume: bool) -> None:
        folder = self._folder
        run = folder / RUN
        adopts = resume and not unfinished and self._target.exists()
        if unfinished:
            before = json.loads(run.read_text("utf-8"))
            differs = [k for k, v in self._settings.items() if before.get(k) != v]
            if differs:
                k = differs[0]
                raise ValueError(
                    f"{folder} holds a run with another {k} ({before.get(k)!r}, now "
                    f"{self._settings[k]!r}): --resume needs the same settings, --overwrite "
                    "starts anew"
                )
            # The run was to continue a finished file and was killed before it adopted the file.
            adopts = before.get(_ADOPTS) and self._target.exists() and not self._written()
        if not unfinished or adopts:
            # These files belong to a run whose result was written or is to be overwritten.
            run.unlink(missing_ok=True)
            for entry in folder.iterdir():
                if entry.name != "lock":
                    entry.unlink()
            with whole_or_absent(run, shown=self.path) as file:
                json.dump({**self._settings, _ADOPTS: adopts}, file, indent=1)
        if adopts:
            self._finished = self._target
            self._check_finished()
        results = [self._target] if adopts else self._written()
        errors = self._written("errors")
        if adopts and self.errors_file and self.errors_file.is_file():
            errors = [self.errors_file]
        for path in results:
            self.done.update(self.format.filenames(path))
        self.kept = len(self.done)
        for path in errors:
            self.unread.update(Csv.filenames(path))
        self.done |= self.unread
        self.failed = len(self.done) - self.kept
        numbers = [int(p.name.split(".")[0].split("-")[1]) for p in folder.glob("part-*")]
        self._number = max(numbers, default=-1) + 1

    def _check_finished(self) -> None:
        found, wanted = self.format.columns(self._target), self.columns.names
        if self.format is Csv and self.columns.is_vector:
            found = [name for name in found if name in ("filename", f"{wanted[1]}_0")]
            wanted = ["filename", f"{wanted[1]}_0"]
        if found and found != wanted:
            raise ValueError(
                f"{self.path} has other columns ({', '.join(found)}): --resume needs the same "
                "settings, --overwrite replaces it"
            )

    @property
    def _folder(self) -> Path:
        assert self.parts is not None
        return self.parts

    def _written(self, kind: str | None = None) -> list[Path]:
        """Parts of results (or of "errors"), in order."""
        return sorted(self._folder.glob(f"part-*.{kind or self.format.part_suffix}"))

    @contextmanager
    def _part(self, kind: str, mode: str, shown: Path | None) -> Iterator[IO[Any]]:
        path = self._folder / f"part-{self._number:08d}.{kind}"
        with whole_or_absent(path, mode, shown) as file:
            yield file
        self._number += 1

    def is_done(self, filename: str) -> bool:
        """Whether there is a result or an error of that image."""
        stored = storable(filename) if self.format is Parquet else filename
        return stored in self.done or filename in self.unread

    def write(self, rows: Iterable[Row], failures: Iterable[Failure] = ()) -> None:
        """Add rows and failures; they are on the disk after the next part."""
        self._rows += rows
        self._failures += failures
        now = time.monotonic()
        patience = max(self._part_seconds, (now - self._start) / 100)
        if self._out or now - self._last >= patience or len(self._rows) >= self.MOST_ROWS:
            self.flush()
            self._last = time.monotonic()

    def flush(self) -> None:
        """Write the rows in memory as a part, now."""
        if self._out is not None:
            try:
                self._write_through(self._out)
            except OSError as error:
                raise about_file(error, self.path) from error
            self._told += self._failures
        elif self._rows or self._failures:
            self._adopt_finished()
            if self._failures:
                with self._part("errors", "w", self.errors_file) as file:
                    _write_failures(file, self._failures)
        self.failed += len(self._failures)
        # Cleared first, so that they are not written twice if writing the rows fails.
        self._failures = []
        if self._rows and self._out is None:
            with self._part(self.format.part_suffix, _mode(self.format), self.path) as file:
                self.format.write(file, self.columns, self._rows)
        self.kept += len(self._rows)
        self._rows = []

    def _write_through(self, out: IO[Any]) -> None:
        rows = self._rows
        if self.format is Csv:
            writer = csv.writer(out, lineterminator="\n")
            if not self.kept and rows:
                writer.writerow(Csv.header(self.columns, rows))
            writer.writerows(Csv.cells(self.columns, row) for row in rows)
        else:
            JsonLines.write(out, self.columns, rows)
        out.flush()

    def _adopt_finished(self) -> None:
        """Make a finished file that gets more rows the first part."""
        if self._finished is None:
            return
        if self.errors_file and self.errors_file.is_file():
            with self._part("errors", "w", self.errors_file) as file:
                Csv.join([self.errors_file], file)
        if self.format is Json:
            rows = json.loads(self._target.read_text("utf-8"))
            with self._part(Json.part_suffix, "w", self.path) as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            part = self._folder / f"part-{self._number:08d}.{self.format.part_suffix}"
            os.replace(self._target, part)
            self._number += 1
        self._finished = None

    def _finish(self) -> None:
        if self._finished is None:
            assert self.errors_file is not None
            errors, parts = self._written("errors"), self._written()
            if errors:
                with whole_or_absent(self.errors_file) as file:
                    Csv.join(errors, file)
            if parts:
                with whole_or_absent(self._target, _mode(self.format), self.path) as file:
                    self.format.join(parts, file)
            if not errors and self.errors_file.is_file():
                # The file is of an earlier run.
                Path(os.path.realpath(self.errors_file)).unlink(missing_ok=True)
        self._remove_parts()

    def _remove_parts(self) -> None:
        # The settings first: without them the folder is litter, should a kill come now.
        (self._folder / RUN).unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._out is not None:
            # After a failed write, an error of closing would hide the first one.
            with suppress(*([OSError] if kind else [])):
                self._out.close()
            if kind is None and self.errors_file and self._told:
                with whole_or_absent(self.errors_file) as file:
                    _write_failures(file, self._told)
            return
        try:
            if kind is None:
                self.flush()
                self._finish()
                return
            # Rows that were computed are kept, unless they cannot be written.
            with suppress(OSError):
                self.flush()
            if not self._written("errors") and not self._written():
                self._remove_parts()
        finally:
            self._release()


def _mode(format: Format) -> str:
    return "wb" if format is Parquet else "w"


def _write_failures(file: IO[Any], failures: Sequence[Failure]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_FAILURE_COLUMNS)
    writer.writerows(failures)
