"""FID's Inception against torch-fidelity's, with random weights: the published ones are no test's to have."""

import importlib
import importlib.util
import logging
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inception_fixtures import random_images, write_weights
from pipeline_fixtures import run
from safetensors.numpy import load_file, save_file

from ard_jax.errors import UserError
from ard_jax.evaluation import InceptionFeatures, inception
from ard_jax.evaluation.inception_net import (
    InceptionNet,
    average_pool,
    maximum_pool,
    resize_matrix,
)
from ard_jax.files import file_sha256, tree_sha256
from ard_jax.models import jaxprs
from benchmarks.inception import convolution_macs, program_for, random_state_dict

GOLDEN_SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inception")


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    """The user's cache folder, which no test shall touch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "ard_jax"


@pytest.fixture(scope="module")
def weights(folder):
    return write_weights(folder)


@pytest.fixture
def features(weights):
    return InceptionFeatures.from_file(weights)


def relative_error(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


# ------------------------------------------------------------------------------------------------------ the resize


def resized(line, side=299):
    """One line of pixels, resized as TensorFlow 1 does: pixel after pixel, by its definition."""
    places = [np.float32(i) * np.float32(len(line) / side) for i in range(side)]
    values = []
    for place in places:
        low = int(place)
        high = min(low + 1, len(line) - 1)
        values.append(line[low] + (line[high] - line[low]) * (float(place) - low))
    return np.array(values)


@pytest.mark.parametrize("size", [1, 8, 32, 64, 150, 256, 299, 300, 512, 598, 1024])
def test_resize_is_that_of_tensorflow_1(size):
    line = np.random.default_rng(size).uniform(0, 255, size)
    matrix = resize_matrix(size)
    assert matrix.shape == (299, size) and matrix.dtype == np.float32
    np.testing.assert_allclose(matrix.astype(np.float64) @ line, resized(line), atol=1e-4)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    assert (np.count_nonzero(matrix, axis=1) <= 2).all()  # nothing is smoothed, however much it shrinks


def test_resize_has_no_half_pixels():
    np.testing.assert_array_equal(resize_matrix(299), np.eye(299))
    np.testing.assert_array_equal(resize_matrix(598), np.eye(598)[::2])  # half pixels would take the mean of two
    today = jax.image.resize(jnp.eye(64), (299, 64), "bilinear", antialias=False)
    assert np.abs(resize_matrix(64) - today).max() > 0.3


# --------------------------------------------------------------------------------------------------- the network


def test_average_pools_leave_padding_out():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    expected = [[2, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]]  # of 4, 6 and 9 pixels
    np.testing.assert_allclose(average_pool(x)[0, ..., 0], expected, rtol=1e-6)


def test_maximum_pools_leave_padding_out():
    x = -jnp.arange(1.0, 10).reshape(1, 3, 3, 1)
    np.testing.assert_array_equal(maximum_pool(x)[0, ..., 0], [[-1, -1, -2], [-1, -1, -2], [-4, -4, -5]])


def test_every_product_has_the_highest_precision():
    """Or a TPU would multiply in bfloat16, and FID would be another."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    params = {"params": inception.parameter_shapes()}
    found = jaxprs.equations(jax.make_jaxpr(InceptionNet().apply)(params, images).jaxpr)
    products = [e for e, _ in found if e.primitive.name in ("dot_general", "conv_general_dilated")]
    assert len(products) == 94 + 3  # convolutions; the resize's two matrices and the classifier
    assert all(set(np.atleast_1d(e.params["precision"])) == {jax.lax.Precision.HIGHEST} for e in products)
    assert {v.aval.dtype for e in products for v in e.outvars} == {np.dtype(np.float32)}


