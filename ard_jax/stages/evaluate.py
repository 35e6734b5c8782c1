"""Measures the samples of the teacher and of every student that has been sampled.

Reads `sample/` and the real images (of `data`, or of `encode` for models of latents) and writes, in `evaluate/`,
`results.json`, `pictures.npz` and `edits.npz`: Fréchet distance, precision and recall in the features of a small
classifier that is trained on the same data (so they compare models here, and with nothing else; fewer than 65 images
have no Fréchet distance); each student's error to the teacher from the same noise, step by step; and of ARD students
- the exposure bias, the error of each step with the teacher's history against its own;
- `given_psnr`, of the final image to the teacher's when the first 0, 1, …, S−1 points are the teacher's;
- `attention_mass` (layer, query block, key block), how a block shares its attention out, on the student's own points;
- in `edits.npz`, the teacher's images `source` turned into the class `label`, under the student's name (image, S,
  height, width, channel): without the source, then with it in place of the prediction of step 1, …, S−1
  (docs/METHOD.md section 4).
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Collection
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from ard_jax.build import example_shape, make_rollout, make_solve
from ard_jax.captions.conditions import load_conditions
from ard_jax.conditions import Conditions, draw_numbers
from ard_jax.config import plain
from ard_jax.data import identify, image_source, labels_and_images, to_uint8
from ard_jax.drawing import Decoder, make_decoder, open_images
from ard_jax.errors import UserError
from ard_jax.evaluation import (
    NUM_FEATURES,
    FeatureExtractor,
    exposure_bias,
    feature_statistics,
    frechet_distance,
    mean_squared_error_per_step,
    precision_recall,
    psnr,
    train_feature_net,
)
from ard_jax.files import file_sha256, read_npz, write_json, write_npz
from ard_jax.models import ARDStudent, Condition
from ard_jax.objectives.ard import teacher_forcing
from ard_jax.parallel import batch_shards, equal_batches, is_first, local_mesh, on_mesh, put_batch, run_batches
from ard_jax.progress import Stopwatch
from ard_jax.results import Measured, Results, add_degradation, degradation_ratios
from ard_jax.sampling import (
    draw_noise,
    is_within_bounds,
    sample_student_among,
    sample_teacher,
    sampling_key,
    take_points,
)
from ard_jax.types import Params, PyTree
from ard_jax.workdir import (
    Loaded,
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
    samples = {name: _read_samples(workdir / "sample" / name, sampled[name], hashes[name], config) for name in sampled}
    real_images = image_source(config.data) if vae is None else open_images(config, vae[0])
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
    real, labels = labels_and_images(real_images, limit=REAL_LIMIT)
    paired = Paired(config, teacher, students, conditions, make_decoder(vae, config, mesh), mesh)
    classes = config.data.num_classes or 1  # captions are no classes that a classifier could learn to tell apart
    labels = labels if config.data.num_classes else np.zeros_like(labels)
    extractor = train_feature_net(real, labels, classes, steps=config.evaluate.feature_steps)
    fewest = min(len(real), config.sample.count)
    note = "" if fewest > NUM_FEATURES else f"; no Fréchet distance, which {fewest} images are too few for"
    if note:
        log.warning("%d images are too few for a Fréchet distance, which wants %d: left out.", fewest, NUM_FEATURES + 1)
    kept = ("ema_sha256", "steps", "network_calls", "parameters", "gmac_per_image", "seconds_per_image")
    measured = {
        name: Measured(
            **{key: facts[key] for key in kept},
            **_distances(extractor, real, samples[name], config),
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
        if _can_edit(student):
            edits[name] = paired.edits(student, config.evaluate.pictures)
    measured = add_degradation(measured)
    ratios = degradation_ratios(measured)
    results = Results(
        features=f"features of a small classifier trained on the same images "
        f"(held-out accuracy {extractor.held_out_accuracy:.3f}); not comparable with ImageNet FID{note}",
        real_images=len(real),
        samples=config.sample.count,
        paired=paired.count,
        models=measured,
        degradation_ratio=ratios.get("x0"),
        degradation_ratios=ratios,
        config=plain(config),
    )
    if not is_first():  # every host has computed the same
        return
    write_json(directory / "results.json", results.to_json())
    write_npz(directory / "pictures.npz", **pictures)
    write_npz(directory / "edits.npz", **edits)
    files = ("results.json", "pictures.npz", "edits.npz")
    write_done(directory, {file: file_sha256(directory / file) for file in files}, watch())


def _read_samples(
    directory: pathlib.Path, facts: dict[str, Any], sha256: str, config: ml_collections.ConfigDict
) -> np.ndarray:
    """A model's samples, uint8 (count, height, width, channel).

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
    return images


