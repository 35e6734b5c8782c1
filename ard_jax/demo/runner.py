"""Drawing with one pipeline, measured: a teacher step by step, so that it shows how far it is and can be stopped."""

import functools
from collections.abc import Generator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.build import example_shape, make_solve
from ard_jax.data import to_uint8
from ard_jax.models import ARDStudent, Backbone, Condition
from ard_jax.parallel import put_batch
from ard_jax.pipeline import ARDPipeline
from ard_jax.progress import Stopwatch
from ard_jax.sampling import draw_noise, network_calls, sampling_key, teacher_steps
from ard_jax.types import PyTree

_draw_noise = jax.jit(draw_noise, static_argnums=2)


class Drawn(NamedTuple):
    """What a model made of noises.

    Attributes:
        images: uint8 (image, height, width, channel).
        trajectory: the predictions on the way there, uint8 (image, step, height, width, channel).
        milliseconds: an image took, all images being drawn together: the network's calls, with neither compiling nor
            a VAE's decoding in them; 0 where it was not measured.
    """

    images: np.ndarray
    trajectory: np.ndarray
    milliseconds: float = 0.0


class Runner:
    """One pipeline and its programs, each of which is compiled when it is first used with a number of images.

    Attributes:
        pipe: the pipeline.
        steps: of a trajectory.
        calls: of the network, for one image.
    """

    def __init__(self, pipe: ARDPipeline):
        self.pipe, self._how = pipe, make_solve(pipe.config)
        self.steps = cast(ARDStudent, pipe.model).steps if pipe.is_student else self._how.steps
        self.calls = self.steps if pipe.is_student else network_calls(self._how)
        self._compiled: set[object] = set()

    def noise(self, seed: int, count: int) -> np.ndarray:
        """Noises 0 … count − 1 of a seed, as the pipeline and the stage `sample` draw them: (image, …)."""
        return np.asarray(_draw_noise(sampling_key(seed), np.arange(count), example_shape(self.pipe.config)))

    def condition(self, told: str | int, count: int) -> Condition:
        """What the network is told of a caption or a class, leaves (image, …).

        Raises:
            UserError: the text encoder is not there, or there is no such class.
        """
        guided = not self.pipe.is_student and self._how.guidance.scale != 1
        return self.pipe.told([told] * count, {}, is_guided=guided)[1]

    def draw(self, told: str | int, noise: np.ndarray) -> Generator[int, None, Drawn]:
        """Draws images of one caption or class.

        Args:
            told: the caption, or the number of the class.
            noise: (image, height, width, channel).

        Yields:
            How many steps of the trajectory are done. Closed before its end, it does no more.

        Returns:
            What was drawn.

        Raises:
            UserError: what `condition` raises, or the model diverged.
        """
        count, devices = len(noise), self.pipe.mesh.size
        rows = np.arange(-(-count // devices) * devices) % count  # every device draws as many
        condition = self.condition(told, count)
        noises, condition = put_batch(
            jax.tree.map(lambda leaf: np.asarray(leaf)[rows], (noise, condition)), self.pipe.mesh
        )
        key = count, *(leaf.shape for leaf in jax.tree.leaves(condition))
        run = self._student if self.pipe.is_student else self._teacher
        points, sample, seconds = yield from run(noises, condition, key in self._compiled)
        self._compiled.add(key)
        images, steps = self._present(self.pipe.vae_params, points, sample)
        images, steps = (to_uint8(2 * np.asarray(leaf)[:count] - 1) for leaf in (images, steps))
        return Drawn(images, steps, 1000 * seconds / count)

    def _student(self, noise: jax.Array, condition: Condition, warm: bool) -> Generator[int, None, Any]:
        """All steps at once: they are few."""
        arguments = self.pipe.params, self.pipe.vae_params, noise, condition
        if not warm:
            jax.block_until_ready(self._generate(*arguments))
        watch = Stopwatch()
        sample, points = jax.block_until_ready(self._generate(*arguments))
        seconds = watch()
        yield self.steps
        return points, sample, seconds

    def _teacher(self, noise: jax.Array, condition: Condition, warm: bool) -> Generator[int, None, Any]:
        steps, params = self._solve, self.pipe.params
        x, x0, points = noise, jnp.zeros_like(noise), []
        if not warm:
            jax.block_until_ready(steps.step(params, steps.prepare(params, condition), x, x0, np.int32(0)))
        watch = Stopwatch()
        prepared: PyTree = jax.block_until_ready(steps.prepare(params, condition))
        seconds = watch()
        for number in range(self.steps):
            watch = Stopwatch()  # what is shown between the steps is not the network's time
            x, x0 = jax.block_until_ready(steps.step(params, prepared, x, x0, np.int32(number)))
            seconds += watch()
            points.append(x0)
            yield number + 1
        return jnp.stack(points, axis=1), x, seconds

    @functools.cached_property
    def _generate(self):
        return jax.jit(self.pipe.generate_function(latent=True, trajectory=True))

    @functools.cached_property
    def _solve(self):
        steps = teacher_steps(cast(Backbone, self.pipe.model), self._how)
        return steps._replace(prepare=jax.jit(steps.prepare), step=jax.jit(steps.step))

    @functools.cached_property
    def _present(self):
        return jax.jit(self.pipe.presenter(latent=False, trajectory=True))
