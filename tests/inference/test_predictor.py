"""A Predictor gives the plain model's answers for anything that is an image, in the form asked."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import photographs
import pytest
import torch
from PIL import Image
from torch import nn

import convmixer_fast
from convmixer_fast import ConvMixer, Predictor, save_checkpoint
from convmixer_fast.demo import plain_twin
from convmixer_fast.inference import (
    HeatmapFolder,
    ImageError,
    NativeSize,
    Prediction,
    Preprocessing,
)
from convmixer_fast.inference import predictor as predictors
from convmixer_fast.inference.streaming import whole_image_bytes
from convmixer_fast.testing import trained_like_

CLASSES = 7
PREPARE = Preprocessing((3, 32, 32))


@pytest.fixture(scope="module")
def model() -> ConvMixer:
    net = ConvMixer(16, 2, kernel_size=3, patch_size=4, num_classes=CLASSES)
    return trained_like_(net, (4, 3, 32, 32))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [photographs.picture(rng, w, h) for w, h in [(50, 40), (64, 64), (90, 33), (64, 64)]]


def plain_scores(model: ConvMixer, pictures: list[Image.Image], prepare=PREPARE) -> torch.Tensor:
    """Logits by the plain model, one image at a time."""
    with torch.inference_mode():
        return torch.cat([plain_twin(model)(prepare(image)[None]) for image in pictures])


def agrees(found, scores: torch.Tensor, topk: int) -> None:
    values, indices = scores.softmax(1).topk(topk)
    assert len(found) == len(scores)
    for row, value, index in zip(found, values, indices, strict=True):
        assert isinstance(row, Prediction)
        assert row.indices == tuple(index.tolist())
        assert row.labels == tuple(str(i) for i in index.tolist())
        assert row.scores == pytest.approx(value.tolist(), abs=1e-5)


def test_every_form_of_the_same_images_gives_the_plain_models_answers(tmp_path, model, pictures):
    predictor = Predictor(model, preprocessing=PREPARE, topk=3, batch_size=3)
    scores = plain_scores(model, pictures)
    paths = [tmp_path / f"{i}.png" for i in range(len(pictures))]
    for path, image in zip(paths, pictures, strict=True):
        image.save(path)
    arrays = [np.asarray(image) for image in pictures]
    for form in (pictures, arrays, paths, [str(p) for p in paths], tuple(pictures)):
        agrees(predictor(form), scores, 3)
    agrees(predictor([pictures[0], arrays[1], paths[2], str(paths[3])]), scores, 3)
    for one in (pictures[1], arrays[1], paths[1], str(paths[1])):
        agrees([predictor(one)], scores[1:2], 3)
    agrees(predictor(np.stack([arrays[1], arrays[3]])), scores[[1, 3]], 3)
    assert predictor(paths[2]).filename == str(paths[2])
    assert predictor(pictures[2]).filename == ""
    assert predictor([]) == []


def test_grey_and_transparent_arrays_are_read_as_files_would_be(model):
    rng = np.random.default_rng(1)
    predictor = Predictor(model, preprocessing=PREPARE, topk=None, output_type="logit")
    for shape in [(40, 50), (40, 50, 1), (40, 50, 4)]:
        array = rng.integers(0, 256, shape, dtype=np.uint8)
        image = Image.fromarray(array.squeeze())
        expected = plain_scores(model, [image.convert("RGB")])[0]
        assert predictor(array) == pytest.approx(expected.numpy(), abs=1e-4)


def axes_of(pixels: np.ndarray, kind: str) -> list[tuple[str, object]]:
    """One image (H, W, C) in every order of axes, as ``kind`` of array, and as batches of two."""
    planar = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    forms = {"HWC": pixels, "CHW": planar, "strided CHW": pixels.transpose(2, 0, 1)}
    if pixels.shape[2] == 1:
        forms["HW"] = pixels[:, :, 0]
    forms |= {f"N {name}": np.stack([form, form]) for name, form in forms.items() if name != "HW"}
    make = {"array": np.asarray, "tensor": torch.tensor, "read-only": np.copy}[kind]
    made = {name: make(form) for name, form in forms.items()}
    if kind == "read-only":
        for form in made.values():
            form.setflags(write=False)
    return list(made.items())


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["array", "tensor", "read-only"])
@pytest.mark.parametrize("preprocessing", ["native", "resized"])
def test_arrays_and_tensors_of_any_order_of_axes_are_the_image(
    kind, channels, in_chans, preprocessing
):
    rng = np.random.default_rng(1)
    net = ConvMixer(16, 1, 3, 4, in_chans=in_chans, num_classes=CLASSES)
    trained_like_(net, (4, in_chans, 32, 32))
    prepare = (
        Preprocessing((in_chans, 32, 32), mean=(0.5,), std=(0.3,))
        if preprocessing == "resized"
        else "native"
    )
    predictor = Predictor(net, preprocessing=prepare, topk=None, output_type="logit")
    pixels = rng.integers(0, 256, (40, 50, channels), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze())
    expected = predictor(image.convert("L" if in_chans == 1 else "RGB"))
    for limit in (None, 1 << 18) if prepare == "native" else (None,):
        asked = Predictor(net, preprocessing=prepare, topk=None, output_type="logit",
                          max_memory=limit)  # fmt: skip
        for name, form in axes_of(pixels, kind):
            answers = asked(form) if "N" in name else asked(form)[None]
            assert answers.shape == (1 + ("N" in name), CLASSES), name
            for answer in answers:
                assert answer == pytest.approx(expected, abs=1e-4), name
            if "N" not in name:
                assert asked([form])[0] == pytest.approx(expected, abs=1e-4), name


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
@pytest.mark.parametrize(
    "shape", [(3, 40, 3), (3, 3, 3), (3, 40, 4), (4, 40, 3), (1, 40, 3), (40, 3, 3), (3, 3, 40)]
)
def test_where_two_axes_could_be_the_channels_the_kind_of_array_tells(model, kind, shape):
    predictor = Predictor(model, preprocessing=PREPARE, topk=None, output_type="logit")
    pixels = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    first = shape[0] in (1, 3, 4) and (kind is torch.tensor or shape[2] not in (1, 3, 4))
    image = Image.fromarray(np.moveaxis(pixels, 0, -1).squeeze() if first else pixels)
    assert np.array_equal(predictor(kind(pixels)), predictor(image.convert("RGB")))


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [
        ((9, 40, 50), "uint8", r"order of its axes is \(H, W, C\) or \(C, H, W\)"),
        ((3, 40, 50), "float32", r"uint8.*got .*float32 of shape \(3, 40, 50\).*scores\(\)"),
        ((2, 3, 40, 50), "float32", r"uint8.*got .*float32 of shape \(3, 40, 50\).*scores\(\)"),
        ((3, 40, 50), "int64", "uint8.*got .*int64"),
        ((40, 50), "bool", "uint8.*got .*bool"),
        ((0, 40, 3), "uint8", "uint8.*shape"),
        ((50,), "uint8", r"batch \(N, H, W, C\) or \(N, C, H, W\)"),
        ((1, 1, 3, 40, 50), "uint8", r"batch \(N, H, W, C\) or \(N, C, H, W\)"),
        ((), "uint8", r"got shape \(\)"),
    ],
)
def test_arrays_that_are_no_image_are_refused_with_the_order_of_axes(
    model, kind, shape, dtype, says
):
    with pytest.raises(ValueError, match=says) as caught:
        Predictor(model, preprocessing=PREPARE)(kind(np.zeros(shape, dtype)))
    assert "\n" not in str(caught.value)


def test_a_dict_is_a_batch_and_one_image_in_it_is_refused(model):
    predictor = Predictor(model, preprocessing=PREPARE, topk=None, output_type="logit")
    pixels = np.random.default_rng(3).integers(0, 256, (3, 40, 50), dtype=np.uint8)
    grey = predictor(list(pixels))
    assert np.array_equal(predictor({"image": pixels})["logit"], grey)  # N grey images
    assert np.array_equal(predictor({"image": torch.tensor(pixels[:, None])})["logit"], grey)
    for one in (torch.tensor(pixels), pixels.transpose(1, 2, 0), pixels[0]):
        with pytest.raises(ValueError, match=r"is one image, and the axes of a batch are"):
            predictor({"image": one})
    with pytest.raises(ValueError, match=r"'label' for each of its 3 images, got shape \(\)"):
        predictor({"image": pixels, "label": 7})


def test_an_array_of_names_is_a_list_of_files(tmp_path, model, pictures):
    pictures[0].save(tmp_path / "a.png")
    names = np.array([str(tmp_path / "a.png")] * 2)
    predictor = Predictor(model, preprocessing=PREPARE, topk=1)
    assert predictor(names) == predictor(list(names))


def test_a_dict_of_arrays_gives_a_dict_of_arrays_and_keeps_what_came_with_it(model, pictures):
    predictor = Predictor(model, preprocessing=PREPARE, topk=2)
    same = np.stack([np.asarray(pictures[1]), np.asarray(pictures[3])])
    mixed = np.empty(4, dtype=object)
    mixed[:] = [np.asarray(image) for image in pictures]
    for images, some in ((same, [1, 3]), (mixed, [0, 1, 2, 3])):
        names = np.array([f"name{i}" for i in some])
        found = predictor({"image": images, "path": names, "weight": np.arange(len(some))})
        assert list(found) == [
            "path", "weight", "index_0", "index_1", "label_0", "label_1", "prob_0", "prob_1",
        ]  # fmt: skip
        values, indices = plain_scores(model, [pictures[i] for i in some]).softmax(1).topk(2)
        assert found["path"].tolist() == names.tolist()
        assert found["weight"].tolist() == list(range(len(some)))
        assert found["prob_0"].dtype == np.float32
        assert found["index_1"].dtype == np.int64
        assert found["index_1"].tolist() == indices[:, 1].tolist()
        assert found["label_0"].tolist() == [str(i) for i in indices[:, 0].tolist()]
        assert found["prob_1"] == pytest.approx(values[:, 1].numpy(), abs=1e-5)


def test_a_dict_of_paths_is_read(tmp_path, model, pictures):
    pictures[0].save(tmp_path / "a.png")
    predictor = Predictor(model, preprocessing=PREPARE, topk=1)
    found = predictor({"path": np.array([str(tmp_path / "a.png")])})
    assert list(found) == ["path", "index", "label", "prob"]
    assert found["index"].tolist() == plain_scores(model, pictures[:1]).argmax(1).tolist()


@pytest.mark.parametrize("output_type", ["prob", "logit", "embedding"])
def test_vectors_are_all_scores_or_the_pooled_features(model, pictures, output_type):
    predictor = Predictor(model, preprocessing=PREPARE, topk=None, output_type=output_type)
    logits = plain_scores(model, pictures)
    twin = plain_twin(model)
    body = nn.Sequential(*list(twin.children())[:-1]) if output_type == "embedding" else None
    with torch.inference_mode():
        expected = {
            "prob": lambda: logits.softmax(1),
            "logit": lambda: logits,
            "embedding": lambda: torch.cat([body(PREPARE(i)[None]).mean((2, 3)) for i in pictures]),
        }[output_type]()
    found = predictor(pictures)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert found == pytest.approx(expected.numpy(), abs=1e-4)
    assert np.array_equal(predictor(pictures[2]), found[2])
    assert np.array_equal(predictor({"image": pictures})[output_type], found)


def test_images_of_any_size_go_through_as_they_are(model, pictures):
    predictor = Predictor(
        model, preprocessing="native", topk=None, output_type="logit", batch_size=4
    )
    found = predictor(pictures)
    expected = plain_scores(model, pictures, NativeSize())
    assert found == pytest.approx(expected.numpy(), abs=1e-4)
    small = plain_scores(model, pictures, PREPARE)
    assert not np.allclose(found, small.numpy(), atol=1e-2)


@pytest.fixture
def streamed(monkeypatch) -> list[tuple[int, int]]:
    """(height, width) of every image that a Predictor streams from here on."""
    seen = []
    real = predictors.stream

    def stream(*args, stats, **options):
        result = real(*args, stats=stats, **options)
        seen.append((stats.height, stats.width))
        return result

    monkeypatch.setattr(predictors, "stream", stream)
    return seen


def large(width: int = 150, height: int = 260, channels: int = 3) -> Image.Image:
    return photographs.picture(np.random.default_rng(width), width, height, channels)


#: More than the small images and their maps take, less than the large ones'.
LIMIT = 300_000


@pytest.mark.parametrize("output_type", ["logit", "embedding"])
def test_large_images_stream_among_small_ones_to_the_whole_images_answers(
    tmp_path, model, pictures, streamed, output_type
):
    images = [pictures[0], large(), pictures[1], large(97, 301), pictures[3], large()]
    assert whole_image_bytes(model, 64, 64) < LIMIT < whole_image_bytes(model, 301, 97)
    options = {"preprocessing": "native", "topk": None, "output_type": output_type}
    whole = Predictor(model, **options)(images)
    assert streamed == []
    predictor = Predictor(model, max_memory=LIMIT, **options)
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    arrays = [np.asarray(image) for image in images]
    for form in (images, arrays, paths):
        streamed.clear()
        found = predictor(form)
        assert sorted(streamed) == [(260, 150), (260, 150), (301, 97)]
        assert np.abs(found - whole).max() <= 2e-6 * np.abs(whole).max()
        # The small ones have nothing to do with it.
        assert np.array_equal(found[[0, 2, 4]], whole[[0, 2, 4]])
    rows = [row for outcome in predictor.predict_files(paths, 1) for row in outcome.rows]
    assert [row.filename for row in rows] == [str(path) for path in paths]
    assert np.array_equal(np.stack([row.values for row in rows]), found)
    again = pickle.loads(pickle.dumps(predictor))
    streamed.clear()
    assert np.array_equal(again(images[1]), found[1])
    assert streamed == [(260, 150)]


def test_large_images_of_other_modes_are_converted_first(model, streamed):
    options = {"preprocessing": "native", "topk": None, "output_type": "logit"}
    grey, clear = large(channels=1), large(channels=3).convert("RGBA")
    for image in (grey, clear):
        whole = Predictor(model, **options)(image.convert("RGB"))
        for form in (image, np.asarray(image)):
            found = Predictor(model, max_memory=LIMIT, **options)(form)
            assert np.abs(found - whole).max() <= 2e-6 * np.abs(whole).max()
    assert len(streamed) == 4
    one = trained_like_(ConvMixer(16, 2, 3, 4, in_chans=1, num_classes=3), (2, 1, 32, 32)).eval()
    whole = Predictor(one, **options)(grey)
    for form in (grey, np.asarray(grey), clear.convert("L")):
        found = Predictor(one, max_memory=LIMIT, **options)(form)
        if form is not grey and isinstance(form, Image.Image):
            whole = Predictor(one, **options)(form)
        assert np.abs(found - whole).max() <= 2e-6 * np.abs(whole).max()
    assert len(streamed) == 7


def test_a_large_memory_map_stays_in_its_file(tmp_path, model, streamed, monkeypatch):
    array = np.asarray(large())
    np.save(tmp_path / "large.npy", array)
    predictor = Predictor(model, preprocessing="native", topk=3, max_memory=LIMIT)
    expected = predictor(array)

    def whole(*args):
        raise AssertionError("the memory map was made an image as a whole")

    monkeypatch.setattr(Image, "fromarray", whole)
    assert predictor(np.load(tmp_path / "large.npy", mmap_mode="r")) == expected
    assert len(streamed) == 2


def test_an_image_too_large_for_the_device_streams_whatever_the_limit(
    model, pictures, streamed, monkeypatch
):
    options = {"preprocessing": "native", "topk": None, "output_type": "logit"}
    whole = Predictor(model, **options)([pictures[0], large()])
    real = Predictor._run

    def run(self, images, heatmaps):
        if images[0].shape[1] > 200:
            raise torch.OutOfMemoryError("too large")
        return real(self, images, heatmaps)

    monkeypatch.setattr(Predictor, "_run", run)
    found = Predictor(model, **options)([pictures[0], large()])
    assert np.abs(found - whole).max() <= 2e-6 * np.abs(whole).max()
    assert streamed == [(260, 150)]


def test_what_cannot_stream_does_not(model, pictures, streamed):
    # Of a size that the model is given, or under autocast, or by another module.
    Predictor(model, preprocessing=PREPARE)(large())
    Predictor(model, preprocessing="native", max_memory=1000, amp_dtype="bfloat16")(large())
    Predictor(Small(100, MemoryError()), preprocessing="native", max_memory=1000)(large())
    assert streamed == []
    with pytest.raises(ValueError, match="max_memory of 1,000 bytes is too small"):
        Predictor(model, preprocessing="native", max_memory=1000)(large())
    with pytest.raises(ValueError, match="max_memory must be at least 1"):
        Predictor(model, max_memory=0)


def test_a_streamed_images_heatmap_is_at_reduced_scale(tmp_path, model, streamed):
    image = large(200, 1100)
    image.save(tmp_path / "large.png")
    predictor = Predictor(
        model, preprocessing="native", topk=CLASSES, output_type="logit", max_memory=LIMIT
    )
    maps = HeatmapFolder(tmp_path / "maps", target=2)
    [outcome] = predictor.predict_files([tmp_path / "large.png"], 1, maps)
    picture, array = maps.places(str(tmp_path / "large.png"))
    scores = np.load(array)
    # 275 x 50 patches in cells of 3 x 3.
    assert scores.shape == (92, 17)
    down, across = (np.minimum(3, n - 3 * np.arange(-(-n // 3))) for n in (275, 50))
    mean = (scores * down[:, None] * across).sum() / (275 * 50)
    row = outcome.rows[0]
    assert mean == pytest.approx(row.scores[row.indices.index(2)], abs=1e-4)
    with Image.open(picture) as got:
        assert got.size == (200, 1100)
    assert streamed == [(1100, 200)]


def test_a_copy_in_another_process_gives_the_same_bits(tmp_path, model, pictures):
    checkpoint = tmp_path / "w.safetensors"
    save_checkpoint(model, checkpoint)
    predictor = Predictor(
        checkpoint, preprocessing=PREPARE, topk=2, labels=list("abcdefg"), dtype="float32"
    )
    before = predictor(pictures)
    checkpoint.unlink()  # the weights travel with it
    assert pickle.loads(pickle.dumps(predictor))(pictures) == before
    assert before[0].labels[0] in "abcdefg"


def test_reduced_precision_and_autocast_are_near(model, pictures):
    exact = plain_scores(model, pictures).numpy()
    scale = np.abs(exact).max()
    import copy

    for options in ({"dtype": "bfloat16"}, {"amp_dtype": torch.bfloat16}, {"channels_last": True}):
        predictor = Predictor(
            copy.deepcopy(model), preprocessing=PREPARE, topk=None, output_type="logit", **options
        )
        error = np.abs(predictor(pictures) - exact).max() / scale
        assert error < 0.05, (options, error)
        assert error > 0 or "channels_last" in options


class Small(nn.Module):
    """A model that can take so many pixels at once and no more."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.most, self.error, self.sizes = most, error, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise self.error
        mean = x.mean((2, 3))
        return mean * self.weight


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 99 bytes"),
    ],
)  # fmt: skip
def test_batches_shrink_until_they_fit_and_it_is_said_once(pictures, error):
    model = Small(3, error)
    predictor = Predictor(
        model, preprocessing=PREPARE, topk=None, output_type="logit", batch_size=16
    )
    images = [pictures[i % 4] for i in range(40)]
    with pytest.warns(UserWarning, match="not enough memory") as told:
        found = predictor(images)
    assert len(told) == 1
    assert "32x32 px at once: going on with batches of 8" in str(told[0].message)
    assert model.sizes[:4] == [16, 8, 4, 2]
    assert predictor.images_at_once == 2
    expected = torch.stack([PREPARE(image).mean((1, 2)) for image in images])
    assert found == pytest.approx(expected.numpy(), abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor(images)


def test_memory_for_not_even_one_image_is_an_error_with_the_size(pictures):
    predictor = Predictor(Small(0, MemoryError()), preprocessing=PREPARE, topk=1, batch_size=1)
    with pytest.raises(MemoryError, match="one image of 32x32 px"):
        predictor(pictures[:1])


def test_other_errors_of_the_model_are_not_taken_for_memory(pictures):
    predictor = Predictor(
        Small(0, RuntimeError("a bug")), preprocessing=PREPARE, topk=1, batch_size=4
    )
    with pytest.raises(RuntimeError, match="a bug"):
        predictor(pictures)


def test_the_answer_for_an_image_does_not_depend_on_the_others(model, pictures):
    predictor = Predictor(model, preprocessing=PREPARE, topk=None, output_type="logit")
    alone = np.stack([predictor(image) for image in pictures])
    assert np.array_equal(predictor(pictures), alone)
    assert np.array_equal(predictor(pictures[::-1]), alone[::-1])


def test_files_come_out_in_order_each_once_with_reasons_for_the_bad(tmp_path, model):
    broken = photographs.write_folder(tmp_path, 60)
    paths = sorted(tmp_path.rglob("*.jpg"))
    predictor = Predictor(model, preprocessing=PREPARE, topk=1, batch_size=7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        outcomes = list(predictor.predict_files(paths, workers=2))
    rows = [row.filename for outcome in outcomes for row in outcome.rows]
    failures = {f.filename: f.error for outcome in outcomes for f in outcome.failures}
    assert rows == [str(p) for p in paths if str(p) not in broken]
    assert failures.keys() == broken.keys()
    says = {
        "truncated": "damaged image",
        "zero bytes": "the file is empty",
        "text": "not an image",
        "decompression bomb": "decompression bomb",
        "bomb by pixels": "decompression bomb",
    }
    for name, way in broken.items():
        assert says[way] in failures[name]
        assert name not in failures[name]
    assert all(outcome.waited >= 0 for outcome in outcomes)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, or 'auto'"),
        ({"topk": 0}, "topk must be at least 1, or None"),
        ({"output_type": "odds"}, "unknown output_type 'odds'"),
        ({"preprocessing": "magic"}, "preprocessing 'magic' is unknown"),
        ({"dtype": "float3"}, "unknown dtype 'float3'"),
        ({"labels": ["ant", "bee"]}, "2 labels for a model of 7 classes"),
        ({"act": "gelu"}, "act is for checkpoints"),
    ],
)
def test_settings_that_make_no_sense_are_named(model, options, says):
    with pytest.raises(ValueError, match=says):
        Predictor(model, **options)


