"""Lists of prompts drawn by the models of a run, and how well the images fit them.

A list has a workdir of its own in the run's, `prompts/NAME/`, which has the run's models by symbolic links:

prompts.txt              its prompts, one a line
captions/, sample/       as in every workdir
compbench/ard/           the images of a model, laid out as `sample.layout` says
evaluate/adherence.json  how well they fit
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from ard_jax.captions.layouts import LAYOUTS, check_layout, write_layout
from ard_jax.captions.lists import Prompt, read_prompts
from ard_jax.convert.clip_folder import OpenedCLIP, open_clip_folder
from ard_jax.errors import UserError
from ard_jax.evaluation import clip_scores
from ard_jax.evaluation.clip_images import images_for_clip
from ard_jax.evaluation.npz import NpzArray, array_names
from ard_jax.files import file_sha256, local_path, write_json, write_text
from ard_jax.hosts import wait_for_all
from ard_jax.parallel import is_first
from ard_jax.progress import Stopwatch
from ard_jax.runner import with_settings
from ard_jax.snapshots import link_folders
from ard_jax.text import tokens_for_clip
from ard_jax.workdir import captions_folder, merge_done, read_done, recorded_config, require_done, write_done

BATCH = 64  # images or texts that a CLIP sees at a time


class Listed(NamedTuple):
    """A list of prompts of a run.

    Attributes:
        config: with which its captions are encoded and its images drawn.
        workdir: its own.
        prompts: in their order; image i is of prompt i // each.
        each: images of a prompt.
        layout: of the folders of images.
    """

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    prompts: Sequence[Prompt]
    each: int
    layout: str


def open_list(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Listed:
    """The list that `sample.prompts` names, with its workdir made.

    Raises:
        UserError: there is none, it cannot be laid out as asked, the networks are told classes, or its workdir is of
            another list.
    """
    settings = config.sample
    if config.data.num_classes:
        raise UserError(
            f"sample.prompts is {settings.prompts!r}, but the networks are told {config.data.num_classes} classes and "
            f"no captions (data.num_classes): leave it out, or give the config of a model of captions."
        )
    path = local_path(settings.prompts)
    prompts = read_prompts(path)
    each = settings.per_prompt or (LAYOUTS[settings.layout].each if settings.layout in LAYOUTS else 1)
    check_layout(settings.layout, prompts, each)
    home = workdir / "prompts" / path.stem
    texts = "".join(f"{prompt.text}\n" for prompt in prompts)
    if is_first():
        _write_once(home / "prompts.txt", texts)
        link_folders(workdir, home, ("teacher", "distill", "vae"))
    wait_for_all("a list of prompts has its workdir")
    told = {"source": "file", "path": str(home / "prompts.txt"), "dir": "", **_encoder(config, workdir)}
    drawn = {
        "prompts": "",
        "labels": tuple(number // each for number in range(each * len(prompts))),
        "count": each * len(prompts),
        "held_out": 0,
    }
    return Listed(with_settings(config, {"captions": told, "sample": drawn}), home, prompts, each, settings.layout)


def _write_once(path: pathlib.Path, text: str) -> None:
    """Writes a text; UserError if there is another."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path} is of another list of that name: rename the list, or move {path.parent} away.")
    write_text(path, text)


