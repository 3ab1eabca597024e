"""The file from which an interrupted stream continues: one safetensors file, whole or absent.

Tensors are the rows that blocks keep from band to band (``BLOCK-STRIP``) and those of the output
(`outputs`); the metadata hold as JSON under ``run`` what a run must have in common with this one,
and under ``at`` how far it has come. The file is written tensor by tensor, because kept rows may be
larger than the memory (`bands.Spill`), and safetensors' own writer takes all of them at once.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...files import whole_or_absent
from ..bands import BandFlow, bytes_of
from .outputs import State

#: Names of safetensors.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}


class Restorable(Protocol):
    """What a checkpoint holds apart from the kept rows; see `outputs`."""

    def state(self) -> State: ...

    def restore(self, numbers: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> None: ...


class StreamState:
    """The checkpoint of one run.

    Args:
        path: of the file.
        identity: what must be the same for a run to continue from another one's checkpoint.
        rows: rows of pixels between two checkpoints.
        patch: rows of pixels in a row of patches.
    """

    def __init__(self, path: Path, identity: dict[str, Any], rows: int, patch: int) -> None:
        self.path, self._identity, self._rows, self._patch = path, identity, rows, patch
        self._done = 0

    def exists(self) -> bool:
        return self.path.exists()

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            self.path.unlink()

    def offer(self, at: int, flow: BandFlow, parts: Sequence[Restorable]) -> None:
        """Write a checkpoint if it is due; ``at`` rows of patches have passed."""
        if (at - self._done) * self._patch < self._rows:
            return
        numbers: dict[str, Any] = {"row": at, "flow": flow.state()}
        entries = []
        for part in parts:
            own, tensors = part.state()
            numbers |= own
            entries += [_Entry.of(name, tensor) for name, tensor in tensors.items()]
        for key, shape in flow.pieces():
            kept = partial(flow.kept, key, shape)
            entries.append(_Entry(_name(key), flow.blocks.dtype, shape, kept))
        metadata = {"run": json.dumps(self._identity), "at": json.dumps(numbers)}
        with whole_or_absent(self.path, "wb") as file:
            _write(file, metadata, entries)
        self._done = at

    def load(self, flow: BandFlow, parts: Sequence[Restorable]) -> int:
        """Restore everything; returns the row of patches at which to continue.

        Raises:
            ValueError: the file is of another run, of an older version, or no checkpoint.
        """
        if zipfile.is_zipfile(self.path):
            raise ValueError(
                f"{self.path} is a checkpoint of an older version of convmixer_fast, which this "
                "version cannot read: delete it to start again"
            )
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                self._check(json.loads(metadata["run"]))
                numbers = json.loads(metadata["at"])
                flow.restore(numbers["flow"])
                for part in parts:
                    part.restore(numbers, file.get_tensor)
                for key, _ in flow.pieces():
                    flow.put_back(key, file.get_tensor(_name(key)))
                self._done = int(numbers["row"])
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.path} is no checkpoint of a stream: delete it to start again"
            ) from error
        return self._done

    def _check(self, run: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(self._identity))
        for key, value in wanted.items():
            if run.get(key) != value:
                raise ValueError(
                    f"{self.path} is the checkpoint of another run: its {key} was "
                    f"{run.get(key)}, now {value}; delete it to start again"
                )


def _name(key: tuple[int, int]) -> str:
    """The tensor of a block's kept rows in a strip."""
    return f"{key[0]}-{key[1]}"


class _Entry(NamedTuple):
    """A tensor to write; ``get`` makes it when it is due."""

    name: str
    dtype: torch.dtype
    shape: Sequence[int]
    get: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> _Entry:
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def _write(file: IO[bytes], metadata: Mapping[str, str], entries: Sequence[_Entry]) -> None:
    """Write a safetensors file: the header's length in 8 bytes, the header in JSON, the data."""
    # The widest dtype first: each tensor then begins at a multiple of its item size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.bytes
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for entry in entries:
        file.write(bytes_of(entry.get().detach().cpu().contiguous()))
