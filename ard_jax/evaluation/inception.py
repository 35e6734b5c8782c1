"""Features of FID's Inception, from a file of its published weights."""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ard_jax.errors import UserError, first_line
from ard_jax.evaluation.inception_net import NUM_CLASSES, NUM_FEATURES, NUM_SPATIAL, InceptionNet
from ard_jax.files import cache_folder, file_sha256, local_path, require_finite, tree_sha256
from ard_jax.types import Params
from ard_jax.weights.names import check_names
from ard_jax.weights.tensors import WEIGHT_SUFFIXES, Tensors, open_tensors, read_tensors, write_tensors

log = logging.getLogger("ard_jax")

# torch-fidelity's name of the file; pytorch-fid has the same as pt_inception-2015-12-05-6726825d.pth
PUBLISHED_NAME = "weights-inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CHANNELS = 3  # of the images that it wants
BATCH_SIZE = 64
BATCH_NORM_EPSILON = 1e-3
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
# How many batches a training saw: whole numbers, which the published file has or has not, by the age of its torch.
COUNTER = ".num_batches_tracked"


class Features(NamedTuple):
    """What Inception says of some images.

    Attributes:
        pool: (N, 2048) float32, of FID, precision and recall.
        spatial: (N, 2023) float32, of sFID: 7 channels on a grid of 17x17, flattened from (height, width, channel).
        logits: (N, 1008) float32, of the Inception score: without the classifier's bias.
    """

    pool: np.ndarray
    spatial: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class InceptionFeatures:
    """FID's Inception with its weights: call it with images to get `Features`.

    Attributes:
        params: of an `InceptionNet`.
        sha256: of the file that they come from.
        batches: how the devices share a batch; None for one device.
        dtype: that the network computes in: "float32", or "bfloat16", whose numbers compare with no published ones.
    """

    params: Params
    sha256: str
    batches: Sharding | None = None
    dtype: str = "float32"

    @property
    def is_published(self) -> bool:
        """Whether the weights are those that published numbers were measured with; others give other numbers."""
        return self.sha256 == PUBLISHED_SHA256

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "InceptionFeatures":
        """Reads weights-inception-2015-12-05-6726825d.pth of torch-fidelity, which is also pytorch-fid's file.

        What it becomes is kept in the user's cache folder under the file's hash, so torch is needed once.

        Args:
            path: of that file, or of another state dict with its names and shapes, .safetensors too; of another hash
                than the published file's it is no less accepted, but not `is_published`.

        Raises:
            UserError: it is not there, damaged, of a format that is not read, or holds weights of another network.
        """
        path = local_path(path)
        _check_file(path)
        sha256 = file_sha256(path)
        cached = cached_path(sha256)
        params = _read_cached(cached)
        if params is None:
            params = inception_params(open_tensors(path, leave_out=COUNTER), path)
            _write_cached(cached, params)
        return cls(jax.device_put(params), sha256)

    def over(self, devices: Sequence[jax.Device], dtype: str = "float32") -> "InceptionFeatures":
        """The same on several devices, of which each takes its share of a batch: give `stream` a multiple of them."""
        whole, split = shardings_over(devices)
        return dataclasses.replace(self, params=jax.device_put(self.params, whole), batches=split, dtype=dtype)

    def __call__(self, images: np.ndarray, batch_size: int = BATCH_SIZE) -> Features:
        """Features of images.

        Args:
            images: (N, height, width, 3) uint8, of any size; a memory map will do.
            batch_size: images on the device at once, of which all batches have as many, the last one padded; of few
                images it is the next power of two.

        Raises:
            UserError: images of another dtype or shape, or a batch size below 1.
        """
        images = check_colour_images(images, "The images")
        size = batch_size_for(len(images), batch_size)
        batches = (np.asarray(images[start : start + size]) for start in range(0, len(images), size))
        nothing = Features(*(np.empty((0, width), np.float32) for width in (NUM_FEATURES, NUM_SPATIAL, NUM_CLASSES)))
        parts = zip(*[nothing, *self.stream(batches, size)], strict=True)
        return Features(*map(np.concatenate, parts))

    def stream(self, batches: Iterable[np.ndarray], batch_size: int) -> Iterator[Features]:
        """Features of one batch after the other: (batch, height, width, 3) uint8 of one size, at most `batch_size`."""
        for images in batches:
            padding = [(0, batch_size - len(images))] + [(0, 0)] * 3
            batch = np.pad(images, padding)
            outputs = jax.device_get(forward(self.params, jax.device_put(batch, self.batches), self.dtype))
            yield Features(*(output[: len(images)] for output in outputs))


