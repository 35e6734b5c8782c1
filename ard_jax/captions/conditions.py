"""What the networks of a run are told: classes, or the captions of its store."""

import pathlib

import ml_collections

from ard_jax.build import make_teacher
from ard_jax.captions.store import Captions, open_captions
from ard_jax.conditions import Conditions, Labels
from ard_jax.errors import UserError
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
