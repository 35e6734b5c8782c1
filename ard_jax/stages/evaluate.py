"""Measures the samples of the teacher and of every student that has been sampled.

Reads `sample/` and writes `evaluate/results.json` and `pictures.npz`: Fréchet distance, precision and recall in the
features of a small classifier that is trained on the same data (so they compare models here, and with nothing else);
each student's error to the teacher from the same noise, step by step; and its exposure bias, the error of each step
with the teacher's history against its own.
"""

import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from ard_jax.config import example_shape, solver_settings
from ard_jax.data import image_source, labels_and_images, to_uint8
from ard_jax.errors import UserError
from ard_jax.evaluation import (
    FeatureExtractor,
    exposure_bias,
    feature_statistics,
    frechet_distance,
    mean_squared_error_per_step,
    precision_recall,
    psnr,
    train_feature_net,
)
from ard_jax.files import file_sha256, write_json
from ard_jax.objectives.ard import teacher_forcing
from ard_jax.parallel import is_first, make_mesh
from ard_jax.sampling import (
    draw_noise_and_labels,
    sample_student,
    sample_teacher,
    sampling_key,
    take_points,
    within_bounds,
)
from ard_jax.stages.sample import write_npz
from ard_jax.stages.workdir import Stopwatch, finished, load_student, load_teacher, plain, write_done