def test_sources_that_make_no_sense_are_named(tmp_path, model):
    predictor = Predictor(model, preprocessing=PREPARE)
    with pytest.raises(ImageError, match=r"none\.jpg: No such file"):
        predictor(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match="an image is uint8"):
        predictor(np.zeros((4, 4, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        predictor(np.zeros((9, 9, 5), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"\(N, H, W, C\)"):
        predictor(np.zeros(9, dtype=np.uint8))
    with pytest.raises(ValueError, match="'image' or files in 'path', got label"):
        predictor({"label": np.arange(3)})


def test_a_headless_model_and_a_foreign_one(pictures):
    headless = ConvMixer(8, 1, 3, 4, num_classes=0)
    with pytest.raises(ValueError, match="no classifier"):
        Predictor(headless)
    assert Predictor(headless, output_type="embedding")(pictures[0]).shape == (8,)
    with pytest.raises(ValueError, match="has no forward_head"):
        Predictor(nn.Flatten(), output_type="embedding")
    # A module that does not say how many classes it has: more are asked for than there are.
    found = Predictor(Small(9, MemoryError()), preprocessing=PREPARE, topk=5)(pictures[0])
    assert sorted(found.indices) == [0, 1, 2]


def test_the_name_is_the_packages_and_costs_nothing_until_asked_for():
    assert convmixer_fast.Predictor is Predictor
    assert "Predictor" in convmixer_fast.__all__
    with pytest.raises(AttributeError, match="Predict0r"):
        convmixer_fast.Predict0r  # noqa: B018
    assert Path(convmixer_fast.__file__).exists()
