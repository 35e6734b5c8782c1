"""A finished model as a pipeline: classes or prompts in, images out, for people who know diffusers alone."""

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import numpy.typing as npt
from PIL import Image

from ard_jax.build import compute_dtype, example_shape, make_solve, make_student, make_teacher
from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, AutoencoderKL, Backbone, Condition
from ard_jax.models.vae import to_images, to_latents
from ard_jax.parallel import equal_batches, make_mesh, put_batch, replicated_sharding, run_batches
from ard_jax.pipeline.files import open_pipeline, write_pipeline
from ard_jax.pipeline.inputs import (
    read_image,
    require_int,
    resolve_labels,
    resolve_latents,
    resolve_sides,
    resolve_solve,
    source_coefficients,
)
from ard_jax.pipeline.outputs import OUTPUT_TYPES, PipelineOutput, concatenate, convert_output
from ard_jax.pipeline.prompts import Prompts
from ard_jax.progress import progress_bar
from ard_jax.sampling import Solve, draw_noise, sample_student, sample_teacher, sampling_key
from ard_jax.types import Params, PyTree

# (params, vae_params, noise, labels, …) → images, or images and trajectories
Program = Callable[..., PyTree]


class ARDPipeline:
    """A student, or a teacher with any solver, and the VAE of its latents.

    Attributes:
        config: its settings, with the sections `data`, `model`, `diffusion`, and `student` for a student.
        is_student: which of both it is.
        model, params: an `ARDStudent`, or a `DiT` or `PixArt`, and its parameters, on every local device.
        vae, vae_params: an `AutoencoderKL` and its parameters, or None.
        id2label: names by class number, as far as they are known.
        prompts: of a model that is told captions, its text encoder, see `Prompts`; else None.
        card: words about it, in Markdown; the README.md of `save_pretrained`.
    """

    def __init__(
        self,
        params: Params,
        config: ml_collections.ConfigDict,
        *,
        vae: AutoencoderKL | None = None,
        vae_params: Params | None = None,
        id2label: Mapping[int, str] | None = None,
        text_encoder: str = "",
        card: str = "",
    ):
        self.config = config
        self.is_student = config.get("student") is not None
        self.model = make_student(config) if self.is_student else make_teacher(config)
        self.mesh = make_mesh(devices=jax.local_devices())
        self.params, self.vae_params = jax.device_put((params, vae_params), replicated_sharding(self.mesh))
        self.vae = vae
        self.id2label = {int(number): name for number, name in (id2label or {}).items()}
        is_told_words = not config.data.num_classes
        width = self.model.backbone.condition_shapes.tokens.shape[-1] if is_told_words else 0
        dtype = compute_dtype(config.model.dtype)
        self.prompts = Prompts(text_encoder, config.captions, width, dtype) if is_told_words else None
        self.card = card
        self._jitted: dict[object, Program] = {}

    def __repr__(self) -> str:
        what = f"student of {self.model.steps} steps" if self.is_student else "teacher"
        sides = "×".join(map(str, example_shape(self.config)))
        told = "captions" if self.prompts else f"{self.config.data.num_classes} classes"
        return f"ARDPipeline({what}, {sides}, {told})"

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(height, width, channel) of the images; None for latents that no VAE decodes."""
        height, width, channels = example_shape(self.config)
        if self.config.data.space == "pixel":
            return height, width, channels
        if self.vae is None:
            return None
        return height * self.vae.downscale, width * self.vae.downscale, self.vae.out_channels

    @classmethod
    def from_pretrained(
        cls, folder_or_repo: str | os.PathLike, dtype: jax.typing.DTypeLike | None = None, revision: str | None = None
    ) -> "ARDPipeline":
        """Opens a pipeline.

        Args:
            folder_or_repo: what `save_pretrained` wrote; a diffusers folder of a `DiTPipeline`, `PixArtSigmaPipeline`
                or `PixArtAlphaPipeline` (a teacher); or a finished folder of a workdir, such as runs/x/teacher or
                runs/x/distill/ard. "ORG/NAME" or "hf:ORG/NAME" for one of the first two on the Hugging Face hub.
            dtype: compute type, "float32" or "bfloat16"; None for the config's `model.dtype`, whose "auto" is bfloat16
                on accelerators and float32 on CPU, with the VAE in float32. Parameters are float32, but for "bfloat16"
                asked here, which keeps them so too, the VAE's included: half the memory.
            revision: of a repository on the hub, a branch, tag or commit; None for the newest.

        Raises:
            UserError: it is no pipeline, something in it is missing or broken, or it cannot be downloaded.
        """
        return cls(**open_pipeline(folder_or_repo, dtype, revision))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes the pipeline as a folder that `from_pretrained` opens, whole or not at all.

        Args:
            folder: new, empty, or an earlier pipeline of ours, which is replaced.

        Raises:
            UserError: something else is there.
        """
        write_pipeline(
            folder,
            self.params,
            self.config,
            vae=self.vae,
            vae_params=self.vae_params,
            id2label=self.id2label,
            text_encoder=self.prompts.source if self.prompts else "",
            card=self.card,
        )

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images_per_label: int = 1,
        seed: int = 0,
        output_type: str = "pil",
        return_trajectory: bool = False,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        guided_channels: int | None = None,
        latents: jax.typing.ArrayLike | None = None,
        batch_size: int | None = None,
        prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = None,
        negative_prompt: str | None = None,
        prompt_embeds: jax.typing.ArrayLike | None = None,
        prompt_attention_mask: jax.typing.ArrayLike | None = None,
        negative_prompt_embeds: jax.typing.ArrayLike | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> PipelineOutput:
        """Makes images. The first call compiles; later ones of as many images and the same settings do not.

        Args:
            class_labels: class numbers, or names out of `id2label`, or one of them; of a model that is told captions,
                the prompt or prompts.
            num_images_per_label: how many of each, side by side.
            seed: image i is made of noise i of this seed, whatever else is asked for, here and in the stage `sample`.
            output_type: "pil", "np" or "latent", see `PipelineOutput`.
            return_trajectory: give the steps to each image too.
            num_inference_steps: a teacher's steps; a student makes as many as it was trained for.
            guidance_scale: a teacher's; 1 is none. Students have learned their teacher's.
            solver: a teacher's: "ddim", "heun" or "dpm++2m".
            guided_channels: how many leading channels a teacher guides, 0 for all of them.
            latents: noise of your own, (batch, height, width, channel), in place of the seed's.
            batch_size: images made at a time, all of them if None; the last batch is filled up, and cut.
            prompt, num_images_per_prompt: the first two under the names that diffusers has for captions.
            negative_prompt: what a teacher's guidance moves away from, one for all images; None for the empty caption.
            prompt_embeds, prompt_attention_mask: encoded prompts (prompt, token, channel), and which of their vectors
                are their own (prompt, token), in place of words.
            negative_prompt_embeds: the own vectors of a negative prompt, (token, channel), in place of words.
            height, width: of images of a model that is told captions, in pixels; None for what it was made for.

        Raises:
            UserError: an argument cannot be used, in one sentence and before anything is compiled.
        """
        given = {"guidance_scale": guidance_scale, "solver": solver, "guided_channels": guided_channels}
        how = resolve_solve(self.config, self.model.steps if self.is_student else None, num_inference_steps, given)
        form = self._form(output_type, return_trajectory)
        words = dict(prompt=prompt, prompt_embeds=prompt_embeds, prompt_attention_mask=prompt_attention_mask)
        words |= dict(negative_prompt=negative_prompt, negative_prompt_embeds=negative_prompt_embeds)
        labels, condition = self.told(class_labels, words, is_guided=how is not None and how.guidance.scale != 1)
        repeats = num_images_per_label if num_images_per_prompt is None else num_images_per_prompt
        repeats = require_int(repeats, f"num_images_per_{'prompt' if self.prompts else 'label'}", 1)
        labels, condition = jax.tree.map(lambda leaf: np.repeat(leaf, repeats, axis=0), (labels, condition))
        size = len(labels) if batch_size is None else require_int(batch_size, "batch_size", 1)
        down = self.vae.downscale if self.vae is not None else 1
        sides = example_shape(self.config)
        shape = resolve_sides(sides, height, width, down, self.model.backbone.patch_size, self.prompts is not None)
        own = None if latents is None else resolve_latents(latents, (len(labels), *shape))
        noise = self._drawn_noise(seed, shape) if own is None else self._own_noise(own)
        own_null = bool(negative_prompt) or negative_prompt_embeds is not None
        program = self._compiled(self.generate_function, **form, how=how, own_null=own_null)
        return self._make(program, noise, labels, condition, output_type, size)

    def edit(
        self,
        image: Image.Image | str | os.PathLike | npt.ArrayLike,
        source_step: int,
        class_labels: int | str | Sequence[int | str] | None = None,
        seed: int = 0,
        output_type: str = "pil",
        return_trajectory: bool = False,
        *,
        prompt: str | Sequence[str] | None = None,
    ) -> PipelineOutput:
        """Turns an image into one of another class or caption (ARD, appendix C.2).

        The student starts from noise, with the new class; after step `source_step` the image takes the place of what it
        predicted, and it goes on from there. The later the step, the more of the image stays.

        Args:
            image: a Pillow image, the path of one, or an array (height, width, channel), uint8 or floats in [0, 1], of
                the size that the pipeline makes.
            source_step: 1 … S−1.
            class_labels, prompt: as in a call; one edited image each.
            seed, output_type, return_trajectory: as in a call. The trajectory has the image in it.

        Raises:
            UserError: this is a teacher, or an argument cannot be used.
        """
        if not self.is_student:
            raise UserError("a teacher cannot edit images, since it has no history to put one in: open a student.")
        steps = self.model.steps
        if steps == 1:
            raise UserError("a student of 1 step cannot edit images: open one of at least 2 steps.")
        source_step = require_int(source_step, "source_step", 1, steps - 1)
        form = self._form(output_type, return_trajectory)
        labels, condition = self.told(class_labels, {"prompt": prompt}, is_guided=False)
        size, _, channels = self._pictures("edit images")
        pixels = read_image(image, size, channels)[None]
        program = self._compiled(self.edit_function, source_step=source_step, **form)
        noise = self._drawn_noise(seed, example_shape(self.config))
        return self._make(program, noise, labels, condition, output_type, len(labels), pixels)

    # ----------------------------------------------------------------------------------- the programs that run

    def generate_function(
        self, *, latent: bool = False, trajectory: bool = False, how: Solve | None = None, own_null: bool = False
    ) -> Program:
        """The program of a call, for `jax.jit` and `jax.export`, with symbolic batch sizes too.

        Args:
            latent: give what the network makes, instead of images.
            trajectory: give the steps too.
            how: a teacher is sampled; None for the config's own settings, and for a student.
            own_null: what guidance moves away from is a negative prompt, which is as long as it is itself, whatever
                `null_mask` says of the empty caption.

        Returns:
            A pure function (params, vae_params, noise (batch, height, width, channel), condition) → images in [0, 1],
            (batch, height, width, channel), or (images, trajectories (batch, step, height, width, channel)).
            `vae_params` is None for pixels.
        """
        model, is_student, present = self.model, self.is_student, self.presenter(latent, trajectory)
        how = how or make_solve(self.config)
        if own_null:
            model = model.clone(null_mask="own")

        def generate(params, vae_params, noise, labels):
            if is_student:
                points = sample_student(cast(ARDStudent, model), params, noise, labels)
                return present(vae_params, points, points[:, -1])
            solution = sample_teacher(cast(Backbone, model), params, noise, labels, how)
            return present(vae_params, solution.x0, solution.xt[:, -1])

        return generate

    def edit_function(self, *, source_step: int, latent: bool = False, trajectory: bool = False) -> Program:
        """The program of an edit: as `generate_function`, and the last argument is the image.

        The image is (1, height, width, channel) in [-1, 1].
        """
        model, vae, present = cast(ARDStudent, self.model), self.vae, self.presenter(latent, trajectory)
        alpha, sigma = source_coefficients(self.config, source_step)

        def edit(params, vae_params, noise, labels, image):
            x0 = image if vae is None else to_latents(vae, vae_params, image)
            source = alpha * x0.astype(noise.dtype) + sigma * noise  # the trajectory's own noise
            points = sample_student(model, params, noise, labels, given={source_step: source})
            return present(vae_params, points, points[:, -1])

        return edit

    def presenter(self, latent: bool, trajectory: bool) -> Callable[[PyTree, jax.Array, jax.Array], PyTree]:
        """(vae_params, points (batch, step, …), sample (batch, …)) → what a program hands back."""
        vae, is_student = self.vae, self.is_student

        def decode(vae_params, x):
            if latent:
                return x
            images = x if vae is None else to_images(vae, vae_params, x)
            images = images.astype(jnp.promote_types(images.dtype, jnp.float32))
            return jnp.clip((images + 1) / 2, 0, 1)

        def present(vae_params, points, sample):
            if not trajectory:
                return decode(vae_params, sample)
            # one step at a time, or the VAE's activations for all of them would lie in memory together
            steps = jax.lax.map(lambda x: decode(vae_params, x), jnp.moveaxis(points, 1, 0))
            images = steps[-1] if is_student else decode(vae_params, sample)
            return images, jnp.moveaxis(steps, 0, 1)

        return present

    # ------------------------------------------------------------------------------------------- running them

    def _compiled(self, maker: Callable[..., Program], **settings: object) -> Program:
        """`maker(**settings)`, jitted once: jit itself then compiles once a shape."""
        key = (maker.__name__, *settings.items())
        if key not in self._jitted:
            self._jitted[key] = jax.jit(maker(**settings))
        return self._jitted[key]

    def _make(
        self,
        program: Program,
        noise: Callable[[np.ndarray], jax.Array],
        labels: np.ndarray,
        condition: Condition,
        output_type: str,
        batch_size: int,
        *rest: PyTree,
    ) -> PipelineOutput:
        """Runs a program over all labels in batches of one size, which all devices share.

        Args:
            program: what to run.
            noise: image numbers (batch,) → their noises.
            labels: (image,), what the output calls them.
            condition: what the network is told of them, leaves (image, …).
            output_type: see `PipelineOutput`.
            batch_size: images at a time.
            rest: the program's further arguments.
        """
        count, devices = len(labels), self.mesh.size
        size = math.ceil(min(batch_size, count) / devices) * devices
        parts = []

        def run(rows):
            told = put_batch(jax.tree.map(lambda leaf: leaf[rows], condition), self.mesh)
            return program(self.params, self.vae_params, noise(rows), told, *rest)

        with progress_bar(count, "image") if count > size else contextlib.nullcontext() as bar:
            for made in run_batches(run, equal_batches(np.arange(count), size)):
                leaves = jax.tree.leaves(made)
                parts.append([convert_output(leaf, output_type) for leaf in leaves])
                if bar is not None:
                    bar.update(len(leaves[0]))
        images, *trajectory = (concatenate(batches) for batches in zip(*parts, strict=True))
        return PipelineOutput(images, labels, *trajectory)

    def _drawn_noise(self, seed: int, shape: tuple[int, int, int]) -> Callable[[np.ndarray], jax.Array]:
        """Image numbers → their noises of this seed, as the stage `sample` draws them."""
        key = sampling_key(require_int(seed, "seed", 0, 2**31 - 1))
        draw = self._compiled(self._draw_function, shape=shape)
        return lambda index: draw(key, put_batch(index, self.mesh))

    def _draw_function(self, *, shape: tuple[int, int, int]) -> Program:
        return lambda key, index: draw_noise(key, index, shape)

    def _own_noise(self, array: np.ndarray) -> Callable[[np.ndarray], jax.Array]:
        """Image numbers → rows of the caller's noise."""
        return lambda index: put_batch(array[index], self.mesh)

    # ------------------------------------------------------------------------------------------- what is asked

    def told(self, asked: Any, words: Mapping[str, Any], is_guided: bool) -> tuple[np.ndarray, Condition]:
        """What images are called, and what the network is told of them, of a call's arguments."""
        if self.prompts is not None:
            return self.prompts.resolve(asked, words, is_guided, self.is_student)
        given = [name for name, value in words.items() if value is not None]
        if given:
            raise UserError(f"{given[0]} is for models that are told captions: give this one class_labels.")
        labels = resolve_labels([] if asked is None else asked, self.id2label, self.config.data.num_classes)
        return labels, labels

    def _form(self, output_type: str, trajectory: bool) -> dict[str, bool]:
        """What a program shall hand back."""
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is {output_type!r}: choose one of {', '.join(OUTPUT_TYPES)}.")
        if output_type != "latent":
            self._pictures("make pictures")
        return {"latent": output_type == "latent", "trajectory": bool(trajectory)}

    def _pictures(self, purpose: str) -> tuple[int, int, int]:
        """`image_shape`; UserError if there is none."""
        if self.image_shape is None:
            raise UserError(
                f"this pipeline has no VAE and cannot {purpose}: ask for output_type='latent', or convert a VAE into "
                f"the workdir (python -m ard_jax convert) and open it again."
            )
        return self.image_shape
