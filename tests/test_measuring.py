"""Samples held against real images: parts that survive, Inception's yardstick, references of our own, intervals."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from inception_fixtures import random_images, write_weights
from PIL import Image
from pipeline_fixtures import ROOT, SMOKE, copy, done, files, run, sentence, smoke

from ard_jax.captions.conditions import load_conditions
from ard_jax.conditions import Labels
from ard_jax.config import default_config
from ard_jax.data import InMemory, PixelRows, image_source, labels_and_images
from ard_jax.drawing import choose_numbers, drawable
from ard_jax.errors import UserError
from ard_jax.evaluation import (
    FeatureExtractor,
    InceptionFeatures,
    adm,
    adm_files,
    difference_interval,
    distance_interval,
    features,
    frechet,
    train_judge,
)
from ard_jax.evaluation.features import AT_ONCE, batch_size_of, train_feature_net
from ard_jax.evaluation.inception import Features
from ard_jax.evaluation.npz import NpzArray
from ard_jax.files import file_sha256, read_json, read_npz, tree_sha256
from ard_jax.hosts import wait_for_all
from ard_jax.measuring import Samples, classifier, draw_samples, inception, make_parts, read_parts, reference
from ard_jax.measuring.classifier import Classifier, train_classifier
from ard_jax.measuring.drawn import Drawn
from ard_jax.measuring.inception import open_inception
from ard_jax.paired import Paired
from ard_jax.parallel import local_mesh
from ard_jax.stages import evaluate
from ard_jax.workdir import load_student, load_teacher
from configs import smoke as smoke_config

WIDTHS = (12, 6, 5)  # of pool features, spatial ones and logits, in place of thousands


class Projection:
    """A network that is a matrix a layer, on averages of four pixels by four, and counts what it is shown."""

    is_published, sha256, dtype = True, "ab" * 32, "float32"

    def __init__(self):
        rng = np.random.default_rng(5)
        self.weights = [rng.normal(size=(4 * 4 * 3, width)) / 255 for width in WIDTHS]
        self.seen = 0

    def over(self, devices, dtype):
        self.dtype = dtype
        return self

    def stream(self, batches, batch_size):
        for images in batches:
            self.seen += len(images)
            yield self.of(images)

    def of(self, images):
        side = images.shape[1] // 4
        cells = images.astype(np.float64).reshape(len(images), 4, side, 4, side, 3).mean(axis=(2, 4))
        return Features(*((cells.reshape(len(images), -1) @ weight).astype(np.float32) for weight in self.weights))


@pytest.fixture
def network(monkeypatch):
    """`Projection` in Inception's place, in files of its widths."""
    made = Projection()
    monkeypatch.setattr(InceptionFeatures, "from_file", classmethod(lambda cls, path: made))
    for name, width in zip(("NUM_FEATURES", "NUM_SPATIAL", "NUM_CLASSES"), WIDTHS, strict=True):
        monkeypatch.setattr(adm_files, name, width)
    return made


def settings(folder, count, **evaluate):
    """A config that names weights and a reference."""
    config = default_config()
    config.sample.count = count
    config.evaluate.update(weights="weights.pth", reference=str(folder / "reference.npz"), split=20, **evaluate)
    return config


def save(folder, images, name="samples.npz", **arrays):
    np.savez(folder / name, images, **arrays)
    return folder / name


def opened(path):
    return Samples(NpzArray(path), np.zeros(len(NpzArray(path)), np.int32), file_sha256(path))


def moments(features):
    return adm.Gaussian(features.mean(axis=0, dtype=np.float64), np.cov(features.T.astype(np.float64)))


def of_halves(features):
    half = frechet.half_mask(len(features))
    return adm.frechet_distance(moments(features[half]), moments(features[~half]))


# ------------------------------------------------------------------------------------------------- intervals, halves


def test_influence_is_the_derivative_of_the_distance():
    rng = np.random.default_rng(0)
    real = moments(rng.normal(size=(500, 4)) * [1, 2, 1, 3])
    features = rng.normal(size=(300, 4)) + [0.5, 0, 0, 1]
    own = moments(features)

    def distance(weights):
        """Of samples that count so much, with the divisor of N in place of N - 1, which is no derivative's business."""
        mean = weights @ features
        centred = features - mean
        return adm.frechet_distance(adm.Gaussian(mean, (centred * weights[:, None]).T @ centred), real)

    found, equal = frechet.influence(real, own, features), np.full(300, 1 / 300)
    for row in (0, 7, 299):
        toward = 1e-5 * (np.eye(300)[row] - equal)
        slope = (distance(equal + toward) - distance(equal - toward)) / 2e-5
        assert found[row] == pytest.approx(slope, rel=0.03, abs=0.03)
    assert found.mean() == pytest.approx(0, abs=1e-9)


