"""A file with the published names: the DiT repository's, which SiT's and the ARD repository's students share.

It is a state dict (.pt, .pth or .safetensors), or a training checkpoint with `ema` or `model`. A student has
`final_layer2`, …; what tells SiT's from DiT's is a training's arguments, the file's name, or the user.
"""

import argparse
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ard_jax.convert.families import pixart
from ard_jax.convert.families.base import STUDENT_HINTS, Hints, Source, config_of_model, first_known
from ard_jax.convert.families.folders import PART, PIPELINE, part_files
from ard_jax.convert.published import check_published, make_model
from ard_jax.errors import UserError
from ard_jax.models import Network
from ard_jax.models.dit import SIZES
from ard_jax.weights import pickles
from ard_jax.weights.lazy import Tensors
from ard_jax.weights.tensors import PICKLE_SUFFIXES, WEIGHT_SUFFIXES, open_tensors, to_float32, without_prefixes

# Names under which trainings keep their averaged weights, and the others, by what --weights calls them.
PARTS = {
    "ema": ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_ema_state_dict"),
    "model": ("model", "state_dict", "model_state_dict", "module", "online_model"),
}
BESIDE = re.compile(r"projectors?\d*\.")  # heads that a training (REPA) has beside the network
LICENSES = {"DiT": "CC-BY-NC-4.0", "SiT": "MIT"}
OBJECTIVES = {"DiT": "noise", "SiT": "velocity"}


def recognise(path: pathlib.Path, hints: Hints) -> Source | None:
    """Any file of weights: this family comes last, and says what is missing of its names.

    Raises:
        UserError: it has other names, does not fit together, contradicts `hints`, or leaves something open that they
            must say.
    """
    described = any((path / file).exists() for file in (PIPELINE, PART))
    sharded = path.is_dir() and any(path.glob("*.index*.json")) and not described
    if not sharded and (path.suffix not in WEIGHT_SUFFIXES or path.is_dir()):
        return None
    tensors, arguments, part, left_out = _open_checkpoint(path, hints)
    tensors = without_prefixes(tensors)
    beside = sorted({name.split(".")[0] for name in tensors if BESIDE.match(name)})
    left_out += beside
    stored = {name: array for name, array in tensors.stored.items() if not BESIDE.match(name)}
    tensors = to_float32(Tensors(stored, tensors.metadata), path)
    without = f" (left out: {', '.join(left_out)})" if left_out else ""
    container = f"the {part} of a training checkpoint" if part else "a state dict"
    if pixart.CAPTION in tensors:
        return pixart.open_published(path, tensors, f"{container}{without}", hints)
    model = make_model(
        tensors.shapes,
        num_heads=1,  # until it is known how wide and deep the model is
        history_layers=first_known(hints.history_layers, arguments.get("stack"), 6),
        steps=len(hints.points) if hints.points else None,
        frequency_shift=hints.frequency_shift or 0.0,
    )
    model = model.with_backbone(num_heads=_find_heads(model, arguments, hints))
    check_published(tensors.shapes, model)
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
    published = re.match(r"(DiT|SiT)-XL-2-\d+", path.name)
    return Source(
        what=f"{network}, {container} with the published names{without}",
        files=part_files(path) if sharded else (path,),
        config=config,
        model=model,
        tensors=tensors,
        license=hints.license or (LICENSES[published[1]] if published else None),
    )


def _open_checkpoint(path: pathlib.Path, hints: Hints) -> tuple[Tensors, dict[str, Any], str, list[str]]:
    """A file's arrays, the arguments of its training, which part of a checkpoint they are, and what is left out.

    A training checkpoint holds several networks: each under a name of its own, or in one state dict with that name
    before every other (ema-pytorch's, Lightning's).

    Raises:
        UserError: it has not the part that `hints` ask for, or nothing tells which of its parts is meant.
    """
    if path.is_dir() or path.suffix not in PICKLE_SUFFIXES:
        hints.check_no_training_checkpoint(path)
        return open_tensors(path), {}, "", []
    loaded = pickles.load(path)
    if not isinstance(loaded, Mapping):
        return pickles.state_dict_tensors(loaded, path), {}, "", []
    arguments = loaded.get("args", {})
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    whole = {name: value for name, value in loaded.items() if isinstance(value, Mapping) and name != "args"}
    part, found = _choose(whole, path, hints)
    inner, content = _choose(_by_first_word(found), path, hints) if found else ("", {})
    if not found:
        flat, found = _choose(_by_first_word(loaded), path, hints)
        part = part or flat
    elif inner:
        part, found = inner, content
    if not part:
        hints.check_no_training_checkpoint(path)
    found = found or loaded
    counts = [name for name, value in found.items() if getattr(value, "ndim", 1) == 0]  # of steps, and the like
    kept = {name: value for name, value in found.items() if name not in counts}
    averaged = "n_averaged" in loaded
    return pickles.state_dict_tensors(kept, path), arguments, "average" if averaged else part, sorted(counts)


def _by_first_word(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The networks of a state dict, where names of `PARTS` stand before all others; {} if they do not."""
    found: dict[str, dict[str, Any]] = {}
    known = [name for names in PARTS.values() for name in names]
    for name, value in state_dict.items():
        first, _, rest = str(name).partition(".")
        if rest and first in known:
            found.setdefault(first, {})[rest] = value
    return found if any(name in PARTS["ema"] for name in found) else {}


def _choose(networks: Mapping[str, Any], path: pathlib.Path, hints: Hints) -> tuple[str, Mapping[str, Any]]:
    """The averaged network of several if there is one, or the one that is asked for; ("", {}) if there is none."""
    by_part = {part: [name for name in names if name in networks] for part, names in PARTS.items()}
    there = [part for part, names in by_part.items() if names]
    if not there:
        return "", {}
    part = hints.weights or there[0]
    unknown = [name for name in networks if "ema" in name.lower() and name not in PARTS["ema"]]
    if not hints.weights and part == "model" and unknown:
        raise UserError(
            f"{path} has {unknown[0]!r}, which may be an average of its weights: save that alone, or take "
            f"{by_part['model'][0]!r} with --weights model."
        )
    if part not in there:
        raise UserError(f"{path} has no {part!r}: it has {' and '.join(there)}, choose that with --weights.")
    return by_part[part][0], networks[by_part[part][0]]


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