def test_bfloat16_is_of_the_convolutions_alone_and_near_what_float32_gives(features):
    images = random_images(GOLDEN_SIDE, 2)
    exact, rounded = features(images), features.over(jax.devices()[:1], "bfloat16")(images)
    for name, limit in (("pool", 0.03), ("spatial", 0.05), ("logits", 0.03)):
        a, b = getattr(exact, name), getattr(rounded, name)
        assert b.dtype == np.float32 and 1e-4 < relative_error(b, a) < limit, name
    program = jax.make_jaxpr(InceptionNet("bfloat16").apply)({"params": inception.parameter_shapes()}, images)
    found = [equation for equation, _ in jaxprs.equations(program.jaxpr)]

    def types(name):
        return {operand.aval.dtype for e in found if e.primitive.name == name for operand in e.invars}

    assert types("conv_general_dilated") == {jnp.bfloat16.dtype} and types("dot_general") == {np.dtype(np.float32)}


def test_names_and_shapes_of_the_published_file():
    shapes = inception.published_shapes()
    # 94 convolutions with five arrays each, and the classifier's two; as many numbers as the 95,628,359 bytes hold
    assert len(shapes) == 94 * 5 + 2
    numbers = sum(int(np.prod(shape)) for shape in shapes.values())
    assert 0 < 95_628_359 - 4 * numbers < 200 * len(shapes)
    assert shapes["Mixed_6d.branch7x7_2.conv.weight"] == (160, 160, 1, 7)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert shapes["fc.weight"] == (1008, 2048)


def test_features_are_those_of_the_golden_file(golden, features):
    expected, got = golden("inception_random"), features(random_images(GOLDEN_SIDE))
    for name in ("pool", "spatial", "logits"):
        array = getattr(got, name)
        assert array.dtype == np.float32
        assert relative_error(array[:, ::16], expected[name]) < 1e-4, name
    assert [array.shape for array in got] == [(2, 2048), (2, 2023), (2, 1008)]


def test_features_do_not_depend_on_the_batch(features):
    images = random_images(GOLDEN_SIDE, count=3)
    whole, one_by_one = features(images), features(images, batch_size=1)
    for a, b in zip(whole, one_by_one, strict=True):
        assert len(a) == len(b) == 3
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert np.abs(whole.pool[0] - whole.pool[2]).mean() > 0.01  # so that a mixed up order would be seen


def test_of_no_images_there_are_no_features(features):
    assert [array.shape for array in features(random_images(8)[:0])] == [(0, 2048), (0, 2023), (0, 1008)]


@pytest.mark.parametrize("count, most, size", [(1, 64, 1), (3, 64, 4), (63, 64, 64), (5000, 64, 64), (5, 3, 3)])
def test_few_images_make_a_small_batch(count, most, size):
    assert inception.batch_size_for(count, most) == size


def test_batch_norm_is_folded_exactly(weights):
    """The fold against its definition, in one convolution, with the epsilon that counts where variances are small."""
    arrays = load_file(weights)
    name = "Mixed_7b.branch1x1"
    arrays[f"{name}.bn.running_var"] = np.full(320, 2e-3, np.float32)
    save_file(arrays, weights.with_name("small.safetensors"))
    folded = InceptionFeatures.from_file(weights.with_name("small.safetensors")).params["Mixed_7b"]["branch1x1"]
    x = np.random.default_rng(0).normal(size=1280)
    convolved = arrays[f"{name}.conv.weight"][:, :, 0, 0].astype(np.float64) @ x
    norm = {part: arrays[f"{name}.bn.{part}"] for part in ("weight", "bias", "running_mean")}
    expected = (convolved - norm["running_mean"]) / np.sqrt(2e-3 + 1e-3) * norm["weight"] + norm["bias"]
    np.testing.assert_allclose(x @ np.asarray(folded["kernel"])[0, 0] + folded["bias"], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "images, sentence",
    [
        (
            np.zeros((2, 8, 8, 3), np.float32),
            r"images have dtype float32, but Inception wants uint8 in 0..255: convert",
        ),
        (
            np.zeros((2, 3, 8, 8), np.uint8),
            r"\(2, 3, 8, 8\), but .* wants \(N, height, width, 3\): .* by \(0, 2, 3, 1\)",
        ),
        (np.zeros((2, 8, 8, 1), np.uint8), "repeat the one channel three times"),
        (np.zeros((8, 8, 3), np.uint8), "keep the batch axis"),
    ],
)
def test_images_are_refused(features, images, sentence):
    with pytest.raises(UserError, match=sentence):
        features(images)