def test_an_interval_has_as_many_other_samples_as_it_says():
    """Of 200 sets of samples from one model, about 95 % have their distance within an interval, less its own bias."""
    rng = np.random.default_rng(1)
    real, shift = moments(rng.normal(size=(20_000, 3))), np.array([1, 0, 0])
    distances, widths = [], []
    for _ in range(200):
        features = rng.normal(size=(400, 3)) + shift
        own = moments(features)
        distances.append(adm.frechet_distance(own, real))
        low, high = distance_interval(distances[-1], frechet.influence(real, own, features), draws=200)
        assert low < distances[-1] < high
        widths.append((high - low) / 2)
    within = np.abs(distances - np.mean(distances)) <= np.mean(widths)
    assert 0.9 <= within.mean() <= 0.99


def test_a_difference_of_paired_samples_is_known_better_than_either_distance():
    """Of 200 pairs of sets with most of their noise in common, as many as it says; and wide where nothing is."""
    rng = np.random.default_rng(2)
    real = moments(rng.normal(size=(20_000, 3)))

    def sets(common):
        shared = rng.normal(size=(400, 3)) * common
        return [np.array([1, 0, 0]) + shared + rng.normal(size=(400, 3)) * np.sqrt(1 - common**2) for _ in range(2)]

    def draw(common):
        pair = sets(common)
        own = [moments(features) for features in pair]
        distance = [adm.frechet_distance(one, real) for one in own]
        parts = [frechet.influence(real, one, features) for one, features in zip(own, pair, strict=True)]
        low, high = difference_interval(distance[0] - distance[1], parts[0] - parts[1], draws=200)
        alone = distance_interval(distance[0], parts[0], draws=200)
        return distance[0] - distance[1], (high - low) / 2, (alone[1] - alone[0]) / 2

    differences, paired, alone = np.array([draw(0.95) for _ in range(200)]).T
    within = np.abs(differences - differences.mean()) <= paired.mean()  # their true difference is 0, as is their bias
    assert 0.9 <= within.mean() <= 0.99 and paired.mean() < alone.mean() / 2
    _, apart, alone = draw(0)
    assert apart == pytest.approx(np.sqrt(2) * alone, rel=0.2)


def test_the_least_distance_is_that_of_the_real_pictures_of_the_captions_that_were_sampled(tmp_path):
    conditions, real = Labels(90), random_images(8, 90)
    words = [conditions.words(number) for number in range(90)]
    judge = train_judge(real, words, steps=2)
    looks = dict(zip(words, judge(real)[:, None], strict=True))
    yardstick = Classifier(judge(real), judge, "a judge", 120, conditions, 3, example_features=looks)
    labels = np.random.default_rng(3).integers(0, 90, 120)

    def measure(images, name):
        samples = opened(save(tmp_path, images, name))._replace(labels=labels)
        return yardstick.measure(samples, tmp_path / f"parts of {name}").numbers

    perfect, poor = measure(real[labels], "perfect.npz"), measure(random_images(8, 120, seed=1), "poor.npz")
    assert perfect["fd"] == pytest.approx(perfect["fd_least"], rel=1e-6) and perfect["fd_least"] > 1e-3
    assert poor["fd_least"] == perfect["fd_least"] < poor["fd"]


def test_a_caption_of_several_pictures_is_represented_by_each_of_them_in_turn(tmp_path):
    """Shapes have two pictures a caption, of which a perfect model draws one as often as the other."""
    config = default_config()
    config.data.update(source="shapes", space="pixel", image_size=16, channels=3, num_classes=0)
    config.evaluate.judge_steps, config.sample.count = 2, 200
    source = image_source(config.data)
    images, numbers = labels_and_images(source)
    words = [source.captions[number] for number in numbers]
    yardstick = train_classifier(config, source, None, Labels(96, tuple(words)))
    labels = np.random.default_rng(3).integers(0, 96, 200)
    drawn, of = [], {word: [row for row, other in enumerate(words) if other == word] for word in words}
    for label in labels:
        rows = of[words[label]]
        drawn.append(rows[0])
        rows.append(rows.pop(0))
    samples = opened(save(tmp_path, images[drawn]))._replace(labels=labels)
    found = yardstick.measure(samples, tmp_path / "parts").numbers
    assert found["fd_least"] == pytest.approx(found["fd"], rel=1e-4) and found["fd"] > 1e-3
    assert set(map(len, of.values())) == {2} and np.array_equal(yardstick.examples[words[1]], images[0])


class HeldOut(Labels):
    """The last two of them are held out of training."""

    @property
    def for_training(self):
        return self.count - 2


