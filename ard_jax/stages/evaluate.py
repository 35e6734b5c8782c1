"""Measures the samples of the teacher and of every student that has been sampled.

    python -m ard_jax evaluate --samples FILE.npz --reference FILE.npz --weights FILE
measures anybody's images instead, as ADM does: FID, sFID, Inception score, precision, recall (add --help for more).

Reads `sample/` and the real images (of `data`, or of `encode` for models of latents) and writes, in `evaluate/`,
`results.json`, `pictures.npz`, `edits.npz` and of captioned images `gallery.npz`: Fréchet distance, precision and
recall in the features of a small network that is trained on the same data (so they compare models here, and with
nothing else; few images have no Fréchet distance): a classifier, or of captioned images a judge, which also says how
often the right caption is among those that fit an image best, of captions that were trained on and of those held out;
each student's error to the teacher from the same noise, step by step; and of ARD students
- the exposure bias, the error of each step with the teacher's history against its own;
- `given_psnr`, of the final image to the teacher's when the first 0, 1, …, S−1 points are the teacher's;
- `attention_mass` (layer, query block, key block), how a block shares its attention out, on the student's own points;
- in `edits.npz`, the teacher's images `source` turned into the class `label`, under the student's name (image, S,
  height, width, channel): without the source, then with it in place of the prediction of step 1, …, S−1
  (docs/METHOD.md section 4).

With `sample.prompts`, measures how well the images of that list fit their prompts, by the CLIP in `evaluate.clip`, and
writes `prompts/NAME/evaluate/adherence.json`.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from ard_jax.captions.conditions import load_conditions
from ard_jax.captions.texts import texts_of_data
from ard_jax.conditions import Conditions
from ard_jax.config import plain
from ard_jax.data import Source, identify, image_source, labels_and_images
from ard_jax.drawing import make_decoder, open_images
from ard_jax.errors import UserError
from ard_jax.evaluation import (
    Judge,
    disturb,
    feature_statistics,
    frechet_distance,
    precision_recall,
    train_feature_net,
    train_judge,
)
from ard_jax.files import file_sha256, read_npz, write_json, write_npz
from ard_jax.models import AutoencoderKL
from ard_jax.paired import Paired, can_edit
from ard_jax.parallel import is_first, local_mesh
from ard_jax.progress import Stopwatch
from ard_jax.prompted import judge, open_list
from ard_jax.results import Measured, Results, add_degradation, degradation_ratios
from ard_jax.types import Params
from ard_jax.workdir import (
    check_identity,
    find_vae,
    load_student,
    load_teacher,
    occupy,
    require_done,
    teacher_folder,
    vae_folder,
    write_done,
)

log = logging.getLogger("ard_jax")

# Real and generated images that precision and recall compare, at most: their cost is quadratic.
NEIGHBOUR_LIMIT = 10_000
REAL_LIMIT = 50_000


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path, models: Collection[str] = ()) -> None:
    """Evaluates.

    Args:
        config, workdir: the run's.
        models: names of those to measure; () for all that have been sampled.

    Raises:
        UserError: nothing has been sampled, the samples are latents, or there are too few images for neighbours.
    """
    if config.sample.prompts:
        return judge(open_list(config, workdir), config.evaluate)
    watch, directory, mesh = Stopwatch(), workdir / "evaluate", local_mesh(config.mesh)
    vae = find_vae(config, workdir)
    if config.data.space == "latent" and vae is None:
        raise UserError(
            f"evaluate compares images, but there is no VAE in {vae_folder(config, workdir)} to decode latents with: "
            f"convert one into the workdir, or set vae.dir, and run 'sample' again."
        )
    sampled = require_done(workdir / "sample", "sample")["models"]
    sampled = {name: facts for name, facts in sampled.items() if name in (models or sampled)}
    teacher = load_teacher(config, workdir, mesh)
    students = {name: load_student(workdir / "distill" / name, mesh) for name in sampled if name != "teacher"}
    hashes = {"teacher": teacher.sha256} | {name: student.sha256 for name, student in students.items()}
    folders = {name: workdir / "sample" / name for name in sampled}
    samples = {name: _read_samples(folders[name], sampled[name], hashes[name], config) for name in sampled}
    real_images = _open_images(config, vae)
    same = all(teacher.config.data[key] == config.data[key] for key in ("source", "name", "split"))
    if vae is None and same:  # others may be compared with, but not by chance
        check_identity(teacher_folder(config, workdir), identify(config.data, real_images))
    chosen, conditions = set(config.sample.labels), load_conditions(config, workdir)
    if chosen and len(chosen) < len(conditions):
        log.warning(
            "samples are of %d of %d %s, and the real images of all: what is far from them may just be missing.",
            len(chosen),
            len(conditions),
            "classes" if config.data.num_classes else "captions",
        )
    occupy(directory)
    paired = Paired(config, teacher, students, conditions, make_decoder(vae, config, mesh), mesh)
    real = _look_at(config, real_images, vae, conditions)
    fewest = min(len(real.images), config.sample.count - config.sample.held_out)
    note = "" if fewest > real.num_features else f"; no Fréchet distance, which {fewest} images are too few for"
    if note:
        wanted = real.num_features + 1
        log.warning("%d images are too few for a Fréchet distance, which wants %d: left out.", fewest, wanted)
    kept = ("ema_sha256", "steps", "network_calls", "parameters", "gmac_per_image", "seconds_per_image")
    measured = {
        name: Measured(
            **{key: facts[key] for key in kept},
            **_distances(real, samples[name], conditions, config),
            kind="teacher" if name == "teacher" else "student",
        )
        for name, facts in sampled.items()
    }
    pictures = paired.teacher_pictures(config.evaluate.pictures)
    edits = paired.edit_sources(config.evaluate.pictures)
    for name, student in students.items():
        errors, images = paired.compare(student, config.evaluate.pictures)
        measured[name] = dataclasses.replace(measured[name], **errors)
        pictures[name] = images
        if can_edit(student):
            edits[name] = paired.edits(student, config.evaluate.pictures)
    measured = add_degradation(measured)
    ratios = degradation_ratios(measured)
    results = Results(
        features=f"features of {real.about}; not comparable with ImageNet FID{note}",
        real_images=len(real.images),
        samples=config.sample.count - config.sample.held_out,
        paired=paired.count,
        models=measured,
        degradation_ratio=ratios.get("x0"),
        degradation_ratios=ratios,
        judge=real.judged,
        config=plain(config),
    )
    if not is_first():  # every host has computed the same
        return
    write_json(directory / "results.json", results.to_json())
    write_npz(directory / "pictures.npz", **pictures)
    write_npz(directory / "edits.npz", **edits)
    files = ["results.json", "pictures.npz", "edits.npz"]
    if real.judge is not None:
        write_npz(directory / "gallery.npz", **_gallery(real, samples, conditions, config.evaluate.pictures))
        files.append("gallery.npz")
    write_done(directory, {file: file_sha256(directory / file) for file in files}, watch())


class Real(NamedTuple):
    """The real images that samples are compared with, and the network that both are looked at with.

    Attributes:
        images: uint8 (image, height, width, channel), without those held out of training.
        own: their features (image, feature).
        features: the network: uint8 images → features (image, feature).
        num_features: how many features it has.
        about: the network in words.
        judge: the same network, if it knows captions.
        judged: how well it knows those of real images, as `Results.judge` has it.
        examples: an image of each caption.
    """

    images: np.ndarray
    own: np.ndarray
    features: Callable[[np.ndarray], np.ndarray]
    num_features: int
    about: str
    judge: Judge | None = None
    judged: Mapping[str, Any] | None = None
    examples: Mapping[str, np.ndarray] = {}


def _look_at(
    config: ml_collections.ConfigDict,
    source: Source,
    vae: tuple[AutoencoderKL, Params] | None,
    conditions: Conditions,
) -> Real:
    """Reads the real images and trains the network that looks at them; a judge sees those that are held out as well."""
    settings = config.evaluate
    texts = [] if config.data.num_classes else _texts_of(config, source)
    if len(set(texts)) < 2:  # one class, or no caption that differs from the others
        images, labels = labels_and_images(source, limit=REAL_LIMIT)
        labels = labels if config.data.num_classes else np.zeros_like(labels)
        net = train_feature_net(images, labels, config.data.num_classes or 1, steps=settings.feature_steps)
        about = f"a small classifier trained on the same images (held-out accuracy {net.held_out_accuracy:.3f})"
        return Real(images, net(images), net, net.num_features, about)
    if (config.encode if vae else config.data).source == "openmoji":
        source = _open_images(_with_held_out(config), vae)
    images, numbers = labels_and_images(source, limit=REAL_LIMIT)
    captions = [texts[number] for number in numbers]
    judge = train_judge(images, captions, steps=settings.judge_steps)
    held_out = {conditions.words(number) for number in range(conditions.for_training, len(conditions))}
    is_trained = np.array([caption not in held_out for caption in captions])
    disturbed = disturb(images, np.random.default_rng(1))
    judged = {
        "real": _recall(judge, images, captions, is_trained),
        "augmented": _recall(judge, disturbed, captions, is_trained),
    }
    kept = images[is_trained] if is_trained.any() else images
    about = "a small judge of images and captions, trained on the same images"
    examples = dict(zip(reversed(captions), images[::-1], strict=True))  # the first one of each
    return Real(kept, judge(kept), judge, judge.num_features, about, judge, judged, examples)


def _open_images(config: ml_collections.ConfigDict, vae: tuple[AutoencoderKL, Params] | None) -> Source:
    return image_source(config.data) if vae is None else open_images(config, vae[0])


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
    judge: Judge, images: np.ndarray, captions: list[str], is_trained: np.ndarray
) -> dict[str, dict[str, float]]:
    """recall_at_1 and recall_at_5, each of captions that were trained on and of those held out, where there are any."""
    found: dict[str, dict[str, float]] = {"recall_at_1": {}, "recall_at_5": {}}
    for part, rows in (("trained", is_trained), ("held_out", ~is_trained)):
        if rows.any():
            own = [caption for caption, is_own in zip(captions, rows, strict=True) if is_own]
            recall = judge.recall(images[rows], own, (1, 5))
            found["recall_at_1"][part], found["recall_at_5"][part] = recall[1], recall[5]
    return found


def _gallery(real: Real, samples: Mapping[str, "Samples"], conditions: Conditions, count: int) -> dict[str, np.ndarray]:
    """The first images of captions that were trained on, and of those held out, of all models: see `build_report`."""
    labels = next(iter(samples.values())).labels
    is_trained = labels < conditions.for_training
    rows = np.concatenate([np.flatnonzero(is_trained)[:count], np.flatnonzero(~is_trained)[:count]])
    words = [conditions.words(int(number)) for number in labels[rows]]
    shown = {"label": np.array(words), "held_out": ~is_trained[rows]}
    if all(word in real.examples for word in words):
        shown["real"] = np.stack([real.examples[word] for word in words])
    return shown | {name: model.images[rows] for name, model in samples.items()}


class Samples(NamedTuple):
    """Of a model, uint8 (count, height, width, channel), and the number of each one's condition (count,)."""

    images: np.ndarray
    labels: np.ndarray


