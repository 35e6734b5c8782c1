"""A reference of our own: what ADM's reference files hold, made of any images.

An npz file with `mu`, `sigma` (pool features of all images), `mu_s`, `sigma_s` (spatial ones), `arr_0` (10,000 of the
images, spread evenly), and `about`, JSON: how many images there are, the hash of their hashes in order, their shape,
the weights' hash, and the distances of two halves of them.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from ard_jax.data import Identity, PixelRows, Source
from ard_jax.errors import UserError
from ard_jax.evaluation import InceptionFeatures, adm
from ard_jax.evaluation.adm_files import ABOUT, IMAGES, POOL, SPATIAL
from ard_jax.evaluation.frechet import half_mask
from ard_jax.evaluation.inception import CHANNELS
from ard_jax.files import join_npz
from ard_jax.measuring.inception import batch_size, in_colour
from ard_jax.measuring.parts import PART, make_parts, read_parts
from ard_jax.parallel import is_first
from ard_jax.version import __version__

KEPT = 10_000  # images, with which precision and recall are measured
PARTS = 16  # at most, each with 0.13 GB of sums
LAYERS = {"pool": POOL, "spatial": SPATIAL}


class _Numbered:
    """Batches of images with the numbers of their rows; see `parts.Rows`."""

    def __init__(self, source: Source):
        self.rows = PixelRows(source, np.arange(len(source)))

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(self), size):
            if wanted(start):
                numbers = np.arange(start, min(start + size, len(self)))
                yield numbers, in_colour(self.rows[numbers])


def make_reference(
    network: InceptionFeatures, source: Source, identity: Identity, path: pathlib.Path, folder: pathlib.Path
) -> None:
    """Writes a reference file of all images of a source.

    Args:
        network: of its features, on all devices of this process.
        source: of images.
        identity: of these, see `data.identify`.
        path: of the file.
        folder: for what is found on the way, which all processes see: one that was killed goes on from there.

    Raises:
        UserError: there are fewer than 2 images.
    """
    if len(source) < 2:
        raise UserError(f"A reference was asked of {len(source)} image(s), but a covariance needs 2: give more.")
    images = _Numbered(source)
    half, kept = half_mask(len(images)), _kept(len(images))

    def look(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        halves = {layer: adm.Halves() for layer in LAYERS}
        hashes, shown = [], [np.empty((0, *images.rows.shape[1:3], CHANNELS), np.uint8)]
        for numbers, batch in batches:
            hashes += [hashlib.sha256(image.tobytes()).digest() for image in batch]
            shown.append(batch[kept[numbers]])
            (features,) = network.stream([batch], batch_size())
            for layer, running in halves.items():
                running.add(getattr(features, layer), half[numbers])
        sums = {f"{layer}_{name}": array for layer in LAYERS for name, array in halves[layer].arrays().items()}
        return {IMAGES: np.concatenate(shown), "hashes": np.frombuffer(b"".join(hashes), np.uint8), **sums}

    of = {"sha256": network.sha256, "data": dict(identity), "shape": list(images.rows.shape[1:])}
    parts = make_parts(look, images, folder, of, batch_size(), max(PART, -(-len(images) // PARTS)))
    if not is_first():
        return
    halves, digest = {layer: adm.Halves() for layer in LAYERS}, hashlib.sha256()
    for part in read_parts(parts, without=IMAGES):
        digest.update(part.pop("hashes").tobytes())  # each image's own: how many a part has is up to the devices
        for layer, running in halves.items():
            own = {name.removeprefix(f"{layer}_"): array for name, array in part.items()}
            running.merge(adm.Halves.from_arrays(own))
    arrays: dict[str, np.ndarray] = {}
    for layer, names in LAYERS.items():
        arrays |= dict(zip(names, halves[layer].whole(), strict=True))
    distances = {"fd": halves["pool"].distance(), "sfid": halves["spatial"].distance()}
    about = {
        "images": len(images),
        "images_sha256": digest.hexdigest(),
        "image_shape": [*images.rows.shape[1:3], CHANNELS],
        "weights_sha256": network.sha256,
        "published_weights": network.is_published,
        "halves": {name: distance for name, distance in distances.items() if distance is not None},
        "version": __version__,
    }
    arrays[ABOUT] = np.array(json.dumps(about))
    join_npz(path, parts, {IMAGES: (int(kept.sum()), *images.rows.shape[1:3], CHANNELS)}, arrays)


def _kept(count: int) -> np.ndarray:
    """Which images are kept, spread evenly: bool (count,)."""
    kept = np.zeros(count, bool)
    some = min(count, KEPT)
    kept[np.arange(some) * count // some] = True
    return kept