@pytest.mark.parametrize(
    ("given", "compared"),
    [
        ({"held_out": 20}, 80),
        ({"labels": (0, 4, 5, 1)}, 50),  # 4 and 5 are held out
        ({"held_out": 100}, 100),  # there are no others
    ],
)
def test_what_was_measured_says_how_many_samples_were_compared(tmp_path, network, given, compared):
    """In either features, those of captions that were held out of training are left out if there are others."""
    conditions, images, config = HeldOut(6), random_images(8, 100), settings(tmp_path, 100)
    config.sample.update(given)
    config.data.update(image_size=8, channels=3, num_classes=6)
    labels = choose_numbers(config.sample, np.arange(100), conditions)
    samples = opened(save(tmp_path, images))._replace(labels=labels)
    kept = images[labels < 4] if compared < 100 else images
    alone = opened(save(tmp_path, kept, "alone.npz"))
    real = random_images(8, 100, seed=1)
    save(tmp_path, real, "reference.npz")
    source = InMemory({"image": real.astype(np.float32) / 127.5 - 1, "label": np.arange(100, dtype=np.int32) % 6})
    config.evaluate.feature_steps = 2
    yardsticks = (
        open_inception(config, (8, 8, 3), conditions, tmp_path / "of"),
        train_classifier(config, source, None, conditions),
    )
    for number, yardstick in enumerate(yardsticks):
        held = yardstick.measure(samples, tmp_path / f"samples {number}")
        expected = yardstick.measure(alone, tmp_path / f"alone {number}")
        assert held.compared == expected.compared == len(kept) == compared
        assert held.numbers == expected.numbers, yardstick.about
    assert ("50 images are too few" in yardsticks[1].about) == (compared == 50)
    config.evaluate.split = compared + 1
    with pytest.raises(UserError, match=f"of {compared} samples in splits of {compared + 1}"):
        open_inception(config, (8, 8, 3), conditions, tmp_path / "of")


def test_halves_are_as_far_apart_as_chance_has_them():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(101, 3))
    half = frechet.half_mask(101)
    assert half.sum() == 50 and np.array_equal(half, frechet.half_mask(101)) and not half[:50].all()
    own = [frechet.feature_statistics(features[rows]) for rows in (half, ~half)]
    assert frechet.distance_of_halves(features) == frechet.frechet_distance(*own) > 0
    assert frechet.distance_of_halves(features[:6]) is None  # no half has more samples than features