def _read_samples(
    directory: pathlib.Path, facts: dict[str, Any], sha256: str, config: ml_collections.ConfigDict
) -> Samples:
    """A model's samples.

    Args:
        directory: where they lie.
        facts: what `done.json` says of them.
        sha256: of the model's weights as they are now.
        config: `sample.count` counts.

    Raises:
        UserError: they were drawn from other weights, or there are more or fewer than the config says.
    """
    if facts["ema_sha256"] != sha256:
        raise UserError(f"the samples in {directory} are of older weights: run 'sample' again.")
    arrays = read_npz(directory / "samples.npz")
    if "arr_0" not in arrays:
        raise UserError(f"{directory} holds latents, drawn without a VAE: run 'sample' again, now with one.")
    images = arrays["arr_0"]
    if len(images) != config.sample.count:  # a Fréchet distance depends on how many images it is taken from
        raise UserError(
            f"{directory} holds {len(images)} images, but sample.count is {config.sample.count}: "
            f"run 'sample' again with this config."
        )
    return Samples(images, arrays["labels"])


def _distances(
    real: Real, samples: Samples, conditions: Conditions, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """Fréchet distance to the real images, unless there are too few of either, precision and recall; those of captions.

    Images of captions that are held out of training count for the recall of captions alone, as there may be more of
    them than in the data.
    """
    is_trained = samples.labels < conditions.for_training
    if not is_trained.any():
        is_trained = np.ones_like(is_trained)
    real_features, features = real.own, real.features(samples.images[is_trained])
    count = min(len(real_features), len(features), NEIGHBOUR_LIMIT)
    spread = np.linspace(0, len(real_features) - 1, count).astype(int)  # a folder's images come class by class
    precision, recall = precision_recall(real_features[spread], features[:count], k=config.evaluate.neighbours)
    enough = min(len(real_features), len(features)) > real.num_features
    found: dict[str, Any] = {
        "fd": frechet_distance(feature_statistics(real_features), feature_statistics(features)) if enough else None,
        "precision": precision,
        "recall": recall,
    }
    if real.judge is not None:
        words = {int(number): conditions.words(int(number)) for number in np.unique(samples.labels)}
        if set(words.values()) <= set(real.judge.captions):
            captions = [words[int(number)] for number in samples.labels]
            found |= _recall(real.judge, samples.images, captions, samples.labels < conditions.for_training)
        else:
            log.warning("the recall of captions is left out: some that were sampled are of no real image.")
    return found
