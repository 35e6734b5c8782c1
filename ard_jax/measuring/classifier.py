"""Samples held against real images in the features of a small network that is trained on these images.

A Fréchet distance so measured compares models here, and with nothing else.
"""

import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from ard_jax.captions.texts import texts_of_data
from ard_jax.conditions import Conditions
from ard_jax.data import PixelRows, Source, labels_and_images
from ard_jax.drawing import open_real_images
from ard_jax.errors import UserError
from ard_jax.evaluation import (
    FeatureExtractor,
    FeatureStatistics,
    Judge,
    distance_interval,
    distance_of_halves,
    disturb,
    feature_statistics,
    frechet_distance,
    influence,
    precision_recall,
    train_feature_net,
    train_judge,
)
from ard_jax.measuring.parts import make_parts, read_parts
from ard_jax.measuring.samples import Held, Samples, compared_rows, count_compared
from ard_jax.models import AutoencoderKL
from ard_jax.types import Params, PyTree

log = logging.getLogger("ard_jax")

# Real and generated images that precision and recall compare, at most: their cost is quadratic.
NEIGHBOUR_LIMIT = 10_000
REAL_LIMIT = 50_000
DISTURBED_BYTES = 2**26  # of images that are disturbed at once, which takes twenty times as much for a moment


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A `Yardstick`: a small classifier, or a judge that knows captions, and the real images as it sees them.

    Attributes:
        own: features of the real images, without those held out of training (image, feature).
        network: uint8 images → features (image, feature).
        network_words: it in words.
        samples: how many of a model are compared.
        conditions: what the numbers of samples stand for.
        neighbours: of precision and recall.
        judged: how well a judge knows the captions of real images, as `Results.judge` has it.
        examples: of a judge, an image of each caption.
        example_features: of a judge, of all images of each caption (image, feature).
    """

    own: np.ndarray
    network: FeatureExtractor | Judge
    network_words: str
    samples: int
    conditions: Conditions
    neighbours: int
    judged: Mapping[str, Any] | None = None
    examples: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    example_features: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def about(self) -> str:
        fewest = min(len(self.own), self.samples)
        few = "" if self._are_enough(fewest) else f"; no Fréchet distance, which {fewest} images are too few for"
        return f"features of {self.network_words}; not comparable with ImageNet FID{few}"

    def _are_enough(self, fewest: int) -> bool:
        return fewest > self.network.num_features

    @property
    def real_images(self) -> int:
        return len(self.own)

    @property
    def judge(self) -> Judge | None:
        return self.network if isinstance(self.network, Judge) else None

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """Nothing but the network itself, which is trained in each run."""
        return {"features": "classifier" if self.judge is None else "judge", "sha256": self.network.sha256}

    @functools.cached_property
    def halves(self) -> dict[str, float]:
        found = distance_of_halves(self.own)
        return {} if found is None else {"fd": found}

    def measure(self, samples: Samples, folder: pathlib.Path) -> Held:
        """Fréchet distance to the real images, unless there are too few of either, precision and recall; of a judge
        the recall of captions, and the distance of real images of these captions. See `Yardstick`.

        Images that are not compared (`compared_rows`) count for the recall of captions alone.
        """

        def look(batches: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
            return {"features": np.concatenate([self.network(images) for images in batches])}

        of = {**self.facts, "samples": samples.sha256}
        parts = make_parts(look, samples.images, folder, of, self.network.batch_size)
        features = np.concatenate([part["features"] for part in read_parts(parts)])
        compared = compared_rows(samples.labels, self.conditions)
        held = self._distances(features[compared])
        judge, captions = self.judge, self._captions(samples)
        if judge is None or captions is None:
            return held
        is_trained = samples.labels < self.conditions.for_training
        numbers = held.numbers | _recall(judge, features, captions, is_trained)
        if "fd" in numbers:
            real = _in_turn(self.example_features, list(itertools.compress(captions, compared)))
            numbers["fd_least"] = frechet_distance(self.statistics, feature_statistics(real))
        return held._replace(numbers=numbers)

    def _distances(self, features: np.ndarray) -> Held:
        count = min(len(self.own), len(features), NEIGHBOUR_LIMIT)
        spread = np.linspace(0, len(self.own) - 1, count).astype(int)  # a folder's images come class by class
        precision, recall = precision_recall(self.own[spread], features[:count], k=self.neighbours)
        found: dict[str, Any] = {"precision": precision, "recall": recall}
        if not self._are_enough(min(len(self.own), len(features))):
            return Held(found, len(features))
        own = feature_statistics(features)
        distance, parts = frechet_distance(self.statistics, own), influence(self.statistics, own, features)
        found |= {
            "fd": distance,
            "fd_interval": distance_interval(distance, parts),
            "fd_halves": distance_of_halves(features),
        }
        return Held(found, len(features), parts)

    @functools.cached_property
    def statistics(self) -> FeatureStatistics:
        """Of the real images' features."""
        return feature_statistics(self.own)

    def _captions(self, samples: Samples) -> list[str] | None:
        """Of each sample, if a judge knows them all."""
        if self.judge is None:
            return None
        words = {int(number): self.conditions.words(int(number)) for number in np.unique(samples.labels)}
        if not set(words.values()) <= set(self.judge.captions):
            log.warning("the recall of captions is left out: some that were sampled are of no real image.")
            return None
        return [words[int(number)] for number in samples.labels]