def _encoder(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """How the run's own captions were encoded, unless the config says it."""
    before = captions_folder(config, workdir)
    if config.captions.encoder or not (before / "config.json").exists():
        return {}
    recorded = recorded_config(before).captions
    return {key: recorded[key] for key in ("encoder", "length", "cleaning", "dtype")}


def lay_out(listed: Listed) -> None:
    """Writes the folders of images of all models that are to be drawn, but for those that are there already.

    Raises:
        UserError: the samples are latents, or damaged.
    """
    sampled = require_done(listed.workdir / "sample", "sample")["models"]
    written = (read_done(listed.workdir) or {}).get("models", {})
    for name in listed.config.sample.models:
        watch, place = Stopwatch(), f"{listed.layout}/{name}"
        samples = sampled[name]["sha256"]["samples.npz"]
        if written.get(place, {}).get("samples_sha256") != samples or not (listed.workdir / place).exists():
            images = _images(listed, name)
            write_layout(listed.workdir / place, listed.layout, listed.prompts, images.batches(listed.each))
            made = {"sha256": {}, "seconds": round(watch(), 2), "images": len(images), "samples_sha256": samples}
            merge_done(listed.workdir, {place: made})


def _images(listed: Listed, name: str) -> NpzArray:
    path = listed.workdir / "sample" / name / "samples.npz"
    if "arr_0" not in array_names(path):
        raise UserError(f"{path} holds latents, drawn without a VAE: put one into the workdir, and run 'sample' again.")
    images = NpzArray(path)
    if len(images) != listed.each * len(listed.prompts):
        raise UserError(f"{path} holds {len(images)} images, which are not those of this list: run 'sample' again.")
    return images


# ----------------------------------------------------------------------------------------------------- how they fit


class Score(NamedTuple):
    """A score of prompt adherence: what it is of vectors, how images are shown, and what stands before a prompt."""

    of: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    fit: str = "crop"
    prefix: str = ""


SCORES = {
    "clip_score": Score(lambda i, t, _: clip_scores.clip_score(i, t), prefix=clip_scores.CLIP_SCORE_PREFIX),
    "clip_similarity": Score(lambda i, t, _: clip_scores.clip_similarity(i, t)),
    "pick_score": Score(clip_scores.pick_score),
    "hps_v2": Score(lambda i, t, _: clip_scores.hps_v2(i, t), fit="pad"),
    "compbench_non_spatial": Score(lambda i, t, _: clip_scores.compbench_non_spatial(i, t)),
}


def judge(listed: Listed, settings: ml_collections.ConfigDict) -> None:
    """Scores the samples of all models that are to be drawn with the CLIP of `evaluate.clip`.

    Raises:
        UserError: there is no CLIP or no such score, or nothing has been sampled.
    """
    unknown = [name for name in settings.clip_scores if name not in SCORES]
    if unknown or not settings.clip_scores:
        raise UserError(f"evaluate.clip_scores is {tuple(settings.clip_scores)}: choose out of {', '.join(SCORES)}.")
    if not settings.clip:
        raise UserError("evaluate.clip is '', but prompts are judged by a CLIP: give the folder of one.")
    watch, clip = Stopwatch(), open_clip_folder(local_path(settings.clip))
    sampled = require_done(listed.workdir / "sample", "sample")["models"]
    scores = {name: SCORES[name] for name in settings.clip_scores}
    texts = [prompt.text for prompt in listed.prompts]
    vectors, cut = {}, {}
    for prefix in {score.prefix for score in scores.values()}:
        vectors[prefix], cut[prefix] = _encode_texts(clip, [prefix + text for text in texts])
    found = {}
    for name in listed.config.sample.models:
        if name not in sampled:
            raise UserError(
                f"{listed.workdir / 'sample'} has no samples of {name!r}: run 'sample' with this list first."
            )
        images = _images(listed, name)
        shown = {fit: _encode_images(clip, images, fit) for fit in {score.fit for score in scores.values()}}
        found[name] = {
            key: float(
                score.of(
                    shown[score.fit],
                    np.repeat(vectors[score.prefix], listed.each, axis=0),
                    float(clip.params["logit_scale"]),
                ).mean()
            )
            for key, score in scores.items()
        } | {"ema_sha256": sampled[name]["ema_sha256"]}
        print(name, *(f"{key} {found[name][key]:.4f}" for key in scores), flush=True)
    told: Mapping[str, Any] = {
        "models": found,
        "clip": str(settings.clip),
        "clip_sha256": clip.sha256,
        "prompts": len(texts),
        "images_per_prompt": listed.each,
        "cut": max(cut.values()),
    }
    folder = listed.workdir / "evaluate"
    write_json(folder / "adherence.json", told)
    write_done(folder, {"adherence.json": file_sha256(folder / "adherence.json")}, watch())


def _encode_texts(clip: OpenedCLIP, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """Their vectors (text, feature), and how many were cut."""
    ids, mask, cut = tokens_for_clip(clip.tokenizer, texts, clip.model.length)
    encode = jax.jit(lambda params, *told: clip.model.apply({"params": params}, *told, method="encode_text"))
    return _in_batches(lambda rows: encode(clip.params, ids[rows], mask[rows]), len(texts)), cut


def _encode_images(clip: OpenedCLIP, images: NpzArray, fit: str) -> np.ndarray:
    """Their vectors (image, feature)."""
    encode = jax.jit(lambda params, shown: clip.model.apply({"params": params}, shown, method="encode_image"))
    found = []
    for batch in images.batches(BATCH):
        shown = images_for_clip(list(batch), clip.model.image_size, fit)
        padded = np.concatenate([shown, np.repeat(shown[-1:], BATCH - len(shown), axis=0)])  # one program for all
        found.append(np.asarray(encode(clip.params, padded))[: len(shown)])
    return np.concatenate(found)


def _in_batches(encode: Callable[[np.ndarray], jax.Array], count: int) -> np.ndarray:
    """The rows of all, of which the last batch is filled up with the first ones."""
    found = [np.asarray(encode(np.arange(first, first + BATCH) % count)) for first in range(0, count, BATCH)]
    return np.concatenate(found)[:count]
