"""`Predictor`: a model with its preprocessing and device, called on images of any kind."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from ..modules.for_inference import is_promised, optimize_for_inference
from ..modules.model import ConvMixer
from ..ops import use_backend
from ..ops.recording import recording
from .ambient import autocast
from .batches import Prepare, Prepared, image_batches, in_one_piece, load_image
from .heatmap import Heatmap, HeatmapFolder, check_mean_pooling, check_target, heatmap_of
from .labels import class_labels, labels_for
from .pictures import Picture, as_pixels, batch_of, has_pixels, is_one
from .preprocessing import NativeSize, preprocessing_for
from .remote import located
from .results import Columns, Failure, Row, rows_of
from .separable import check_eval, reason_called_otherwise, reason_not_separable
from .sources import Source, open_source
from .streaming import Pixels, StreamStats, reason_not_streamable, stream, whole_image_bytes

#: What ``batch_size="auto"`` starts from, by the device's type. On a CPU the time of an image
#: hardly depends on it.
AUTO_BATCH = {"cpu": 32, "cuda": 256}
#: The same for images of any size, which are large.
AUTO_BATCH_NATIVE = {"cpu": 2, "cuda": 8}
#: Bytes that the pass of one image may take (`whole_image_bytes`), by the device's type; a larger
#: one is streamed. The same on every machine: the last bits of an answer may depend on it.
MAX_MEMORY = {"cpu": 2**30, "cuda": 2**33}

#: In the messages of PyTorch's errors where memory is short and the error's type does not say it.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")

Arrays: TypeAlias = "dict[str, npt.NDArray[Any]]"


class Outcome(NamedTuple):
    """The result of some files: a row or a failure for each."""

    rows: list[Row]
    failures: list[Failure]
    #: Seconds for which the model had to wait for these images.
    waited: float


class Predictor:
    """A model with preprocessing, labels and device, called on images of any kind.

    The form of ``predictor(x)`` follows that of ``x``:

    * a path, a PIL image, or an array or tensor of 2 or 3 axes: one `Prediction` (file name, class
      indices, labels, scores), or one vector (D,) if ``topk`` is None or embeddings are
      requested;
    * a list of these, or an array or tensor of 4 axes: a list of them, or an array (N, D);
    * a dict of arrays, as Ray Data and Hugging Face datasets hand out: a dict with the columns of
      `Columns` (``index_0``, ``label_0``, ``prob_0``...) and all that came in except the pixels.
      Images are those of ``"image"``, whose first axis, or list, is of images whatever its shape,
      else the files that ``"path"`` (or ``"filename"``) names.

    Arrays and tensors are uint8, as a decoder gives them: (H, W), (H, W, C) or (C, H, W), batches
    with N before. The axis of 1 to 4 values (grey, grey with transparency, colours, colours with
    transparency) is that of the channels; where the first and the last one are so short, it is the
    last one of an array, as in Pillow, and the first one of a tensor, as in torchvision. Images
    that are prepared already, in floating point, are for `scores`.

    Images of different shapes may come together. One that takes more than ``max_memory``, with its
    maps, goes through a `ConvMixer` by `stream`, as does one that alone is too large for the
    device: no padding, resizing or cutting is needed. Its scores are the whole image's within 2e-6
    of the largest (float32; `stream` names the reasons), and its heatmap has cells of many patches.
    Files are decoded as a whole; arrays that are memory maps stay in their files.

    A batch that does not fit into memory is halved until it does, with a warning at the first time.
    On a CPU the answer of a `ConvMixer` for an image does not depend on the others, to the last
    bit. Objects can be pickled, and copied to other processes and machines: the weights travel with
    them.

    The model may change later: every call checks it again. Scores are those of ``model(x)``
    whatever its hooks, a forward of its own or replaced children do; such a model is called as
    a whole and not streamed. A call while it is in training mode raises: its mode is the caller's
    to change. Autocast around a call has no effect; see ``amp_dtype``.

    Args:
        model: any module (N, C, H, W) -> (N, num_classes), or a checkpoint's file name in any
            published format. It is put, itself, into eval mode, onto the device and to the dtype.
        preprocessing: a `Preprocessing`, ``"native"`` for images as large as they are, or any
            callable from a PIL image to a float32 tensor (C, H, W) with an attribute ``channels``;
            default: that of the model's ``pretrained_cfg``, which comes with a checkpoint that
            `save_checkpoint` wrote, else the published recipe, with a warning.
        device: default: cuda where there is one, else cpu; in another process, that process's.
        dtype: of the weights and the computation, as torch's or by name; default: the model's own.
        amp_dtype: run under autocast with this dtype instead.
        channels_last: give the model NHWC memory.
        batch_size: images at once, at most; "auto" for `AUTO_BATCH`.
        max_memory: bytes that the image and its maps may take, else it is streamed within them;
            default: `MAX_MEMORY`. Streaming under autocast is not done.
        topk: classes in a `Prediction`; None for the scores of all.
        output_type: "prob", "logit", or "embedding" (pooled features, before the classifier:
            ``model.forward_head(model.forward_features(x), pre_logits=True)``, as in timm).
        labels: class names, one for each output; default: those that came with the checkpoint,
            else ImageNet's for 1000 classes where timm or torchvision is installed, else the
            indices.
        act: the activation, for checkpoints that do not tell; see `ConvMixer.from_checkpoint`.
        backend: see `use_backend`.

    Raises:
        ValueError: a setting makes no sense for this model, or the model's output is not finite;
            (of calls) the model is in training mode, or embeddings or heatmaps are asked for and
            the model's call is more than its parts.
        CheckpointError: the file cannot be read.
        ImageError: (of calls) an image cannot be read; see `predict_files` for going on without.
        MemoryError: (of calls) not even one image fits into memory.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        *,
        preprocessing: Prepare | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        amp_dtype: torch.dtype | str | None = None,
        channels_last: bool = False,
        batch_size: int | str = "auto",
        max_memory: int | None = None,
        topk: int | None = 5,
        output_type: str = "prob",
        labels: Sequence[str] | None = None,
        act: str | None = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            model = ConvMixer.from_checkpoint(model, act, device="cpu", dtype=torch.float32)
            optimize_for_inference(model)
        elif act is not None:
            raise ValueError("act is for checkpoints: a model has its activation")
        if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size must be at least 1, or 'auto', got {batch_size!r}")
        if max_memory is not None and max_memory < 1:
            raise ValueError(f"max_memory must be at least 1 byte, got {max_memory}")
        if isinstance(preprocessing, str):
            if preprocessing != "native":
                raise ValueError(
                    f"preprocessing {preprocessing!r} is unknown: pass 'native', or an object "
                    "that makes tensors of images"
                )
            preprocessing = preprocessing_for(model, native=True)
        self.preprocessing: Prepare = preprocessing or preprocessing_for(model)
        classes = getattr(model, "num_classes", None)
        if output_type == "embedding":
            if not hasattr(model, "forward_head"):
                raise ValueError(
                    f"a {type(model).__name__} has no forward_head, from which embeddings come"
                )
        elif classes == 0:
            raise ValueError("the model has no classifier: ask for output_type='embedding'")
        if topk is not None and classes:
            topk = min(topk, classes)
        self.columns = Columns(output_type, topk)
        self.labels = None if labels is None else list(labels)
        if self.labels is not None and classes not in (None, len(self.labels)):
            raise ValueError(f"{len(self.labels)} labels for a model of {classes} classes")
        if self.labels is None and classes:
            self.labels = labels_for(model)
        self.batch_size = batch_size
        self.backend = backend
        #: Backends that have run the model's blocks so far ("cpu", "reference"...).
        self.kernels: set[str] = set()
        self._device, self._max_memory = device, max_memory
        self._dtype, self._amp = _dtype(dtype), _dtype(amp_dtype)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.eval()
        self._settle()

    def _settle(self) -> None:
        """Move the model to the device, dtype and layout of this process."""
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(self._device or default)
        promised = is_promised(self.model)
        self.model.to(device=self.device, dtype=self._dtype).to(memory_format=self._layout)
        if promised:
            optimize_for_inference(self.model)
        native = isinstance(self.preprocessing, NativeSize)
        known = AUTO_BATCH_NATIVE if native else AUTO_BATCH
        size = self.batch_size
        self._most = size if isinstance(size, int) else known.get(self.device.type, known["cpu"])
        self._told = False
        self._memory = self._max_memory or MAX_MEMORY.get(self.device.type, MAX_MEMORY["cpu"])

    def _reason_not_streamed(self) -> str:
        """Why an image that is too large cannot be streamed; ``""`` if it can be."""
        if self._amp is not None:
            # Autocast chooses dtypes by operator, and a stream runs other operators.
            return "the model runs under autocast"
        output = "embedding" if self.columns.output_type == "embedding" else "logits"
        return reason_not_streamable(self.model, output)

    def _is_large(self, height: int, width: int) -> bool:
        if whole_image_bytes(self.model, height, width) <= self._memory:
            return False
        return not self._reason_not_streamed()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.device.type != "cpu":
            # A machine without this device can still unpickle it.
            import copy

            state["model"] = copy.deepcopy(self.model).cpu()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._settle()

    @property
    def images_at_once(self) -> int:
        """The batch size: as requested, or as found to fit into memory."""
        return self._most

    # Computing

    def scores(self, images: Tensor | Sequence[Prepared]) -> Tensor:
        """(N, C, H, W), or N tensors (C, H, W) of any shapes -> (N, D) float32 on the CPU.

        Also of a `Source`, which is streamed.

        D is the number of classes (logits), or of features for embeddings.
        """
        return self._answers(images)[0]

    def _answers(
        self, images: Tensor | Sequence[Prepared], heatmaps: HeatmapFolder | None = None
    ) -> tuple[Tensor, list[Heatmap]]:
        """`scores`, and a heatmap of each image (N = 1) if ``heatmaps`` is given."""
        if not len(images):
            return torch.zeros(0, 0, dtype=torch.float32, device="cpu"), []
        check_eval(self.model)
        if heatmaps is not None:
            self.check_heatmaps(heatmaps.target)
        if self.columns.output_type == "embedding":
            reason = reason_called_otherwise(self.model)
            if reason:
                raise ValueError(
                    f"{reason}, which embeddings (forward_features, then forward_head) would "
                    "leave out: ask for output_type='logit'"
                )
        groups: dict[torch.Size, list[int]] = {}
        tensors: dict[int, Tensor] = {}
        found: dict[int, Tensor] = {}
        maps: dict[int, Heatmap] = {}

        def flow(i: int) -> None:
            found[i], drawn = self._stream(images[i], heatmaps)
            maps.update((i, heatmap) for heatmap in drawn)

        for i, image in enumerate(images):
            if isinstance(image, Source) or self._is_large(*image.shape[1:]):
                flow(i)
            else:
                tensors[i] = image
                groups.setdefault(image.shape, []).append(i)
        for members in groups.values():
            start = 0
            while start < len(members):
                some = members[start : start + self._most]
                try:
                    out, drawn = self._run([tensors[i] for i in some], heatmaps)
                except Exception as error:
                    if not _is_out_of_memory(error):
                        raise
                    out = None
                if out is None:
                    if self._back_off(len(some), tuple(tensors[some[0]].shape)):
                        flow(some[0])
                        start += 1
                    continue
                found.update(zip(some, out, strict=True))
                maps.update(zip(some, drawn, strict=False))
                start += len(some)
        everyone = range(len(images))
        return torch.stack([found[i] for i in everyone]), [maps[i] for i in everyone if i in maps]

    def _run(
        self, images: Sequence[Tensor], heatmaps: HeatmapFolder | None
    ) -> tuple[Tensor, list[Heatmap]]:
        batch = in_one_piece(images)
        floats = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        dtype = next(floats, torch.float32)
        if batch.dtype == torch.uint8:
            # For `model.normalize`, else an error of the model: bytes are not normalised pixels.
            dtype = torch.uint8
        batch = batch.to(device=self.device, dtype=dtype, memory_format=self._layout)
        amp = autocast(self.device, self._amp)
        drawn: list[Heatmap] = []
        with use_backend(self.backend), torch.inference_mode(), amp, recording() as calls:
            model: Any = self.model
            # The last bits of PyTorch's Linear depend on the batch. A run that continues after a
            # kill, or on several machines, has other batches and must give the same rows.
            ours = self.device.type == "cpu" and not reason_not_separable(model, "head")
            if self.columns.output_type == "embedding":
                out = model.forward_head(model.forward_features(batch), pre_logits=True)
            elif ours or heatmaps is not None:
                maps = model.forward_features(batch)
                if ours:
                    pooled = model.forward_head(maps, pre_logits=True).split(1)
                    out = torch.cat([model.head(one) for one in pooled])
                else:
                    out = model.forward_head(maps)
                if heatmaps is not None:
                    pairs = zip(maps.split(1), out.split(1), strict=True)
                    drawn = [heatmap_of(model, *pair, heatmaps.target) for pair in pairs]
            else:
                out = model(batch)
        self.kernels.update(call.choice.backend for call in calls)
        return out.float().cpu(), drawn

    def _stream(
        self, image: Prepared, heatmaps: HeatmapFolder | None
    ) -> tuple[Tensor, list[Heatmap]]:
        """The scores (D,) of one image row by row, and its heatmap."""
        what = "embedding" if self.columns.output_type == "embedding" else "logits"
        native: Any = self.preprocessing if isinstance(self.preprocessing, NativeSize) else None
        stats = StreamStats()
        with use_backend(self.backend), recording() as calls:
            result = stream(
                self.model,
                image,
                what if heatmaps is None else "heatmap",
                preprocessing=native,
                layout=None if isinstance(image, Source) else "CHW",
                max_memory=self._memory,
                target=None if heatmaps is None else heatmaps.target,
                stats=stats,
            )
        self.kernels.update(call.choice.backend for call in calls)
        if stats.backend == "cpu":
            self.kernels.add("cpu")
        scores: Tensor = result if heatmaps is None else result.logits
        return scores[0].float().cpu(), [] if heatmaps is None else [result]

    def _back_off(self, size: int, shape: tuple[int, ...]) -> bool:
        """Halve the batch size after a batch that did not fit; True: stream the image instead."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            reason = self._reason_not_streamed()
            if not reason:
                return True
            raise MemoryError(
                f"not enough memory on {self.device} for one image of {shape[1]}x{shape[2]} px, "
                f"and it cannot be streamed ({reason}): make images smaller, or take another device"
            )
        self._most = size // 2
        if not self._told:
            self._told = True
            warnings.warn(
                f"not enough memory on {self.device} for {size} images of {shape[1]}x{shape[2]} "
                f"px at once: going on with batches of {self._most}, and smaller ones if need be",
                stacklevel=2,
            )
        return False

    def rows(
        self,
        filenames: Sequence[str],
        images: Tensor | Sequence[Prepared],
        heatmaps: HeatmapFolder | None = None,
    ) -> list[Row]:
        """A row for each prepared image (C, H, W), in order, after its heatmap is on the disk."""
        if not filenames:
            return []
        scores, drawn = self._answers(images, heatmaps)
        labels = self.labels
        if labels is None:
            # The module does not state its number of classes, which is now known.
            labels = self.labels = class_labels(scores.shape[1])
            if self.columns.topk is not None:
                least = min(self.columns.topk, len(labels))
                self.columns = Columns(self.columns.output_type, least)
        rows = rows_of(filenames, scores, labels, self.columns)
        if heatmaps is not None:
            for filename, image, heatmap in zip(filenames, images, drawn, strict=True):
                heatmaps.write(filename, heatmap, self._picture(image, heatmap))
        return rows

    def _picture(self, image: Prepared, heatmap: Heatmap) -> Image.Image | None:
        """The image as the model saw it, in colours; None if its normalisation is unknown."""
        if heatmap.pictures is not None:
            return Image.fromarray(heatmap.pictures[0])
        assert not isinstance(image, Source)
        if not (hasattr(self.preprocessing, "mean") and hasattr(self.preprocessing, "std")):
            return None
        prepared: Any = self.preprocessing
        height, width = heatmap.size
        seen = Pixels(prepared, torch.float32, "cpu").visible(image[None, :, :height, :width])
        return Image.fromarray(seen[0].permute(1, 2, 0).expand(-1, -1, 3).numpy())

    def check_heatmaps(self, target: int | None = None) -> None:
        """Check that the model allows heatmaps of that class.

        Raises:
            ValueError: the model pools in another way, has no classifier, or no class ``target``,
                calling it does more than its parts, or the results are embeddings, which belong
                to no class.
        """
        if self.columns.output_type == "embedding":
            raise ValueError("a heatmap is of a class: ask for prob or logit, not for embeddings")
        check_mean_pooling(self.model)
        model: Any = self.model
        check_target(model.head, target)

    # Predicting

    def predict_files(
        self,
        paths: Sequence[str | os.PathLike[str]],
        workers: int = 2,
        heatmaps: HeatmapFolder | None = None,
    ) -> Iterator[Outcome]:
        """Rows and failures of files as they are computed, in order; no file raises.

        Args:
            workers: threads that read ahead while the model computes; see `image_batches`.
            heatmaps: receives a class activation map of each image, written before the image's
                row is yielded.

        Raises:
            ValueError: there can be no heatmaps; see `check_heatmaps`.
        """
        if heatmaps is not None:
            self.check_heatmaps(heatmaps.target)
        files = [located(path) for path in paths]
        batches = image_batches(files, self._sized(), self._most, workers, reuse=True)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            waited = time.perf_counter() - start
            if batch is None:
                return
            rows = self.rows([str(path) for path in batch.paths], batch.images, heatmaps)
            failures = [Failure(error.path, error.reason) for error in batch.failures]
            yield Outcome(rows, failures, waited)

    def __call__(self, source: Any) -> Any:
        """See the class."""
        if isinstance(source, Mapping):
            return self._answer_dict(source)
        if is_one(source):
            return self._answer([source])[0]
        if has_pixels(source) and source.ndim != 4:
            raise ValueError(
                "an image is (H, W), (H, W, C) or (C, H, W), a batch (N, H, W, C) or (N, C, H, W), "
                f"got shape {tuple(source.shape)}"
            )
        return self._answer(list(source))

    def _answer(self, pictures: Sequence[Picture]) -> Any:
        rows = self._rows_of(pictures)
        return self.columns.arrays(rows)[self.columns.names[1]] if self.columns.is_vector else rows

    def _rows_of(self, pictures: Sequence[Picture]) -> list[Row]:
        rows: list[Row] = []
        # Prepared images are large: no more are held than the model takes at once.
        size = self._most
        for start in range(0, len(pictures), size):
            some = pictures[start : start + size]
            names = [os.fspath(p) if isinstance(p, (str, os.PathLike)) else "" for p in some]
            rows += self.rows(names, [self._prepare(p) for p in some])
        return rows

    def _sized(self) -> Prepare:
        if not isinstance(self.preprocessing, NativeSize):
            return self.preprocessing
        return _Sized(self.preprocessing, self._is_large)

    def _prepare(self, picture: Picture) -> Prepared:
        prepare = self._sized()
        if isinstance(picture, (str, os.PathLike)):
            return load_image(picture, prepare)
        if isinstance(picture, Image.Image):
            return prepare(picture)
        array = as_pixels(picture)
        as_stored = array.shape[2:] == (() if prepare.channels == 1 else (prepare.channels,))
        if isinstance(prepare, _Sized) and as_stored and self._is_large(*array.shape[:2]):
            return open_source(array, prepare.channels, "HW" if array.ndim == 2 else "HWC")
        return prepare(Image.fromarray(np.ascontiguousarray(array)))

    def _answer_dict(self, source: Mapping[str, Any]) -> Arrays:
        kept = {name: np.asarray(v) for name, v in source.items() if name != "image"}
        if "image" in source:
            pictures = batch_of(source["image"], kept)
        else:
            key = next((name for name in ("path", "filename") if name in source), None)
            if key is None:
                raise ValueError(
                    f"a batch has images in 'image' or files in 'path', got {', '.join(source)}"
                )
            pictures = [str(path) for path in source[key]]
        return {**kept, **self.columns.arrays(self._rows_of(pictures))}


class _Sized:
    """Preparation at the image's own size: a tensor, or for a large image a source to stream."""

    def __init__(self, prepare: NativeSize, is_large: Callable[[int, int], bool]) -> None:
        self._prepare, self._is_large = prepare, is_large
        self.channels = prepare.channels

    def __call__(self, image: Image.Image) -> Prepared:
        if self._is_large(image.height, image.width):
            return open_source(image, self.channels)
        return self._prepare(image)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}: try float32, bfloat16 or float16")
    return found


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