def train_classifier(
    config: ml_collections.ConfigDict,
    source: Source,
    vae: tuple[AutoencoderKL, Params] | None,
    conditions: Conditions,
) -> Classifier:
    """Reads the real images and trains the network that looks at them; a judge sees those that are held out as well.

    All processes have the first one's network: what each trains differs in its last bits where its cores are others.

    Args:
        config: `evaluate` says how long it is trained, `run.in_memory` how many bytes of images memory may hold.
        source: of real images.
        vae: of a model of latents.
        conditions: that samples were drawn of.
    """
    settings = config.evaluate
    common = {
        "samples": count_compared(config.sample, conditions),
        "conditions": conditions,
        "neighbours": settings.neighbours,
    }
    texts = [] if config.data.num_classes else _texts_of(config, source)
    if len(set(texts)) < 2:  # one class, or no caption that differs from the others
        images, labels = labels_and_images(source, REAL_LIMIT, config.run.in_memory)
        labels = labels if config.data.num_classes else np.zeros_like(labels)
        net = train_feature_net(images, labels, config.data.num_classes or 1, steps=settings.feature_steps)
        net = dataclasses.replace(net, params=_of_first(net.params))
        words = f"a small classifier trained on the same images (held-out accuracy {net.held_out_accuracy:.3f})"
        return _said(Classifier(net(images), net, words, **common))
    if (config.encode if vae else config.data).source == "openmoji":
        source = open_real_images(_with_held_out(config), vae)
    images, numbers = labels_and_images(source, REAL_LIMIT, config.run.in_memory)
    captions = [texts[number] for number in numbers]
    judge = train_judge(images, captions, steps=settings.judge_steps)
    params, embedded = _of_first((judge.params, judge.embedded))
    judge = dataclasses.replace(judge, params=params, embedded=embedded)
    held_out = {conditions.words(number) for number in range(conditions.for_training, len(conditions))}
    is_trained = np.array([caption not in held_out for caption in captions])
    features = judge(images)
    judged = {
        "real": _recall(judge, features, captions, is_trained),
        "augmented": _recall(judge, _features_of_disturbed(judge, images), captions, is_trained),
    }
    own = features[is_trained] if is_trained.any() else features
    words = "a small judge of images and captions, trained on the same images"
    rows: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        rows.setdefault(caption, []).append(row)
    examples = _Examples(images, {caption: places[0] for caption, places in rows.items()})
    looks = {caption: features[places] for caption, places in rows.items()}
    return _said(Classifier(own, judge, words, **common, judged=judged, examples=examples, example_features=looks))


def _of_first(tree: PyTree) -> PyTree:
    """The first process's arrays on all of them, bit by bit."""
    if jax.process_count() == 1:
        return tree

    def sent(leaf: jax.typing.ArrayLike) -> np.ndarray:
        own = np.asarray(leaf)
        told = multihost_utils.broadcast_one_to_all(np.frombuffer(own.tobytes(), np.uint8))
        return np.frombuffer(np.asarray(told).tobytes(), own.dtype).reshape(own.shape)

    return jax.tree.map(sent, tree)


def _said(classifier: Classifier) -> Classifier:
    """Says in the log what will be left out."""
    fewest, wanted = min(len(classifier.own), classifier.samples), classifier.network.num_features + 1
    if fewest < wanted:
        log.warning("%d images are too few for a Fréchet distance, which wants %d: left out.", fewest, wanted)
    return classifier


class _Examples(Mapping[str, np.ndarray]):
    """The first image of each caption."""

    def __init__(self, images: np.ndarray | PixelRows, rows: dict[str, int]):
        self._images, self._rows = images, rows

    def __getitem__(self, caption: str) -> np.ndarray:
        return self._images[np.array([self._rows[caption]])][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _in_turn(rows: Mapping[str, np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """A row of each caption's own, (caption, feature): each time that it comes the next one, and so round."""
    turns = {caption: itertools.cycle(own) for caption, own in rows.items()}
    return np.stack([next(turns[caption]) for caption in captions])


def _features_of_disturbed(judge: Judge, images: np.ndarray | PixelRows) -> np.ndarray:
    """Of images as generated ones may be."""
    rng, at_once = np.random.default_rng(1), max(1, DISTURBED_BYTES // int(np.prod(images.shape[1:])))
    parts = [judge(disturb(images[start : start + at_once], rng)) for start in range(0, len(images), at_once)]
    return np.concatenate(parts)


def _with_held_out(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same of OpenMoji's pictures with those that are held out of training."""
    whole = config.copy_and_resolve_references()
    with whole.unlocked():
        whole.data.split = whole.encode.split = "all"
    return whole


def _texts_of(config: ml_collections.ConfigDict, source: Source) -> list[str]:
    """The captions of the real images by number, none where they have none."""
    try:
        return texts_of_data(config, source).texts
    except UserError as error:
        log.warning("captions are not judged, since the real images have none: %s", error)
        return []


def _recall(
    judge: Judge, features: np.ndarray, captions: list[str], is_trained: np.ndarray
) -> dict[str, dict[str, float]]:
    """recall_at_1 and recall_at_5, each of captions that were trained on and of those held out, where there are any."""
    found: dict[str, dict[str, float]] = {"recall_at_1": {}, "recall_at_5": {}}
    for part, rows in (("trained", is_trained), ("held_out", ~is_trained)):
        if rows.any():
            own = [caption for caption, is_own in zip(captions, rows, strict=True) if is_own]
            recall = judge.recall_of_features(features[rows], own, (1, 5))
            found["recall_at_1"][part], found["recall_at_5"][part] = recall[1], recall[5]
    return found
