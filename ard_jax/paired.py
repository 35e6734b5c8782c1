"""A run's students beside its teacher from the same noises: errors by step, the use of history, pictures, edits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from ard_jax.build import example_shape, make_rollout, make_solve
from ard_jax.conditions import Conditions, draw_numbers
from ard_jax.data import to_uint8
from ard_jax.drawing import Decoder
from ard_jax.errors import UserError
from ard_jax.evaluation import exposure_bias, mean_squared_error_per_step, psnr
from ard_jax.models import ARDStudent, Condition
from ard_jax.parallel import batch_shards, equal_batches, on_mesh, put_batch, run_batches
from ard_jax.sampling import (
    draw_noise,
    is_within_bounds,
    predict_student,
    sample_teacher,
    sampling_key,
    take_points,
)
from ard_jax.types import Params, PyTree
from ard_jax.workdir import Loaded


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
        # students of one architecture share their programs: one trace and one compilation for all of them
        self.program = functools.cache(functools.partial(_program, mesh))
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
        numbers = draw_numbers(key, index, self.conditions.for_training)
        rows = self.batches(functools.partial(trajectories, params), index, self.conditions.rows(numbers))
        rows["label"] = numbers
        kept = np.asarray(is_within_bounds(self.points(rows["x0"], config), config.trajectories.max_abs))
        if not kept.any():
            raise UserError(
                f"none of the teacher's {len(index)} trajectories stays within trajectories.max_abs="
                f"{config.trajectories.max_abs}: train the teacher longer, or raise max_abs or evaluate.paired."
            )
        self.rows, self.count = {name: array[kept] for name, array in rows.items()}, int(kept.sum())

    def batches(self, function: Callable[..., PyTree], *arrays: PyTree, as_for: int = 0) -> PyTree:
        """A jitted function of rows of arrays, or of pytrees of them, called in batches of one size; NumPy arrays.

        The size is that for their number of rows, or for another, so that one program serves for both.
        """
        count = len(jax.tree.leaves(arrays)[0])
        shards = batch_shards(self.mesh)
        size = min(self.size, -(-(as_for or count) // shards) * shards)

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
        _, params, _, config = student
        is_history = config.student.kind == "history"
        target = config.student.target if is_history else "x0"  # what the steps of the other kinds predict
        points = self.points(self.rows[target], config)
        if is_history:
            rollout = self.predictions(student, points, 0)
        else:
            roll = self.program(make_rollout(config, student.model))
            rollout = self.batches(functools.partial(roll, params), self.rows["noise"], self.condition())
        image_mse = self.image_error(rollout, points)
        errors = {
            "objective": config.distill.objective,
            "target": target,
            "psnr": float(psnr(image_mse[-1])),
            "mse_per_step": mean_squared_error_per_step(rollout, points).tolist(),
            "psnr_per_step": [float(psnr(step)) for step in image_mse],
        }
        if is_history:
            errors |= self.use_of_history(student, points, rollout)
        return errors, to_uint8(self.images(rollout[:pictures]))

    def predictions(self, student: Loaded, points: np.ndarray, first: int) -> np.ndarray:
        """What an ARD student's steps predict where the `first` points, S − 1 at most, are the teacher's `points`."""
        is_given = np.broadcast_to(np.arange(points.shape[1]) < first, points.shape[:2])
        return self.predict(student, self.rows["noise"], self.condition(), points, is_given)

    def predict(self, student: Loaded, *rows: PyTree) -> np.ndarray:
        """`predict_student` of the rows of its arguments, by one program however many they are."""
        program = self.program(predict_student, student.model)
        return self.batches(functools.partial(program, student.params), *rows, as_for=self.count)

    def use_of_history(self, student: Loaded, points: np.ndarray, rollout: np.ndarray) -> dict[str, Any]:
        """What an ARD student makes of the points before a step: the teacher's `points`, or its own `rollout`."""
        model, steps = student.model, points.shape[1]
        # the first step sees the noise alone, the teacher's as its own
        forced = rollout if steps == 1 else self.predictions(student, points, steps - 1)
        between = [self.predictions(student, points, first)[:, -1:] for first in range(1, steps - 1)]
        finals = [rollout[:, -1:], *between, forced[:, -1:]][:steps]
        bias = exposure_bias(points, forced, rollout)
        found = {
            "mask": model.mask,
            "history_layers": model.layers_with_history,
            "forced_mse": np.asarray(bias.forced).tolist(),
            "rollout_mse": np.asarray(bias.rollout).tolist(),
            "given_psnr": [float(psnr(self.image_error(final, points[:, -1:])[0])) for final in finals],
        }
        if model.layers_with_history:
            weigh = self.program(_weigh, model)
            inputs = np.concatenate([self.rows["noise"][:, None], rollout[:, :-1]], axis=1)
            mass = self.batches(functools.partial(weigh, student.params), inputs, self.condition())
            found["attention_mass"] = mass.mean(axis=0, dtype=np.float64).tolist()
        return found

    def error_given(self, student: Loaded, noise: np.ndarray, label: np.ndarray, points: np.ndarray) -> list[float]:
        """By step, an ARD student's error where all points before it are the teacher's, of any trajectories.

        Args:
            student: it.
            noise: (row, height, width, channel).
            label: numbers of conditions, (row,).
            points: those of the student, (row, step, height, width, channel).
        """
        is_given = np.ones(points.shape[:2], bool)
        found = self.predict(student, noise, self.conditions.rows(label), points, is_given)
        return mean_squared_error_per_step(found, points).tolist()

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
        count = self.conditions.for_training
        return ((label + max(count // 2, 1)) % count).astype(label.dtype)

    def edits(self, student: Loaded, count: int) -> np.ndarray:
        """Pictures (image, S, height, width, channel): without the source, then with it after step 1, …, S−1."""
        steps = len(student.config.student.points)
        # the noise of another row, since a real image's own is not known
        noise = np.roll(self.rows["noise"], 1, axis=0)[:count]
        source, label = self.rows["x0"][:count, -1:], self.other_condition(self.rows["label"][:count])
        noise, source, label = (np.repeat(rows, steps, axis=0) for rows in (noise, source, label))
        is_given = np.tile(np.arange(steps) == np.arange(steps)[:, None] - 1, (len(noise) // steps, 1))
        sources = np.repeat(source, steps, axis=1)
        finals = self.predict(student, noise, self.conditions.rows(label), sources, is_given)[:, -1]
        return to_uint8(self.images(finals.reshape(-1, steps, *finals.shape[1:])))

    def image_error(self, rollout: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Mean squared error of each step's images, (step,); decoded a batch at a time, never all together."""
        parts = [slice(first, first + self.size) for first in range(0, len(points), self.size)]
        errors = [mean_squared_error_per_step(self.images(rollout[part]), self.images(points[part])) for part in parts]
        return np.average(errors, axis=0, weights=[len(points[part]) for part in parts])


def _program(mesh: Mesh, function: Callable[..., PyTree], *of: Any) -> Callable[..., PyTree]:
    """The jitted function of what follows `of`, which are no arrays: a model, how it is sampled."""
    return jax.jit(on_mesh(mesh)(functools.partial(function, *of)))


def _weigh(model: ARDStudent, params: Params, points: jax.Array, condition: Condition) -> PyTree:
    return model.apply({"params": params}, points, condition, method="attention_mass")


def can_edit(student: Loaded) -> bool:
    """Whether a source image can stand among a student's points: it has a history, and x0-predictions in it."""
    model, config = student.model, student.config
    return config.student.kind == "history" and model.layers_with_history > 0 and config.student.target == "x0"