def test_a_batch_of_none_is_refused(features):
    with pytest.raises(UserError, match="batch_size is 0, but it must be at least 1"):
        features(random_images(8), batch_size=0)


# ------------------------------------------------------------------------------------------------ files of weights


def test_converted_weights_are_cached(weights, cache, monkeypatch):
    first = InceptionFeatures.from_file(weights)
    cached = cache / f"inception-{first.sha256}.safetensors"
    assert cached.is_file()

    def fail(*_):
        raise AssertionError("it was converted again")

    monkeypatch.setattr(inception, "inception_params", fail)
    assert tree_sha256(InceptionFeatures.from_file(weights).params) == tree_sha256(first.params)


@pytest.mark.parametrize("damage", ["cut", "altered", "another's"])
def test_a_damaged_cache_is_made_anew(weights, cache, caplog, damage):
    first = InceptionFeatures.from_file(weights)
    cached = cache / f"inception-{first.sha256}.safetensors"
    whole = cached.read_bytes()
    altered = bytearray(whole)
    altered[-5] ^= 64
    cached.write_bytes({"cut": whole[:-100], "altered": bytes(altered)}.get(damage, weights.read_bytes()))
    with caplog.at_level(logging.WARNING, "ard_jax"):
        again = InceptionFeatures.from_file(weights)
    assert tree_sha256(again.params) == tree_sha256(first.params)
    assert "is damaged" in caplog.text and cached.read_bytes() == whole
    assert [path.name for path in cache.iterdir() if path.name.startswith(".partial")] == []


def test_without_a_cache_folder_it_works_and_says_so(weights, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "ard_jax"):
        assert InceptionFeatures.from_file(weights).params
    assert "cannot be written" in caplog.text


def test_convert_knows_it(weights, cache, monkeypatch, tmp_path):
    sha256 = file_sha256(weights)
    (cache / f"inception-{sha256}.safetensors").unlink(missing_ok=True)
    words = ["convert", "--source", weights, "--workdir", tmp_path / "run"]
    looked, made = run(*words, "--dry-run"), run(*words)
    assert looked.status == made.status == 0, made.err
    assert looked.out.startswith(f"{weights}: FID's Inception, other than the published weights\n  goes to     {cache}")
    assert made.out == f"{looked.out}done: give {weights} to evaluate as evaluate.weights.\n"
    assert (cache / f"inception-{sha256}.safetensors").is_file() and not (tmp_path / "run").exists()
    monkeypatch.setattr(inception, "inception_params", lambda *_: 1 / 0)
    assert InceptionFeatures.from_file(weights).sha256 == sha256


def test_convert_refuses_torchvisions(tmp_path):
    arrays = random_state_dict() | {"AuxLogits.conv0.conv.weight": np.ones((1, 1), np.float32)}
    save_file(arrays, tmp_path / "inception_v3.safetensors")
    outcome = run("convert", "--source", tmp_path / "inception_v3.safetensors", "--workdir", tmp_path / "run")
    assert outcome.status == 2 and "holds torchvision's Inception v3, trained anew with" in outcome.err
    assert not (tmp_path / "run").exists()


def test_published_weights_are_known_by_their_hash(features, monkeypatch):
    assert not features.is_published
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", features.sha256)
    assert features.is_published


