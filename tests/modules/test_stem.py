"""The stem makes of uint8 images what it makes of normalised floats, on every backend."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from fakes.triton import installed
from operator_cases import make_operands
from torch import Tensor, nn
from torch.library import opcheck

from convmixer_fast import ConvMixer, create_model, explain, optimize, restore, to_reference
from convmixer_fast.ops import dispatch, patch_embed_uint8, use_backend
from convmixer_fast.ops.common import activation, affine
from convmixer_fast.testing import assert_numerics, trained_like_

NORMAL = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: Sides that no patch of 4 divides.
IMAGES = (2, 3, 23, 21)
LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_channels_last")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def images(layout: str = "contiguous", shape: tuple[int, int, int, int] = IMAGES) -> Tensor:
    n, c, h, w = shape
    if layout.startswith("sliced"):
        whole = torch.randint(0, 256, (n + 1, c + 2, h + 3, 2 * w + 1), dtype=torch.uint8)
        if layout == "sliced_channels_last":
            whole = whole.contiguous(memory_format=torch.channels_last)
        return whole[1:, 1 : c + 1, 2 : h + 2, 1 : 2 * w + 1 : 2]
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return x.contiguous(memory_format=memory_format)


def floats(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The definition, rounded once to ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, std = (torch.tensor(v, dtype=wide).view(1, -1, 1, 1) for v in NORMAL)
    return ((x.to(wide) / 255 - mean) / std).to(dtype)


def plain(x: Tensor, weight, bias, scale, shift, act: str) -> Tensor:
    h = F.conv2d(floats(x, weight.dtype), weight, bias, stride=weight.shape[2])
    return affine(activation(h, act), scale, shift)


@pytest.fixture(params=["auto", "triton"])
def calls(request):
    """The C++ engine or PyTorch, and the GPU's path around a kernel that PyTorch computes."""
    if request.param == "auto":
        yield None
    else:
        with installed() as double:
            yield double.calls


@pytest.fixture
def model() -> ConvMixer:
    return trained_like_(ConvMixer(16, 2, 5, 4, num_classes=6, normalize=NORMAL), IMAGES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [1, 4, 5])
def test_every_layout_and_dtype_is_within_the_numerics_rule(calls, layout, dtype, p):
    torch.manual_seed(0)
    x, operands = images(layout), make_operands("patches", 3, p, dtype)
    ours = patch_embed_uint8(x, *operands, "gelu", *NORMAL)
    assert ours.dtype == dtype
    wide = [t.double() for t in operands]
    assert_numerics(ours, plain(x, *operands, "gelu"), plain(x, *wide, "gelu"))
    if calls is not None:
        assert calls["patch_embed_uint8"] == 2  # the check before the first use, and the call


@pytest.mark.parametrize(("layout", "p"), [("sliced_channels_last", 1), ("contiguous", 4)])
def test_opcheck(calls, layout, p):
    operands = make_operands("patches", 3, p)
    opcheck(patch_embed_uint8.default, (images(layout), *operands, "gelu", *NORMAL))


@pytest.mark.parametrize("shape", [(0, 3, 9, 9), (1, 3, 4, 4), (1, 3, 7, 300)])
def test_no_images_and_single_patches(calls, shape):
    x, operands = images(shape=shape), make_operands("patches", 3, 4)
    out = patch_embed_uint8(x, *operands, "relu", *NORMAL)
    torch.testing.assert_close(out, plain(x, *operands, "relu"), rtol=1e-4, atol=1e-5)


