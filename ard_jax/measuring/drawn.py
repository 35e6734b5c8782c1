"""Samples that are drawn while they are measured: from the sampler into the features, and nothing keeps them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from ard_jax.captions.conditions import inputs_of
from ard_jax.conditions import Conditions
from ard_jax.config import flatten, plain
from ard_jax.drawing import (
    Drawable,
    check_labels,
    checked_levels,
    choose_numbers,
    image_shape,
    make_decoder,
    make_drawing,
    to_levels,
)
from ard_jax.measuring.samples import Samples
from ard_jax.models import AutoencoderKL
from ard_jax.parallel import batch_shards, equal_batches, put_batch, run_batches
from ard_jax.sampled import SAMPLED, drawn_with
from ard_jax.types import Params


class Drawn:
    """The images that the stage `sample` would write, drawn on the devices of this process; see `samples.ImageRows`.

    An image is drawn when it is asked for, from its own number's noise, so that of several processes each may draw its
    share, and one that is stopped draws none again that was measured.
    """

    def __init__(
        self,
        model: Drawable,
        conditions: Conditions,
        vae: tuple[AutoencoderKL, Params] | None,
        config: ml_collections.ConfigDict,
        mesh: Mesh,
    ):
        """See `draw_samples`."""
        drawn, decoder = make_drawing(model.sampler, config, mesh), make_decoder(vae, config, mesh)
        self._settings, self._shape = config.sample, image_shape(config, vae)
        self._size = config.sample.batch_size * batch_shards(mesh)

        def draw(index: np.ndarray) -> tuple[jax.Array, jax.Array]:
            numbers = choose_numbers(config.sample, index, conditions)
            batch = {"index": index, "label": numbers, "condition": conditions.rows(numbers)}
            images, *_ = drawn(model.params, put_batch(batch, mesh))
            return to_levels(decoder(images) if decoder else images)

        self._draw = draw

    def __len__(self) -> int:
        return self._settings.count

    def batches(self, size: int, wanted: Callable[[int], bool]) -> Iterator[np.ndarray]:
        """Batches of `size` images whose first one is wanted; `sample.batch_size` are drawn at a time, whatever it is.

        Raises:
            UserError: the model's images are not finite.
        """
        spans = [range(start, min(start + size, len(self))) for start in range(0, len(self), size) if wanted(start)]
        drawn = self._in_order([number for span in spans for number in span])
        held = np.empty((0, *self._shape), np.uint8)
        for span in spans:
            while len(held) < len(span):
                held = np.concatenate([held, next(drawn)])
            yield held[: len(span)]
            held = held[len(span) :]

    def rows(self, numbers: Iterable[int]) -> np.ndarray:
        """Some images, in the order of their numbers: (row, …)."""
        return np.concatenate([np.empty((0, *self._shape), np.uint8), *self._in_order(sorted(map(int, numbers)))])

    def _in_order(self, numbers: list[int]) -> Iterator[np.ndarray]:
        batches = equal_batches(np.array(numbers, np.int32), self._size)
        return (checked_levels(*drawn) for drawn in run_batches(self._draw, batches))


def draw_samples(
    model: Drawable,
    conditions: Conditions,
    vae: tuple[AutoencoderKL, Params] | None,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
) -> Samples:
    """Samples of a model that are drawn as they are needed.

    Args:
        model: to draw from, whose parameters lie on the mesh.
        conditions: that they are drawn of.
        vae: of models of latents, see `workdir.find_vae`.
        config: `sample` says how many, of which conditions, from which seed.
        mesh: of devices of this process alone.

    Raises:
        UserError: `sample.labels` or `sample.held_out` ask for what is not there.
    """
    check_labels(config.sample, conditions)
    drawn = {key: value for key, value in flatten(plain(config)).items() if key.startswith(SAMPLED)}
    of = {**drawn, **drawn_with(inputs_of(conditions), vae, config.data.space), "ema": model.facts["ema_sha256"]}
    sha256 = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    labels = choose_numbers(config.sample, np.arange(config.sample.count), conditions)
    return Samples(Drawn(model, conditions, vae, config, mesh), labels, sha256, model.facts)