def test_counters_of_batches_may_be_there(weights, tmp_path, features):
    arrays = load_file(weights) | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.array(0)}
    save_file(arrays, tmp_path / "counted.safetensors")
    assert tree_sha256(InceptionFeatures.from_file(tmp_path / "counted.safetensors").params) == tree_sha256(
        features.params
    )


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"fc.bias": None}, r"FID's Inception has \(missing: fc.bias\): give .* weights-inception-2015-12-05"),
        ({"extra": np.ones(2)}, r"\(unexpected: extra\)"),
        ({"fc.bias": np.ones(1007)}, r"of another shape: fc.bias \(1007,\) instead of \(1008,\)"),
        ({"fc.weight": np.ones((1000, 2048)), "fc.bias": np.ones(1000)}, "torchvision's Inception v3, .* 1000 classes"),
        ({"AuxLogits.conv0.conv.weight": np.ones((1, 1))}, "holds torchvision's Inception v3"),
        ({"fc.weight": np.full((1008, 2048), np.nan)}, "the weights fc.weight hold 2064384 numbers that are NaN"),
        ({"Mixed_5b.branch1x1.bn.running_var": -np.ones(64)}, "the weights Mixed_5b.branch1x1.* are NaN or infinite"),
    ],
)
def test_other_weights_are_refused(tmp_path, changes, sentence):
    arrays = random_state_dict() | {name: None if a is None else a.astype(np.float32) for name, a in changes.items()}
    save_file({name: array for name, array in arrays.items() if array is not None}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=sentence) as refused:
        InceptionFeatures.from_file(tmp_path / "x.safetensors")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["inception_v3_weights_fid.pickle", "classify_image_graph_def.pb", "x.pkl"])
def test_formats_that_would_be_run_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(UserError, match="format that is not read here, .* give weights-inception-2015-12-05"):
        InceptionFeatures.from_file(tmp_path / name)


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere.pth are not there: give weights-inception-2015-12-05-6726825d.pth"):
        InceptionFeatures.from_file(tmp_path / "nowhere.pth")


# ---------------------------------------------------------------------------------------------- torch-fidelity's


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity's module of Inception; its package imports torchvision, which this module does without."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("needs torch-fidelity: pip install --no-deps torch-fidelity==0.4.0")
    before = sys.modules.get("torch_fidelity")
    sys.modules["torch_fidelity"] = importlib.util.module_from_spec(spec)
    yield importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        del sys.modules[name]
    if before is not None:
        sys.modules["torch_fidelity"] = before


@pytest.fixture(scope="module")
def oracle(fidelity, folder):
    """torch-fidelity's network with the random weights, and the file that it wrote of them."""
    import torch

    path = folder / "published.pth"
    torch.save({name: torch.tensor(array) for name, array in random_state_dict().items()}, path)
    net = fidelity.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)  # as in 2020, with counters of batches
    return net, path


def run_oracle(net, images):
    """Features, spatial features and logits: sFID's are not among torch-fidelity's, so a hook looks at their layer."""
    import torch

    seen = []
    hook = net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        pool, logits = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    hook.remove()
    spatial = seen[0][:, :7].permute(0, 2, 3, 1).reshape(len(images), -1)
    return pool.numpy(), spatial.numpy(), logits.numpy()


@pytest.mark.oracle
@pytest.mark.parametrize("side", [32, 64, 256, 299])
def test_features_are_torch_fidelitys(oracle, side):
    net, path = oracle
    images = random_images(side)
    expected = run_oracle(net, images)
    for got, array in zip(InceptionFeatures.from_file(path)(images), expected, strict=True):
        assert relative_error(got, array) < 1e-5
    # the random network tells images apart, or any features would do
    assert np.abs(expected[0][0] - expected[0][1]).max() > 0.1


@pytest.mark.oracle
def test_the_golden_file_is_torch_fidelitys(oracle, golden):
    expected = golden("inception_random")
    for name, array in zip(
        ("pool", "spatial", "logits"), run_oracle(oracle[0], random_images(GOLDEN_SIDE)), strict=True
    ):
        np.testing.assert_allclose(array[:, ::16], expected[name], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- on TPUs


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, the compiler for TPUs")
def test_a_slice_s_host_multiplies_in_float32_on_all_its_chips():
    """Compiling it takes minutes: `python -m benchmarks.inception compile` does."""
    _, params, images = program_for("v5e:2x2")
    assert images.shape == (4 * inception.BATCH_SIZE, 256, 256, 3) and images.sharding.num_devices == 4
    assert 5.5e9 < convolution_macs(params, images) / len(images.sharding.device_set) / inception.BATCH_SIZE < 6.5e9
    text = inception.forward.lower(params, images).as_text()
    convolutions = re.findall(r"stablehlo.convolution.*", text)
    assert len(convolutions) == 94 and all("HIGHEST" in line and "bf16" not in line for line in convolutions)