def shardings_over(devices: Sequence[jax.Device]) -> tuple[NamedSharding, NamedSharding]:
    """How parameters, which are whole on each device, and batches lie on some."""
    mesh = Mesh(np.asarray(devices), ("batch",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))


@functools.partial(jax.jit, static_argnames="dtype")
def forward(params: Params, images: jax.Array, dtype: str = "float32") -> Any:
    """The arrays of `Features` on the device, of images (batch, height, width, 3) uint8."""
    return InceptionNet(dtype).apply({"params": params}, images)


def batch_size_for(count: int, most: int = BATCH_SIZE) -> int:
    """How many images a batch has: `most`, or the next power of two of a count below that, so few sizes compile.

    Raises:
        UserError: `most` is below 1.
    """
    if most < 1:
        raise UserError(f"batch_size is {most}, but it must be at least 1: choose for instance {BATCH_SIZE}.")
    return min(most, 1 << max(count - 1, 0).bit_length())


def check_colour_images(images: np.ndarray, what: str) -> np.ndarray:
    """The images, if they are (N, height, width, 3) uint8.

    Raises:
        UserError: they are not; the sentence calls them `what`.
    """
    if not isinstance(images, np.ndarray):
        images = np.asarray(images)
    check_image_layout(images.shape, images.dtype, what)
    return images


def check_image_layout(shape: tuple[int, ...], dtype: np.dtype, what: str) -> None:
    """Raises UserError for anything but (N, height, width, 3) uint8; the sentence calls it `what`."""
    if dtype != np.uint8:
        raise UserError(
            f"{what} have dtype {dtype}, but Inception wants uint8 in 0..255: convert images in [-1, 1] by "
            f"127.5 x + 128, clipped to 0..255 and truncated."
        )
    if len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        advice = "put the channels last and keep the batch axis"
        if len(shape) == 4 and shape[1] == 3:
            advice = "they look like (N, channel, height, width), so transpose them by (0, 2, 3, 1)"
        elif len(shape) == 4 and shape[3] == 1:
            advice = "repeat the one channel three times"
        raise UserError(f"{what} have shape {shape}, but Inception wants (N, height, width, 3): {advice}.")


@functools.cache
def parameter_shapes() -> Params:
    """Shapes of the network's parameters."""
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
    return jax.eval_shape(InceptionNet().init, jax.random.key(0), images)["params"]


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published state dict, in PyTorch's order of axes."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (NUM_CLASSES, NUM_FEATURES), "fc.bias": (NUM_CLASSES,)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameter_shapes()):
        *modules, kind = (entry.key for entry in path)
        if kind == "kernel" and modules != ["fc"]:
            module = ".".join(modules)
            height, width, inputs, outputs = leaf.shape
            shapes[f"{module}.conv.weight"] = (outputs, inputs, height, width)
            shapes |= {f"{module}.bn.{name}": (outputs,) for name in BATCH_NORM}
    return shapes