def test_running_halves_are_those_of_all():
    features = np.random.default_rng(3).normal(size=(90, 4)) + 3000
    half = frechet.half_mask(90)
    first, second = adm.Halves(), adm.Halves()
    first.add(features[:40], half[:40])
    second.add(features[40:], half[40:])
    whole = adm.Halves()
    for part in (first, second):
        whole.merge(adm.Halves.from_arrays(part.arrays()))  # as a file gives them back
    for got, expected in zip(whole.whole(), moments(features), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9)
    assert whole.distance() == pytest.approx(of_halves(features), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- parts


def test_a_part_that_is_there_is_not_made_again(tmp_path):
    images, seen = random_images(4, 50), []

    def look(batches):
        found = [*batches]
        seen.append([len(batch) for batch in found])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {"x": np.concatenate(found).mean(axis=(1, 2, 3))}

    given = NpzArray(save(tmp_path, images)), tmp_path / "parts", {"of": "these"}, 8, 15
    with pytest.raises(KeyboardInterrupt):
        make_parts(look, *given)
    parts = make_parts(look, *given)
    assert seen == [[8, 8], [8, 8], [8, 8], [8, 8], [2]]  # parts of 16; the third was begun anew
    assert [part.stem for part in parts] == ["000000000", "000000016", "000000032", "000000048"]
    found = np.concatenate([part["x"] for part in read_parts(parts)])
    np.testing.assert_array_equal(found, images.mean(axis=(1, 2, 3)))
    make_parts(look, *given)
    assert len(seen) == 5
    make_parts(look, *given[:2], {"of": "others"}, *given[3:])
    assert len(seen) == 9


def test_rows_of_a_file_are_read_one_by_one(tmp_path):
    images = random_images(4, 9)
    file = NpzArray(save(tmp_path, images))
    np.testing.assert_array_equal(file.rows(np.array([1, 2, 7])), images[[1, 2, 7]])
    assert file.rows([]).shape == (0, 4, 4, 3)
    np.testing.assert_array_equal(np.concatenate([*file.batches(2, lambda start: start in (2, 8))]), images[[2, 3, 8]])


# ---------------------------------------------------------------------------------------------- real images, streamed


def test_images_that_memory_does_not_hold_train_the_same_network():
    images = random_images(8, 60)
    labels = np.arange(60, dtype=np.int32) % 3
    source = InMemory({"image": images.astype(np.float32) / 127.5 - 1, "label": labels})
    held, own = labels_and_images(source)
    rows, also = labels_and_images(source, limit_bytes=1000)
    assert isinstance(held, np.ndarray) and isinstance(rows, PixelRows)
    np.testing.assert_array_equal(held, images), np.testing.assert_array_equal(own, also)
    np.testing.assert_array_equal(rows[images[:, 0, 0, 0] > 99], images[images[:, 0, 0, 0] > 99])
    for classes, given in ((3, labels), (1, np.zeros(60, np.int32))):
        one, other = (train_feature_net(some, given, classes, steps=3) for some in (held, rows))
        np.testing.assert_array_equal(one(held), other(rows))
        assert one.sha256 == other.sha256 and one.held_out_accuracy == other.held_out_accuracy


def test_large_images_are_trained_on_in_turns_to_the_same_network(monkeypatch):
    images, labels = random_images(8, 40), np.arange(40, dtype=np.int32) % 4
    whole = train_feature_net(images, labels, 4, steps=4)
    monkeypatch.setattr(features, "AT_ONCE_BYTES", 1)
    turns = train_feature_net(images, labels, 4, steps=4)
    assert features._turns((36, 8, 8, 3)) == 4 and features._turns((35, 8, 8, 3)) == 1
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(turns.params), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    assert whole.sha256 != turns.sha256  # the other sums were taken


def test_large_images_are_looked_at_a_few_at_a_time():
    assert batch_size_of((8, 8, 1)) == AT_ONCE and batch_size_of((256, 256, 3)) == 64
    assert 64 < batch_size_of((128, 128, 3)) < AT_ONCE


# ---------------------------------------------------------------------------------------------------------- Inception


def test_inception_measures_as_the_files_do(tmp_path, network):
    """The numbers of `adm_metrics`, with those of halves and an interval beside them."""
    samples, real = random_images(8, 60), random_images(8, 50, seed=1)
    of_real = network.of(random_images(8, 300, seed=2))
    statistics = {"mu": of_real.pool.mean(0), "sigma": np.cov(of_real.pool.T)}
    save(tmp_path, real, "reference.npz", **statistics)
    yardstick = open_inception(settings(tmp_path, 60), (8, 8, 3), Labels(1), tmp_path / "parts" / "reference")
    held = yardstick.measure(opened(save(tmp_path, samples)), tmp_path / "parts" / "x")
    got = held.numbers
    expected = adm_files.adm_metrics(tmp_path / "samples.npz", tmp_path / "reference.npz", network, split_size=20)
    assert expected.pop("sfid") is got["sfid"] is None
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert got["fd"] == got["fid"] and got["fd_interval"][0] < got["fd"] < got["fd_interval"][1]
    assert got["fd_halves"] == pytest.approx(of_halves(network.of(samples).pool), rel=1e-4)
    assert yardstick.facts["reference_sha256"] == file_sha256(tmp_path / "reference.npz")
    assert "weights abababab, the published ones" in yardstick.about
    # as in ADM's file: distances are to images that the file has not, and chance among the 50 it has is not theirs
    assert yardstick.real_images is None and yardstick.halves == {}


def test_a_file_of_images_alone_is_what_distances_are_to(tmp_path, network):
    real = random_images(8, 50, seed=1)
    save(tmp_path, real, "reference.npz")
    yardstick = open_inception(settings(tmp_path, 60), (8, 8, 3), Labels(1), tmp_path / "parts")
    assert yardstick.halves["fd"] == pytest.approx(of_halves(network.of(real).pool), rel=1e-4)
    assert yardstick.real_images == 50


def test_a_killed_measurement_goes_on(tmp_path, network, monkeypatch):
    save(tmp_path, random_images(8, 50, seed=1), "reference.npz")
    samples = opened(save(tmp_path, random_images(8, 300)))
    monkeypatch.setattr(inception, "BATCH_SIZE", 4)
    monkeypatch.setattr("ard_jax.measuring.inception.make_parts", lambda *given: make_parts(*given, size=64))
    whole = (
        open_inception(settings(tmp_path, 300), (8, 8, 3), Labels(1), tmp_path / "a")
        .measure(samples, tmp_path / "b")
        .numbers
    )
    before = network.seen
    stream = network.stream

    def stop_later(batches, batch_size):
        for found in stream(batches, batch_size):
            yield found
            if network.seen - before > 200:
                raise KeyboardInterrupt

    monkeypatch.setattr(network, "stream", stop_later)
    yardstick = open_inception(settings(tmp_path, 300), (8, 8, 3), Labels(1), tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        yardstick.measure(samples, tmp_path / "d")
    monkeypatch.setattr(network, "stream", stream)
    there = network.seen
    assert yardstick.measure(samples, tmp_path / "d").numbers == whole
    assert network.seen - there == 300 - 128  # of the reference and of two whole parts nothing


def make(network, images, path, folder, seed=0):
    source = InMemory({"image": images.astype(np.float32) / 127.5 - 1, "label": np.zeros(len(images), np.int32)})
    identity = {"classes": None, "records": len(images), "sha256": str(seed)}
    reference.make_reference(network, source, identity, path, folder)


def test_a_reference_of_our_own_is_what_numpy_makes_of_the_images(tmp_path, network, monkeypatch):
    monkeypatch.setattr(reference, "KEPT", 30)
    monkeypatch.setattr(reference, "PART", 32)
    images = random_images(8, 100)
    path = tmp_path / "reference.npz"
    make(network, images, path, tmp_path / "parts")
    found, features = read_npz(path), network.of(images)
    for names, layer in ((("mu", "sigma"), features.pool), (("mu_s", "sigma_s"), features.spatial)):
        for name, expected in zip(names, moments(layer), strict=True):
            np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found["arr_0"], images[np.arange(30) * 100 // 30])
    about = json.loads(str(found["about"]))
    assert about["halves"]["fd"] == pytest.approx(of_halves(features.pool), rel=1e-6) and about["images"] == 100
    other = images.copy()
    other[99, 0, 0, 0] ^= 1
    make(network, other, tmp_path / "other.npz", tmp_path / "others", seed=1)
    again = json.loads(str(read_npz(tmp_path / "other.npz")["about"]))
    assert again["images_sha256"] != about["images_sha256"]
    monkeypatch.setattr(inception, "BATCH_SIZE", 24)  # as of other devices, so that parts are others too
    make(network, images, tmp_path / "same.npz", tmp_path / "same")
    again = json.loads(str(read_npz(tmp_path / "same.npz")["about"]))
    assert again["images_sha256"] == about["images_sha256"]
    yardstick = open_inception(settings(tmp_path, 60), (8, 8, 3), Labels(1), tmp_path / "known")
    assert yardstick.halves == about["halves"] and yardstick.real_images == 100
    got = yardstick.measure(opened(save(tmp_path, images)), tmp_path / "x").numbers
    assert got["fid"] == pytest.approx(0, abs=1e-3) and got["sfid"] == pytest.approx(0, abs=1e-3)
    network.sha256 = "cd" * 32
    with pytest.raises(UserError, match="was made with weights abababab, but evaluate.weights are cdcdcdcd: give"):
        open_inception(settings(tmp_path, 60), (8, 8, 3), Labels(1), tmp_path / "known")
    with pytest.raises(
        UserError, match=r"^The reference \S+ was made with weights abababab, but the weights that were"
    ):
        adm_files.adm_metrics(tmp_path / "samples.npz", path, network, split_size=20)
    with pytest.raises(UserError, match="The images of this run are 16x16 and the reference images in .* 8x8, but"):
        open_inception(settings(tmp_path, 60), (16, 16, 3), Labels(1), tmp_path / "known")


# ------------------------------------------------------------------------------------------------------ in a run


def test_bfloat16_is_said_to_compare_with_nothing_and_parts_of_float32_are_not_taken_for_it(tmp_path, network, caplog):
    save(tmp_path, random_images(8, 50, seed=1), "reference.npz")
    samples = opened(save(tmp_path, random_images(8, 60)))
    open_inception(settings(tmp_path, 60), (8, 8, 3), Labels(1), tmp_path / "reference").measure(
        samples, tmp_path / "parts"
    )
    assert network.seen == 110 and not [m for m in caplog.messages if "computes in" in m]
    rounded = open_inception(settings(tmp_path, 60, dtype="bfloat16"), (8, 8, 3), Labels(1), tmp_path / "reference")
    assert network.dtype == rounded.facts["dtype"] == "bfloat16" and "not comparable" in rounded.about
    assert "computes in bfloat16: these numbers compare with no published ones" in caplog.text
    rounded.measure(samples, tmp_path / "parts")
    assert network.seen == 220


@pytest.fixture
def measured(pipeline, tmp_path, network):
    """A run of the smoke config, measured against a reference of its own."""
    workdir = copy(pipeline, tmp_path / "run", "teacher", "trajectories", "distill", "sample")
    path = tmp_path / "reference.npz"
    outcome = smoke("evaluate", workdir, "evaluate.weights=w.pth", flags=["--make-reference", path])
    assert outcome.status == 0 and f"written to {path}" in outcome.out, outcome.err
    assert not (workdir / "reference" / "parts").exists()
    flags = ("evaluate.features=inception", "evaluate.weights=w.pth", f"evaluate.reference={path}", "evaluate.split=20")
    outcome = smoke("evaluate", workdir, *flags)
    assert outcome.status == 0, outcome.err
    return workdir


def test_a_run_is_measured_and_shown_by_inception(measured, tmp_path):
    results = read_json(measured / "evaluate" / "results.json")
    model = results["models"]["ard"]
    path = measured / "sample" / "ard" / "samples.npz"
    network = Projection()
    images = np.repeat(read_npz(path)["arr_0"], 3, axis=-1)
    real = np.repeat(labels_and_images(image_source(smoke_config.get_config().data))[0], 3, axis=-1)
    seen, known = network.of(images), network.of(real)
    assert (
        model["fid"]
        == model["fd"]
        == pytest.approx(adm.frechet_distance(moments(seen.pool), moments(known.pool)), rel=1e-4)
    )
    assert model["sfid"] == pytest.approx(adm.frechet_distance(moments(seen.spatial), moments(known.spatial)), rel=1e-4)
    assert model["inception_score"] == pytest.approx(adm.inception_score(seen.logits, 20), rel=1e-6)
    precision, recall = adm.precision_recall(known.pool, seen.pool)
    assert (model["precision"], model["recall"]) == (precision, recall)
    assert results["real_images"] == len(real) == 1797 and results["labels"] == "uniform"
    assert results["measured_with"]["features"] == "inception-2015-12-05" and results["halves"].keys() == {"fd", "sfid"}
    assert not (measured / "evaluate" / "parts").exists() and "results.json" in done(measured / "evaluate")["sha256"]
    assert model["degradation"] == pytest.approx(model["fid"] - results["models"]["teacher"]["fid"])
    assert smoke("report", measured).status == 0
    page = (measured / "report" / "index.html").read_text()
    for said in (
        "FID\u00a0↓",
        "sFID\u00a0↓",
        "IS\u00a0↑",
        "95 % interval",
        "Two halves of the real images",
        "abababab",
    ):
        assert said in page, said
    assert "FD\u00a0↓" not in page and "Paper: ARD" not in page  # these are no ImageNet


@pytest.mark.slow
def test_a_killed_evaluation_looks_at_nothing_again(pipeline, tmp_path, monkeypatch):
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories", "distill", "sample")

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "write_json", kill)  # of its results, as a full disk would
        assert smoke("evaluate", workdir).status == 130
    assert sorted(path.name for path in (workdir / "evaluate" / "parts").iterdir()) == ["ard", "paired", "teacher"]
    monkeypatch.setattr(Paired, "compare", kill)
    monkeypatch.setattr(Paired, "error_given", kill)
    monkeypatch.setattr(FeatureExtractor, "__call__", once := Once(FeatureExtractor.__call__))
    assert smoke("evaluate", workdir).status == 0
    assert once.shapes == [(1797, 8, 8, 1)]  # the real images, and no samples
    results, expected = (read_json(folder / "evaluate" / "results.json") for folder in (workdir, pipeline))
    assert results == expected
    assert files(workdir / "evaluate") == files(pipeline / "evaluate")


def test_students_that_are_alike_share_their_programs(pipeline, compilations):
    config, mesh = smoke_config.get_config(), local_mesh(smoke_config.get_config().mesh)
    teacher = load_teacher(config, pipeline, mesh)
    first, second = (load_student(pipeline / "distill" / "ard", mesh) for _ in range(2))
    second = second._replace(params=jax.tree.map(lambda leaf: leaf / 2, second.params))
    paired = Paired(config, teacher, {"first": first}, load_conditions(config, pipeline), None, mesh)
    errors, pictures = paired.compare(first, 2)
    before = compilations.count
    assert paired.edits(first, 2).shape == (2, 3, 8, 8, 1)  # of which there are fewer rows
    assert before and paired.compare(second, 2)[0] != errors
    again, same = paired.compare(first, 2)
    assert compilations.count == before
    assert again == errors and np.array_equal(same, pictures)


def measured_with(workdir):
    return read_json(workdir / "evaluate" / "results.json")["measured_with"]


def drawing(source, target, *overrides):
    """`evaluate` as the fixture `measured` ran it, of samples that it draws itself."""
    workdir = copy(source, target, "teacher", "distill")
    path, weights = measured_with(source)["reference"], "evaluate.weights=w.pth"
    given = ("evaluate.features=inception", weights, f"evaluate.reference={source.parent / path}", "evaluate.split=20")
    return workdir, lambda: smoke("evaluate", workdir, *given, "evaluate.draw=True", *overrides)


def test_samples_go_from_the_sampler_into_the_features(measured, tmp_path):
    """With no file of them on the way, and the numbers of those that `sample` wrote."""
    workdir, measure = drawing(measured, tmp_path / "drawn")
    outcome = measure()
    assert outcome.status == 0, outcome.err
    got, expected = (read_json(folder / "evaluate" / "results.json") for folder in (workdir, measured))
    for model in expected["models"].values():
        assert model.pop("seconds_per_image") > 0
    for key in ("trained_mse", "times_seen"):
        assert expected["models"]["ard"].pop(key)  # its trajectories are not in this workdir
    assert expected["config"]["evaluate"].pop("draw") is False and got["config"]["evaluate"].pop("draw") is True
    assert got == expected
    assert not (workdir / "sample").exists() and not (workdir / "evaluate" / "parts").exists()


def test_a_killed_evaluation_that_draws_goes_on_after_its_last_whole_part(measured, tmp_path, network, monkeypatch):
    """Ten images are drawn and eight are looked at, at a time; of 72 it is killed in the second part of 24."""
    asked, in_order = [], Drawn._in_order

    def noted(self, numbers):
        asked.append(numbers)
        return in_order(self, numbers)

    monkeypatch.setattr(Drawn, "_in_order", noted)
    monkeypatch.setattr(inception, "BATCH_SIZE", 8)
    monkeypatch.setattr("ard_jax.measuring.inception.make_parts", lambda *given: make_parts(*given, size=24))
    workdir, measure = drawing(measured, tmp_path / "drawn", "sample.batch_size=10", "sample.models=('ard',)")
    stream = network.stream

    def stop_later(batches, batch_size):
        for found in stream(batches, batch_size):
            if asked and (shown := shown_before.append(found) or len(shown_before)) > 4:
                assert shown == 5
                raise KeyboardInterrupt
            yield found

    shown_before = []
    monkeypatch.setattr(network, "stream", stop_later)
    assert measure().status == 130
    monkeypatch.setattr(network, "stream", stream)
    assert measure().status == 0
    assert asked == [list(range(72)), list(range(24, 72))]
    got, expected = (read_json(folder / "evaluate" / "results.json")["models"]["ard"] for folder in (workdir, measured))
    for name in ("fid", "sfid", "inception_score", "precision", "recall", "fd_interval", "fd_halves", "psnr"):
        assert got[name] == pytest.approx(expected[name], rel=1e-6), name


class Once:
    """A method that notes the shapes of what it is called with."""

    def __init__(self, method):
        self.method, self.shapes = method, []

    def __get__(self, instance, owner):
        def call(images):
            self.shapes.append(images.shape)
            return self.method(instance, images)

        return call


GIVEN = ("evaluate.features=inception", "evaluate.weights=w.pth", "evaluate.reference=reference.npz")


@pytest.mark.parametrize(
    "overrides, said",
    [
        (GIVEN[:1], "evaluate.reference names no file, which Inception's features need: give ADM's, such as"),
        (GIVEN[::2], "evaluate.weights names no file, which Inception's features need: give weights-inception"),
        ((*GIVEN[:2], "evaluate.reference=nowhere.npz"), "nowhere.npz is not there: give an .npz file."),
        ((*GIVEN, "evaluate.split=73"), "of 72 samples in splits of 73, but"),
        ((*GIVEN, "evaluate.split=9", "evaluate.neighbours=40"), "k = 40 of 40 reference images and 72 samples"),
        (("evaluate.features=vgg",), "evaluate.features is 'vgg': choose classifier or inception"),
        (("evaluate.distances=float64",), "evaluate.distances is 'float64': choose float16 or float32"),
    ],
)
def test_settings_that_do_not_go_together(pipeline, network, tmp_path, monkeypatch, overrides, said):
    workdir = copy(pipeline, tmp_path, "teacher", "distill", "sample")
    save(tmp_path, random_images(8, 40), "reference.npz")
    monkeypatch.chdir(tmp_path)
    ended = run("evaluate", "--config", SMOKE, "--workdir", workdir, *(f"--config.{one}" for one in overrides))
    assert said in sentence(ended, "evaluate", last=True) and not (workdir / "evaluate").exists()


@pytest.mark.parametrize(
    "name, overrides, said",
    [
        ("x.npy", ("evaluate.weights=w.pth",), "x.npy: give the name of an .npz file."),
        ("x.npz", (), "evaluate.weights names no file"),
    ],
)
def test_references_that_cannot_be_made(network, tmp_path, name, overrides, said):
    ended = smoke("evaluate", tmp_path, *overrides, flags=["--make-reference", tmp_path / name])
    assert said in sentence(ended, "evaluate") and not (tmp_path / name).exists()


def test_a_reference_of_a_folder_with_a_broken_picture_names_it(network, tmp_path):
    pictures = tmp_path / "pictures" / "a"
    pictures.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(random_images(8, 1, seed=number)[0]).save(pictures / f"{number}.png")
    (pictures / "1.png").write_bytes(b"broken")
    given = ("data.source=folder", f"data.dir={pictures.parent}", "data.num_classes=1", "evaluate.weights=w.pth")
    outcome = smoke("evaluate", tmp_path / "run", *given, flags=["--make-reference", tmp_path / "x.npz"])
    assert str(pictures / "1.png") in sentence(outcome, "evaluate", last=True) and not (tmp_path / "x.npz").exists()


# ----------------------------------------------------------------------------------------------------- several hosts

PROGRAM = """
import json, pathlib, sys
import jax
index, count, port, name = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5]
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
sys.path.insert(0, "tests")
import test_measuring
print(json.dumps(getattr(test_measuring, name)(*map(pathlib.Path, sys.argv[5:]))))
"""


def on_hosts(function, *paths):
    """What a function of this module finds in two processes that are one job, and alone."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = str(taken.getsockname()[1])

    def start(index, count):
        words = [sys.executable, "-c", PROGRAM, str(index), str(count), port, function.__name__, *map(str, paths)]
        return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)

    running = [start(0, 2), start(1, 2), start(0, 1)]
    return [json.loads(one.communicate()[0].splitlines()[-1]) for one in running]


def see_in_parts(folder):
    """Statistics of samples.npz in a folder, and how many of its images this process was shown."""
    network = Projection()
    for name, width in zip(("NUM_FEATURES", "NUM_SPATIAL", "NUM_CLASSES"), WIDTHS, strict=True):
        setattr(adm_files, name, width)
    images = NpzArray(folder / "samples.npz")
    look = functools.partial(inception.look, network)
    parts = make_parts(look, images, folder / f"parts-{jax.process_count()}", {}, 16, 32)
    seen = adm_files.see((Features(**part) for part in read_parts(parts)), len(images))
    statistics = [array.tolist() for layer in (seen.of_pool, seen.of_spatial) for array in layer]
    return {"seen": network.seen, "statistics": statistics, "halves": seen.halves_of_pool.distance()}


@pytest.mark.slow
def test_two_hosts_and_one_find_the_same(tmp_path):
    save(tmp_path, random_images(8, 200))
    pair, other, alone = on_hosts(see_in_parts, tmp_path)
    assert pair["seen"] + other["seen"] == alone["seen"] == 200 and 0 < pair["seen"] < 200
    for found in (pair, other):
        for got, expected in zip(found["statistics"], alone["statistics"], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-9)
        assert found["halves"] == pytest.approx(alone["halves"], rel=1e-9)


def look_with_its_own(folder):
    """What a process says whose network is its own, and which parts there are then."""
    of, images = {"sha256": f"network {jax.process_index()}"}, NpzArray(folder / "samples.npz")
    parts = folder / f"parts-{jax.process_count()}"
    try:
        make_parts(lambda batches: {"x": np.concatenate([*batches])}, images, parts, of, 16, 32)
    except UserError as error:
        return str(error)
    return files(parts)


@pytest.mark.slow
def test_parts_of_hosts_that_look_with_something_else_are_not_mixed(tmp_path):
    save(tmp_path, random_images(8, 60))
    *refused, alone = on_hosts(look_with_its_own, tmp_path)
    said = f"host 1 has other inputs for {tmp_path}/parts-2 than host 0 (sha256 'network 1' there, 'network 0' on host"
    assert all(sentence.startswith(said) for sentence in refused) and not (tmp_path / "parts-2").exists()
    assert alone == ["000000000.npz", "000000032.npz", "of.json"]


def train_here(folder):
    """Hashes of the networks that this process measures with, and of the features that it found of real images.

    What a process trains depends on its number, as on hosts whose CPUs have other numbers of cores.
    """
    wait_for_all("both have begun")  # Gloo connects them within half a minute or not at all
    seed, config = jax.process_index() + (jax.process_count() == 1), default_config()
    classifier.train_feature_net = functools.partial(train_feature_net, seed=seed)
    classifier.train_judge = functools.partial(train_judge, seed=seed)
    config.data.update(source="shapes", space="pixel", image_size=16, channels=3, num_classes=0)
    config.evaluate.update(judge_steps=2, feature_steps=2)
    shapes = image_source(config.data)
    captioned = train_classifier(config, shapes, None, Labels(96, tuple(shapes.captions)))
    config.data.num_classes = 96
    classes = train_classifier(config, shapes, None, Labels(96))
    networks = tree_sha256({"judge": captioned.network.params, "said": captioned.network.embedded}), classes.facts
    return {"networks": networks, "seen": [float(np.abs(one.own).sum()) for one in (captioned, classes)]}


@pytest.mark.slow
def test_all_hosts_measure_with_the_first_one_s_networks(tmp_path):
    first, other, alone = on_hosts(train_here, tmp_path)
    assert first["networks"] == other["networks"] != alone["networks"]
    assert first["seen"] == pytest.approx(other["seen"], rel=1e-6) != pytest.approx(alone["seen"], rel=1e-6)


def see_drawn(workdir, weights, folder):
    """Where the statistics of a student's images lie, in Inception's features, drawn and looked at by this process."""
    config = smoke_config.get_config()
    config.sample.update(count=14, batch_size=4)
    mesh, shown = local_mesh(config.mesh), []
    model = drawable(config, load_student(workdir / "distill" / "ard", mesh), False)
    samples = draw_samples(model, load_conditions(config, workdir), None, config, mesh)
    network = InceptionFeatures.from_file(weights).over(jax.local_devices())
    inception.BATCH_SIZE = 4

    def look(batches):
        return inception.look(network, (shown.append(len(batch)) or batch for batch in batches))

    parts = make_parts(look, samples.images, folder / f"parts-{jax.process_count()}", {}, 4, 4)
    seen = adm_files.see((Features(**part) for part in read_parts(parts)), len(samples.images))
    path = folder / f"{jax.process_count()}-{jax.process_index()}.npz"
    np.savez(path, *seen.of_pool, *seen.of_spatial)
    return {"shown": sum(shown), "statistics": str(path)}


@pytest.mark.slow
def test_two_hosts_that_draw_and_one_have_the_same_statistics_in_inception(pipeline, tmp_path):
    """From the sampler into a random network of the real kind, by both halves of a job and by one process."""
    pair, other, alone = on_hosts(see_drawn, pipeline, write_weights(tmp_path), tmp_path)
    assert (pair["shown"], other["shown"], alone["shown"]) == (8, 6, 14)
    expected = read_npz(pathlib.Path(alone["statistics"]))
    assert expected["arr_1"].shape == (2048, 2048) and np.trace(expected["arr_1"]) > 0.1
    for found in (pair, other):
        for name, got in read_npz(pathlib.Path(found["statistics"])).items():
            np.testing.assert_allclose(got, expected[name], rtol=1e-9, atol=1e-12 * np.abs(expected[name]).max())