def _distances(
    extractor: FeatureExtractor, real: np.ndarray, images: np.ndarray, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """Fréchet distance to the real images, unless there are too few of either, precision and recall."""
    real_features, features = extractor(real), extractor(images)
    count = min(len(real_features), len(features), NEIGHBOUR_LIMIT)
    spread = np.linspace(0, len(real_features) - 1, count).astype(int)  # a folder's images come class by class
    precision, recall = precision_recall(real_features[spread], features[:count], k=config.evaluate.neighbours)
    enough = min(len(real_features), len(features)) > NUM_FEATURES
    return {
        "fd": frechet_distance(feature_statistics(real_features), feature_statistics(features)) if enough else None,
        "precision": precision,
        "recall": recall,
    }


class Paired:
    """The teacher's trajectories from the first noises of the sampling, and how far students are from them.

    Everything is solved `sample.batch_size` rows a device at a time, and just the points are kept.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        teacher: Loaded,
        students: dict[str, Loaded],
        conditions: Conditions,
        decoder: Decoder | None,
        mesh: Mesh,
    ):
        model, params = teacher.model, teacher.params
        how, shape = make_solve(config), example_shape(config)
        self.config, self.decoder, self.mesh, self.conditions = config, decoder, mesh, conditions
        self.size = config.sample.batch_size * batch_shards(mesh)
        every = {*config.student.points}.union(*(student.config.student.points for student in students.values()))
        self.kept_points = tuple(sorted(every, reverse=True))
        key = sampling_key(config.sample.seed)

        @jax.jit
        @on_mesh(mesh)
        def trajectories(params, index, condition):
            noise = draw_noise(key, index, shape)
            solution = sample_teacher(model, params, noise, condition, how)
            x0, xt = (take_points(states, self.kept_points, how.steps) for states in solution)
            return {"noise": noise, "x0": x0, "xt": xt}

        index = np.arange(config.evaluate.paired, dtype=np.int32)
        numbers = draw_numbers(key, index, len(self.conditions))
        rows = self.batches(functools.partial(trajectories, params), index, self.conditions.rows(numbers))
        rows["label"] = numbers
        kept = np.asarray(is_within_bounds(self.points(rows["x0"], config), config.trajectories.max_abs))
        if not kept.any():
            raise UserError(
                f"none of the teacher's {len(index)} trajectories stays within trajectories.max_abs="
                f"{config.trajectories.max_abs}: train the teacher longer, or raise max_abs or evaluate.paired."
            )
        self.rows, self.count = {name: array[kept] for name, array in rows.items()}, int(kept.sum())

    def batches(self, function: Callable[..., PyTree], *arrays: PyTree) -> PyTree:
        """A jitted function of rows of arrays, or of pytrees of them, called in batches of one size; NumPy arrays."""
        count = len(jax.tree.leaves(arrays)[0])
        shards = batch_shards(self.mesh)
        size = min(self.size, -(-count // shards) * shards)

        def run(rows):
            return function(*put_batch(jax.tree.map(lambda array: array[rows], arrays), self.mesh))

        parts = run_batches(run, equal_batches(np.arange(count), size))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def condition(self) -> Condition:
        """What the networks are told of the rows."""
        return self.conditions.rows(self.rows["label"])

    def points(self, states: np.ndarray, config: ml_collections.ConfigDict) -> np.ndarray:
        """Of the kept points, those of a student's config."""
        return states[:, [self.kept_points.index(point) for point in config.student.points]]

    def images(self, states: np.ndarray) -> np.ndarray:
        """What the networks see, (batch, point, …) → images."""
        if self.decoder is None:
            return states
        rows = self.batches(self.decoder, states.reshape(-1, *states.shape[2:]))
        return rows.reshape(*states.shape[:2], *rows.shape[1:])

    def teacher_pictures(self, count: int) -> dict[str, np.ndarray]:
        first = {name: array[:count] for name, array in self.rows.items()}
        return {
            "noise": self.noise_pictures(first["noise"]),
            "label": self.shown_labels(first["label"]),
            "teacher": to_uint8(self.images(self.points(first["x0"], self.config))),
            "teacher_xt": to_uint8(self.images(self.points(first["xt"], self.config))),
        }

    def noise_pictures(self, noise: np.ndarray) -> np.ndarray:
        """Three standard deviations span black to white; of latents, the decoded noise."""
        return to_uint8(noise / 3 if self.decoder is None else self.images(noise[:, None])[:, 0])

    def compare(self, student: Loaded, pictures: int) -> tuple[dict[str, Any], np.ndarray]:
        """A student's errors, and the pictures of its steps."""
        model, params, _, config = student
        target = config.student.target
        noise, condition, points = self.rows["noise"], self.condition(), self.points(self.rows[target], config)
        roll = jax.jit(on_mesh(self.mesh)(make_rollout(config, model)))
        rollout = self.batches(functools.partial(roll, params), noise, condition)
        image_mse = self.image_error(rollout, points)
        errors = {
            "objective": config.distill.objective,
            "target": target,
            "psnr": float(psnr(image_mse[-1])),
            "mse_per_step": mean_squared_error_per_step(rollout, points).tolist(),
            "psnr_per_step": [float(psnr(step)) for step in image_mse],
        }
        if config.student.kind == "history":
            errors |= self.use_of_history(model, params, points, rollout)
        return errors, to_uint8(self.images(rollout[:pictures]))

    def use_of_history(
        self, model: ARDStudent, params: Params, points: np.ndarray, rollout: np.ndarray
    ) -> dict[str, Any]:
        """What an ARD student makes of the points before a step: the teacher's `points`, or its own `rollout`."""
        noise, condition = self.rows["noise"], self.condition()
        force = jax.jit(on_mesh(self.mesh)(functools.partial(teacher_forcing, model)))
        forced = self.batches(functools.partial(force, params), noise, points, condition)
        bias = exposure_bias(points, forced, rollout)
        found = {
            "mask": model.mask,
            "history_layers": model.layers_with_history,
            "forced_mse": np.asarray(bias.forced).tolist(),
            "rollout_mse": np.asarray(bias.rollout).tolist(),
            "given_psnr": self.given_psnr(model, params, points),
        }
        if model.layers_with_history:
            weigh = jax.jit(on_mesh(self.mesh)(functools.partial(model.apply, method="attention_mass")))
            inputs = np.concatenate([noise[:, None], rollout[:, :-1]], axis=1)
            mass = self.batches(functools.partial(weigh, {"params": params}), inputs, condition)
            found["attention_mass"] = mass.mean(axis=0, dtype=np.float64).tolist()
        return found

    def given_psnr(self, model: ARDStudent, params: Params, points: np.ndarray) -> list[float]:
        """PSNR of the final image to the teacher's when the first k points are the teacher's, for k = 0 … S−1."""
        roll = jax.jit(on_mesh(self.mesh)(functools.partial(sample_student_among, model)))
        steps, found = np.arange(model.steps), []
        for first in range(model.steps):
            among = functools.partial(roll, params, steps < first)
            final = self.batches(among, self.rows["noise"], self.condition(), points)[:, -1:]
            found.append(float(psnr(self.image_error(final, points[:, -1:])[0])))
        return found

    def edit_sources(self, count: int) -> dict[str, np.ndarray]:
        """The images that students edit, the teacher's last points, and the conditions that they turn them into."""
        source, label = self.rows["x0"][:count, -1:], self.rows["label"][:count]
        return {"source": to_uint8(self.images(source))[:, 0], "label": self.shown_labels(self.other_condition(label))}

    def shown_labels(self, label: np.ndarray) -> np.ndarray:
        """What stands under pictures: a class's number, a caption's words."""
        if self.config.data.num_classes:
            return label
        return np.array([self.conditions.words(int(number)) for number in label])

    def other_condition(self, label: np.ndarray) -> np.ndarray:
        """Half of the classes or captions further on: always another one where there are several."""
        count = len(self.conditions)
        return ((label + max(count // 2, 1)) % count).astype(label.dtype)

    def edits(self, student: Loaded, count: int) -> np.ndarray:
        """Pictures (image, S, height, width, channel): without the source, then with it after step 1, …, S−1."""
        model, params = student.model, student.params
        source = self.rows["x0"][:count, -1:]
        condition = self.conditions.rows(self.other_condition(self.rows["label"][:count]))
        # the noise of another row, since a real image's own is not known
        noise = np.roll(self.rows["noise"], 1, axis=0)[:count]
        roll = jax.jit(on_mesh(self.mesh)(functools.partial(sample_student_among, model)))
        steps, sources = np.arange(model.steps), np.repeat(source, model.steps, axis=1)
        finals = [
            self.batches(functools.partial(roll, params, steps == step - 1), noise, condition, sources)[:, -1]
            for step in range(model.steps)
        ]
        return to_uint8(self.images(np.stack(finals, axis=1)))

    def image_error(self, rollout: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Mean squared error of each step's images, (step,); decoded a batch at a time, never all together."""
        parts = [slice(first, first + self.size) for first in range(0, len(points), self.size)]
        errors = [mean_squared_error_per_step(self.images(rollout[part]), self.images(points[part])) for part in parts]
        return np.average(errors, axis=0, weights=[len(points[part]) for part in parts])


def _can_edit(student: Loaded) -> bool:
    """Whether a source image can stand among a student's points: it has a history, and x0-predictions in it."""
    model, config = student.model, student.config
    return config.student.kind == "history" and model.layers_with_history > 0 and config.student.target == "x0"