def inception_params(state_dict: Tensors, path: pathlib.Path) -> Params:
    """The published state dict as parameters of an `InceptionNet`, batch norm folded into its convolutions.

    Args:
        state_dict: as published, without the counters of batches.
        path: it comes from, for sentences.

    Raises:
        UserError: it has other names or shapes, or numbers that are not finite.
    """
    found = state_dict.shapes
    _refuse_other_inceptions(found, path)
    names = f"the names and shapes of {PUBLISHED_NAME}, not {path}"
    check_names(found, published_shapes(), "FID's Inception has", names)

    @functools.cache
    def folded(module: str) -> tuple[np.ndarray, np.ndarray]:
        """Kernel (height, width, in, out) and bias, made in float64."""
        kernel, *norm = (
            _finite(state_dict, f"{module}.{name}") for name in ("conv.weight", *(f"bn.{part}" for part in BATCH_NORM))
        )
        weight, bias, mean, variance = norm
        with np.errstate(invalid="ignore"):  # of a variance below 0, which is refused below
            scale = weight / np.sqrt(variance + BATCH_NORM_EPSILON)
        return (kernel * scale[:, None, None, None]).transpose(2, 3, 1, 0), bias - mean * scale

    def read(path, leaf):
        *modules, kind = (entry.key for entry in path)
        if modules == ["fc"]:
            return np.ascontiguousarray(_finite(state_dict, "fc.weight").T, np.float32)
        array = folded(".".join(modules))[kind == "bias"].astype(np.float32)
        require_finite(f"{'.'.join(modules)}.{kind}", array)
        return np.ascontiguousarray(array)

    return jax.tree_util.tree_map_with_path(read, parameter_shapes())


def _finite(state_dict: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    array = state_dict[name].astype(np.float64)
    require_finite(name, array)
    return array


def _check_file(path: pathlib.Path) -> None:
    advice = f"give {PUBLISHED_NAME}, which torch-fidelity and pytorch-fid publish"
    if not path.is_file():
        raise UserError(f"Inception's weights {path} are not there: {advice}.")
    if path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(
            f"Inception's weights {path} are in a format that is not read here, where nothing is unpickled and no "
            f"graph of TensorFlow is run: {advice}, or a .safetensors of the same names."
        )


def _refuse_other_inceptions(found: Mapping[str, tuple[int, ...]], path: pathlib.Path) -> None:
    """Raises UserError for the Inception v3 of torchvision, whose names are nearly the same."""
    classes = (found.get("fc.weight") or (NUM_CLASSES,))[0]
    if classes == 1000 or any(name.startswith("AuxLogits.") for name in found):
        raise UserError(
            f"{path} holds torchvision's Inception v3, trained anew with {classes} classes, and FID in its features "
            f"is another number than everybody reports: give {PUBLISHED_NAME}, which torch-fidelity and pytorch-fid "
            f"publish."
        )


def cached_path(sha256: str) -> pathlib.Path:
    """Where the converted weights of a file of that hash are kept."""
    return cache_folder() / f"inception-{sha256}.safetensors"


def _read_cached(path: pathlib.Path) -> Params | None:
    """What `_write_cached` wrote; nothing if it is not there or no longer what it was."""
    if not path.is_file():
        return None
    try:
        expected = open_tensors(path).metadata.get("sha256")
        arrays = read_tensors(path)
        params = jax.tree_util.tree_map_with_path(lambda where, _: arrays[_name(where)], parameter_shapes())
        if tree_sha256(params) == expected:
            return params
        reason = "its hash is another"
    except (UserError, KeyError, OSError) as error:
        reason = first_line(error)
    log.warning("%s is damaged (%s): it is made anew.", path, reason)
    return None


def _write_cached(path: pathlib.Path, params: Params) -> None:
    """Keeps parameters for the next time, if that can be done."""
    arrays = {_name(where): leaf for where, leaf in jax.tree_util.tree_leaves_with_path(params)}
    try:
        write_tensors(path, arrays, {"sha256": tree_sha256(params)})
    except OSError as error:
        log.warning("%s cannot be written (%s): the weights will be converted again.", path, first_line(error))


def _name(path: tuple[jax.tree_util.DictKey, ...]) -> str:
    return ".".join(entry.key for entry in path)
