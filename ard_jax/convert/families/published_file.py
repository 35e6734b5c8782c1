"""A file with the published names: the DiT repository's, which SiT's and the ARD repository's students share.

It is a state dict (.pt, .pth or .safetensors), or a training checkpoint with `ema` or `model`. A student has
`final_layer2`, …; what tells SiT's from DiT's is a training's arguments, the file's name, or the user.
"""

import argparse
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ard_jax.convert import pickles
from ard_jax.convert.families.base import STUDENT_HINTS, Hints, Source, config_of_model, first_known
from ard_jax.convert.lazy import Tensors
from ard_jax.convert.published import check_names, expected_shapes, make_model
from ard_jax.convert.tensors import PICKLE_SUFFIXES, WEIGHT_SUFFIXES, open_tensors, to_float32, without_prefixes
from ard_jax.errors import UserError
from ard_jax.models import Network
from ard_jax.models.dit import SIZES

CHECKPOINT_PARTS = ("ema", "model")  # of a training checkpoint
LICENSES = {"DiT": "CC-BY-NC-4.0", "SiT": "MIT"}
OBJECTIVES = {"DiT": "noise", "SiT": "velocity"}


def recognise(path: pathlib.Path, hints: Hints) -> Source | None:
    """Any file of weights: this family comes last, and says what is missing of its names.

    Raises:
        UserError: it has other names, does not fit together, contradicts `hints`, or leaves something open that they
            must say.
    """
    if path.suffix not in WEIGHT_SUFFIXES or path.is_dir():
        return None
    tensors, arguments, part = _open_checkpoint(path, hints)
    tensors = to_float32(without_prefixes(tensors), path)
    model = make_model(
        tensors.shapes,
        num_heads=1,  # until it is known how wide and deep the model is
        history_layers=first_known(hints.history_layers, arguments.get("stack"), 6),
        steps=len(hints.points) if hints.points else None,
        frequency_shift=hints.frequency_shift or 0.0,
    )
    model = model.with_backbone(num_heads=_find_heads(model, arguments, hints))
    check_names(tensors.shapes, expected_shapes(model))
    objective = _find_objective(path, model, arguments, hints)
    if model.is_student:
        model = model.clone(mask=hints.mask or "causal")
    else:
        hints.check_absent(f"{path} holds a teacher", *STUDENT_HINTS)
    config = config_of_model(model, hints)
    if objective == "velocity":  # SiT: time runs from noise to data, over a length of 1
        config.diffusion.update(process="flow", reversed=True, time_scale=1.0)
    teacher = "SiT teacher" if objective == "velocity" else "DiT teacher"
    network = "ARD student" if model.is_student else teacher
    container = f"the {part} of a training checkpoint" if part else "a state dict"
    published = re.match(r"(DiT|SiT)-XL-2-\d+", path.name)
    return Source(
        what=f"{network}, {container} with the published names",
        files=(path,),
        config=config,
        model=model,
        tensors=tensors,
        license=hints.license or (LICENSES[published[1]] if published else None),
    )


def _open_checkpoint(path: pathlib.Path, hints: Hints) -> tuple[Tensors, dict[str, Any], str]:
    """A file's arrays, the arguments that its training recorded, and which part of a training checkpoint they are."""
    loaded = pickles.load(path) if path.suffix in PICKLE_SUFFIXES else None
    parts = [name for name in CHECKPOINT_PARTS if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping)]
    if not parts:
        hints.check_no_training_checkpoint(path)
        return open_tensors(path) if loaded is None else pickles.state_dict_tensors(loaded, path), {}, ""
    part = hints.weights or parts[0]
    if part not in parts:
        raise UserError(f"{path} has no {part!r}: it has {' and '.join(parts)}, choose that with --weights.")
    assert isinstance(loaded, Mapping)  # it has parts
    arguments = loaded.get("args", {})
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    return pickles.state_dict_tensors(loaded[part], path), arguments, part


def _find_heads(model: Network, arguments: Mapping[str, Any], hints: Hints) -> int:
    """Attention heads: no shape tells them, but the published sizes' widths and depths do.

    Raises:
        UserError: nothing tells them.
    """
    size = model.backbone.hidden_size, model.backbone.depth
    published = [heads for width, depth, heads in SIZES.values() if (width, depth) == size]
    heads = first_known(hints.num_heads, arguments.get("num_heads"), *published, 0)
    if not heads:
        raise UserError(
            f"nothing tells the attention heads of this model of width {size[0]} and depth {size[1]}, "
            f"which is no published size: give --num-heads."
        )
    return heads


def _find_objective(path: pathlib.Path, model: Network, arguments: Mapping[str, Any], hints: Hints) -> str:
    """ "noise" or "velocity", by the training's arguments, the flag, or the file's name; students predict from noise.

    Raises:
        UserError: nothing tells it, or it is SiT's with another path or prediction than its published ones.
    """
    found = re.match("SiT|DiT", str(arguments.get("model", "")))
    if found:
        hints.check_agreement(path, objective=OBJECTIVES[found[0]])
    for key, usual in (("path_type", "Linear"), ("prediction", "velocity")):
        if arguments.get(key, usual) != usual:
            raise UserError(f"{path} was trained with {key} {arguments[key]}, but only {usual} can be converted.")
    found = found or re.search("(?<![A-Za-z])(?:SiT|DiT)(?![a-z])", path.name)
    if not hints.objective and not found and not model.is_student:
        raise UserError(
            f"nothing tells whether {path} predicts noise, as DiT does, or velocity, as SiT does: "
            f"give --objective noise or --objective velocity."
        )
    return hints.objective or (OBJECTIVES[found[0]] if found else "noise")