# Real and generated images that precision and recall compare, at most: their cost is quadratic.
NEIGHBOUR_LIMIT = 10_000
REAL_LIMIT = 50_000


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Evaluates.

    Raises:
        UserError: nothing has been sampled, the samples are latents, or there are too few images for statistics.
    """
    if config.data.space == "latent":
        raise UserError(
            "evaluate compares images, but data.space is 'latent': decode the samples and evaluate the images."
        )
    if not is_first():
        return
    watch, directory, mesh = Stopwatch(), workdir / "evaluate", make_mesh(jax.local_devices())
    sampled = finished(workdir / "sample", "sample")["models"]
    teacher = load_teacher(config, workdir, mesh)
    students = {name: load_student(workdir / "distill" / name, mesh) for name in sampled if name != "teacher"}
    hashes = {"teacher": teacher[2]} | {name: student[2] for name, student in students.items()}
    samples = {name: read_samples(workdir / "sample" / name, sampled[name], hashes[name], config) for name in sampled}
    real, labels = labels_and_images(image_source(config.data), limit=REAL_LIMIT)
    paired = Paired(config, teacher)
    extractor = train_feature_net(real, labels, config.data.num_classes, steps=config.evaluate.feature_steps)
    kept = ("steps", "network_calls", "parameters", "gmac_per_image", "seconds_per_image")
    models: dict[str, dict[str, Any]] = {
        name: {key: facts[key] for key in kept} | distances(extractor, real, samples[name], config)
        for name, facts in sampled.items()
    }
    pictures = paired.teacher_pictures(config.evaluate.pictures)
    for name, student in students.items():
        errors, images = paired.compare(student, config.evaluate.pictures)
        models[name] |= errors
        pictures[name] = images
    results = {
        "features": f"features of a small classifier trained on the same images "
        f"(held-out accuracy {extractor.held_out_accuracy:.3f}); not comparable with ImageNet FID",
        "real_images": len(real),
        "samples": config.sample.count,
        "paired": paired.count,
        "models": add_degradation(models),
        **degradation_ratios(models),
        "config": plain(config),
    }
    write_json(directory / "results.json", results)
    write_npz(directory / "pictures.npz", **pictures)
    files = ("results.json", "pictures.npz")
    write_done(directory, {file: file_sha256(directory / file) for file in files}, watch())


def read_samples(
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
    images = np.load(directory / "samples.npz", allow_pickle=False)["arr_0"]
    if len(images) != config.sample.count:  # a Fréchet distance depends on how many images it is taken from
        raise UserError(
            f"{directory} holds {len(images)} images, but sample.count is {config.sample.count}: "
            f"run 'sample' again with this config."
        )
    return images


def distances(
    extractor: FeatureExtractor, real: np.ndarray, images: np.ndarray, config: ml_collections.ConfigDict
) -> dict[str, float]:
    """Fréchet distance to the real images, precision and recall."""
    real_features, features = extractor(real), extractor(images)
    count = min(len(real_features), len(features), NEIGHBOUR_LIMIT)
    spread = np.linspace(0, len(real_features) - 1, count).astype(int)  # a folder's images come class by class
    precision, recall = precision_recall(real_features[spread], features[:count], k=config.evaluate.neighbours)
    return {
        "fd": frechet_distance(feature_statistics(real_features), feature_statistics(features)),
        "precision": precision,
        "recall": recall,
    }


class Paired:
    """The teacher's trajectories from the first noises of the sampling, and how far students are from them."""

    def __init__(self, config: ml_collections.ConfigDict, teacher: tuple[Any, Any, str]):
        model, params, _ = teacher
        settings = solver_settings(config)
        self.solver_steps = settings["steps"]
        index = np.arange(config.evaluate.paired, dtype=np.int32)
        noise, label = draw_noise_and_labels(
            sampling_key(config.sample.seed), index, example_shape(config), model.num_classes
        )
        solution = jax.jit(functools.partial(sample_teacher, model, **settings))(params, noise, label)
        kept = within_bounds(self.points(solution.x0, config), config.trajectories.max_abs)
        if not kept.any():
            raise UserError(
                f"none of the teacher's {len(index)} trajectories stays within trajectories.max_abs="
                f"{config.trajectories.max_abs}: train the teacher longer, or raise max_abs or evaluate.paired."
            )
        self.noise, self.label, self.x0, self.xt = (leaf[kept] for leaf in (noise, label, solution.x0, solution.xt))
        self.config, self.count = config, int(kept.sum())

    def points(self, states: jax.Array, config: ml_collections.ConfigDict) -> jax.Array:
        return take_points(states, tuple(config.student.points), self.solver_steps)

    def teacher_pictures(self, count: int) -> dict[str, np.ndarray]:
        return {
            "noise": to_uint8(self.noise[:count] / 3),  # three standard deviations span black to white
            "label": np.asarray(self.label[:count]),
            "teacher": to_uint8(self.points(self.x0[:count], self.config)),
            "teacher_xt": to_uint8(self.points(self.xt[:count], self.config)),
        }

    def compare(self, student: tuple, pictures: int) -> tuple[dict[str, Any], np.ndarray]:
        """A student's errors, and the pictures of its steps."""
        model, params, _, config = student
        target = config.student.target
        points = self.points({"x0": self.x0, "xt": self.xt}[target], config)
        rollout = jax.jit(functools.partial(sample_student, model))(params, self.noise, self.label)
        forced = jax.jit(functools.partial(teacher_forcing, model))(params, self.noise, points, self.label)
        bias = exposure_bias(points, forced, rollout)
        mse = mean_squared_error_per_step(rollout, points)
        errors = {
            "kind": "student",
            "target": target,
            "mask": model.mask,
            "history_layers": model.layers_with_history,
            "psnr": float(psnr(mse[-1])),
            "mse_per_step": mse.tolist(),
            "psnr_per_step": [float(psnr(step)) for step in mse],
            "forced_mse": np.asarray(bias.forced).tolist(),
            "rollout_mse": np.asarray(bias.rollout).tolist(),
        }
        return errors, to_uint8(rollout[:pictures])


def add_degradation(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Adds each student's Fréchet distance minus the teacher's, where the teacher has been sampled."""
    teacher = models.get("teacher")
    for name, model in models.items():
        model["kind"] = "teacher" if name == "teacher" else "student"
        if teacher and name != "teacher":
            model["degradation"] = model["fd"] - teacher["fd"]
    return models


def degradation_ratios(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Degradation of step distillation over that of ARD, for each kind of target that both were trained on."""
    students = [model for model in models.values() if "degradation" in model]
    ratios = {}
    for target in ("x0", "xt"):
        ours = [m["degradation"] for m in students if m["target"] == target and m["history_layers"]]
        baseline = [m["degradation"] for m in students if m["target"] == target and not m["history_layers"]]
        if ours and baseline and ours[0] > 0 and baseline[0] > 0:
            ratios[target] = baseline[0] / ours[0]
    return {"degradation_ratio": ratios.get("x0"), "degradation_ratios": ratios}