def test_arguments_that_do_not_fit_are_named():
    x, operands = images(), make_operands("patches", 3, 4)
    for given, message in (
        ((x.float(), *operands, "relu", *NORMAL), "x must be uint8, got torch.float32"),
        ((x, *operands, "relu", (0.5,), NORMAL[1]), "mean must have a number for each of 3"),
        ((x, *operands, "tanh", *NORMAL), "unknown activation 'tanh'"),
        ((x[:, :2], *operands, "relu", *NORMAL), "weight is for 3 channels, x has 2"),
        ((x[:, :, :3], *operands, "relu", *NORMAL), "x of 3 x 21 is smaller than a patch of 4"),
        ((x.to("meta"), *operands, "relu", *NORMAL), "weight is on cpu but x is on meta"),
    ):
        with pytest.raises(ValueError, match=f"patch_embed_uint8: {message}"):
            patch_embed_uint8(*given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_models_logits_are_those_of_normalised_images(calls, model, layout, dtype):
    model, x = model.to(dtype), images(layout)
    got = model(x)
    assert got.dtype == dtype
    if calls is not None:
        assert calls["patch_embed_uint8"] == 2
        assert calls["patch_embed"] == 0
    with use_backend("reference"):
        theirs = model(floats(x, dtype))
        exact = copy.deepcopy(model).double()(floats(x, torch.float64))
    assert_numerics(got, theirs, exact)


@torch.no_grad()
def test_explain_names_the_operator_that_normalises(model):
    x = images()
    assert explain(model, x)[0].op == "pointwise_mix"
    with installed():
        assert explain(model, x)[0].op == "patch_embed_uint8"
        assert explain(model, floats(x))[0].op == "pointwise_mix"


@torch.no_grad()
def test_a_kernel_that_is_wrong_gives_way_to_the_float_stem(model):
    x = images()
    want = model(x)
    with installed() as double:
        double.wrong = {"patch_embed_uint8"}
        with use_backend("auto"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "automatic_backends", lambda device: ("triton", "cuda"))
            with pytest.warns(RuntimeWarning, match="patch_embed_uint8 of 3 -> 16"):
                got = model(x)
            rows = [row for row in explain(model, x) if row.module == "stem"]
            assert [(row.op, row.backend) for row in rows] == [
                ("patch_embed_uint8", "reference"),
                ("pointwise_mix", "triton"),
            ]
            assert "wrong numbers" in rows[0].reason
            before = double.calls["patch_embed"]
            torch.testing.assert_close(model(x), got)
            assert double.calls["patch_embed"] == before + 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_where_gradients_are_recorded(calls, model):
    x = images()
    for image in (x, floats(x)):
        model.eval().zero_grad()
        model(image).square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        if image is x:
            first = grads
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, grads, strict=True))


def test_in_training(calls, model):
    x = images()
    want = copy.deepcopy(model).train()(floats(x))
    assert torch.equal(model.train()(x), want)


@torch.no_grad()
def test_with_a_hook_on_the_convolution(calls, model):
    x, seen = images(), []
    model.stem[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    torch.testing.assert_close(model(x), model(floats(x)))
    assert torch.equal(seen[0], floats(x))


@torch.no_grad()
def test_autocast(calls, model):
    x = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = model(x), model(floats(x, torch.bfloat16))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


@torch.no_grad()
def test_compile_and_export(calls, model):
    x = images()
    want = model(floats(x))
    torch.compiler.reset()  # a graph does not ask again who serves it
    for run in (
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        torch.export.export(model, (x,)).module(),
    ):
        before = 0 if calls is None else calls["patch_embed_uint8"]
        torch.testing.assert_close(run(x), want, rtol=1e-4, atol=1e-4)
        if calls is not None:
            assert calls["patch_embed_uint8"] > before


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore:torch.tensor results")
def test_the_numbers_stay_with_the_model(model):
    x = images()
    want = model(x)
    assert "normalize" not in " ".join(model.state_dict())
    plain_keys = ConvMixer(16, 2, 5, 4, num_classes=6).state_dict().keys()
    assert model.state_dict().keys() == plain_keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), optimize(model)):
        assert torch.equal(twin(x), want)
    # Through half precision and back: mean and std are no parameters that lose their digits.
    assert model.bfloat16().float().stem.normalize == NORMAL
    for twin in (to_reference(model), restore(model)):
        assert type(twin.stem) is not nn.Sequential
        torch.testing.assert_close(twin(x), twin(floats(x)))
        torch.testing.assert_close(torch.jit.trace(twin, x)(x), twin(x))


def test_create_model_takes_it():
    model = create_model("256/8", normalize=NORMAL).eval()
    x = images()
    with torch.no_grad():
        assert torch.equal(model(x), model(floats(x)))


@pytest.mark.parametrize(
    ("normalize", "message"),
    [
        (0.5, "normalize must be"),
        (((0.5,) * 3,), "normalize must be"),
        (((0.5,), (0.5,)), "mean has 1 numbers, the images have 3 channels"),
        (((0.5,) * 3, (0.5,) * 4), "std has 4 numbers"),
        (((0.5,) * 3, (0.5, 0.0, 0.5)), "std must be positive"),
        (((0.5, float("nan"), 0.5), (0.5,) * 3), "mean must be finite"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(normalize, message):
    with pytest.raises(ValueError, match=message):
        ConvMixer(8, 1, 3, 4, normalize=normalize)


def test_uint8_without_the_numbers_is_one_line():
    model = ConvMixer(8, 1, 3, 4).eval()
    with pytest.raises(ValueError, match=r"uint8 .* build it with normalize=\(mean, std\)"):
        model(images())
