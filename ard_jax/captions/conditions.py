"""What the networks of a run are told: classes, or the captions of its store."""

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from ard_jax.build import make_teacher
from ard_jax.captions.store import Captions, open_captions
from ard_jax.captions.texts import texts_of_data, texts_sha256
from ard_jax.conditions import Conditions, Labels
from ard_jax.config import other_settings
from ard_jax.data import Source
from ard_jax.errors import UserError
from ard_jax.files import read_json
from ard_jax.workdir import captions_folder, read_config, teacher_folder


def load_conditions(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Conditions:
    """What there is to draw, and what a network is told of it: classes, or the captions of a store.

    Raises:
        UserError: there is no store of captions, or it is of another width than the network's.
    """
    if config.data.num_classes:
        return Labels(config.data.num_classes)
    captions = open_captions(captions_folder(config, workdir), config.run.workers)
    width = make_teacher(config).condition_shapes.tokens.shape[-1]
    if captions.width != width:
        raise UserError(
            f"the captions in {captions.directory} have {captions.width} channels, but the network reads {width}: "
            f"set captions.encoder to the text encoder that it was trained with, and run 'captions' again."
        )
    return captions


def inputs_of(conditions: Conditions) -> dict[str, str]:
    """What a stage notes of the conditions that it depends on; nothing of classes, which the config says."""
    if not isinstance(conditions, Captions):
        return {}
    return {"captions": conditions.sha256, "text_encoder": conditions.encoder_sha256}


def check_text_encoder(config: ml_collections.ConfigDict, workdir: pathlib.Path, conditions: Conditions) -> None:
    """Raises UserError if captions are of another text encoder than those that the teacher was trained with."""
    ours = inputs_of(conditions).get("text_encoder")
    path = teacher_folder(config, workdir) / "config.json"
    theirs = read_config(path).get("inputs", {}).get("text_encoder") if ours and path.exists() else None
    if ours and theirs and ours != theirs:
        raise UserError(
            f"the captions in {captions_folder(config, workdir)} were made by another text encoder (hash {ours[:12]}…) "
            f"than the teacher's ({theirs[:12]}…): encode them with the same encoder, length and cleaning."
        )


def check_pictures(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, conditions: Conditions, pictures: Source
) -> None:
    """Looks whether pictures to train on, whose labels are numbers of captions, go with the captions of the store.

    Raises:
        UserError: a picture has no caption, or one that is held out of training, or those of `data` have changed.
    """
    if not isinstance(conditions, Captions):
        return
    last = int(pictures[len(pictures) - 1]["label"])  # they are numbered in their order
    if last >= conditions.for_training:
        held_out = f", of which {conditions.held_out} are held out of training" if conditions.held_out else ""
        raise UserError(
            f"the last of the {len(pictures)} pictures of `data` has the caption of number {last}, but "
            f"{conditions.directory} holds {len(conditions)}{held_out}: give pictures and captions of one set, such as "
            f"data.split=train."
        )
    if config.data.space == "pixel":
        check_texts(config, workdir, pictures)
    elif config.data.dir and (made := pathlib.Path(config.data.dir).parent / "manifest.json").exists():  # by 'encode'
        folder, here = captions_folder(config, workdir), read_json(made, dict).get("texts_sha256", "")
        if recorded := _made_of_pictures(folder):
            _refuse(folder, _other_texts(recorded, here))


def check_texts(config: ml_collections.ConfigDict, workdir: pathlib.Path, pictures: Source) -> None:
    """Raises UserError if captions that were read of pictures (captions.source=data) are no longer theirs.

    Args:
        config, workdir: the run's.
        pictures: those of `data`, or that `encode` makes latents of. The captions of a TFDS dataset are not read for
            this, which takes minutes, but told apart by its name and split.
    """
    folder, section = captions_folder(config, workdir), "encode" if config.data.space == "latent" else "data"
    if config.data.num_classes or (recorded := _made_of_pictures(folder)) is None:
        return
    if config[section].source == "tfds":
        other = other_settings(recorded, config, (f"{section}.name", f"{section}.split", "data.caption_key"))
    else:
        other = _other_texts(recorded, texts_sha256(texts_of_data(config, pictures).texts))
    _refuse(folder, other)


def _made_of_pictures(folder: pathlib.Path) -> dict[str, Any] | None:
    """With which config captions were read of pictures; None where there are none, or captions from elsewhere."""
    recorded = read_config(folder / "config.json") if (folder / "config.json").exists() else None
    return recorded if recorded and recorded["captions"]["source"] == "data" else None


def _other_texts(recorded: Mapping[str, Any], here: str) -> list[str]:
    """In words, where captions have another hash than these; "" where none is known."""
    there = recorded.get("inputs", {}).get("texts", "")
    return [] if "" in (there, here) or there == here else [f"texts of hash {there:.8} there, {here:.8} here"]


def _refuse(folder: pathlib.Path, other: list[str]) -> None:
    """Raises UserError if there is anything in which captions are others."""
    if other:
        raise UserError(
            f"the captions in {folder} are not those of these pictures ({'; '.join(other)}), so that pictures would "
            f"have others' captions: move that folder away and run 'captions' again, or give the pictures it was made "
            f"with."
        )
