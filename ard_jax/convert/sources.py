"""What a file or folder of weights is, told from its names, shapes and descriptions; no array is read for that.

published file      .pt, .pth or .safetensors with the DiT repository's names: a state dict, or a training checkpoint
                    with `ema` or `model`; a student's has `final_layer2`, …; SiT's has the very same names as DiT's
diffusers folder    a `DiTPipeline` (transformer, vae, scheduler), or its transformer or an autoencoder alone
our folder          an `ARDPipeline`, teacher or student
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ard_jax.build import make_student, make_teacher
from ard_jax.config import default_config
from ard_jax.convert import diffusers, pickles
from ard_jax.convert.lazy import Tensors
from ard_jax.convert.published import check_names, expected_shapes, make_model
from ard_jax.convert.tensors import KINDS, PICKLES, open_tensors, to_float32
from ard_jax.errors import UserError, first_line
from ard_jax.files import read_json
from ard_jax.models import ARDStudent, DiT
from ard_jax.models.dit import SIZES

log = logging.getLogger("ard_jax")

CHECKPOINT_PARTS = ("ema", "model")  # of a training checkpoint
PREFIXES = ("module.", "_orig_mod.", "model.", "ema_model.")  # what wrappers put before every name
POINTS = {4: (15, 10, 5, 0), 2: (10, 0), 1: (0,)}  # the paper's, of 25 steps
OF_STUDENTS = ("points", "history_layers", "mask")  # what can be told of a student alone
PUBLISHED_LICENSES = {"DiT": "CC-BY-NC-4.0", "SiT": "MIT"}
# Settings of diffusers' schedulers that say what the network means, and all that they may be here.
MEANING = {
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
# Those that change the sampling alone: what DDIM takes where they are left out, and what ours does.
SAMPLING = {
    "clip_sample": (True, False),
    "thresholding": (False, False),
    "steps_offset": (0, 0),
    "set_alpha_to_one": (True, True),
}


@dataclasses.dataclass(frozen=True)
class Told:
    """What the user says about a source because its files may not; None where the source shall tell.

    Attributes:
        num_heads: attention heads.
        history_layers: N of a student.
        points: of a student; makes one of a state dict with a single final layer.
        mask: of a student.
        name: of a student, its folder; "ard" where nothing says another.
        weights: "ema" or "model" of a training checkpoint.
        objective: "noise" (DiT) or "velocity" (SiT).
        license: of the weights.
        frequency_shift: of the time's sinusoids.
    """

    num_heads: int | None = None
    history_layers: int | None = None
    points: tuple[int, ...] | None = None
    mask: str | None = None
    name: str | None = None
    weights: str | None = None
    objective: str | None = None
    license: str | None = None
    frequency_shift: float | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that are known but not read.

    Attributes:
        what: it is, in words.
        files: that it is made of.
        config: a whole config that describes the model; None for an autoencoder alone.
        model: a teacher or student, None for an autoencoder alone.
        tensors: its arrays by their published names, float32.
        vae: folder of its autoencoder in diffusers' format, if it has one.
        labels: names of the classes by index, () if unknown.
        license: of the weights, if known.
    """

    what: str
    files: tuple[pathlib.Path, ...]
    config: ConfigDict | None = None
    model: DiT | ARDStudent | None = None
    tensors: Tensors | None = None
    vae: pathlib.Path | None = None
    labels: tuple[str, ...] = ()
    license: str | None = None


def open_source(path: pathlib.Path, told: Told | None = None) -> Source:
    """Recognises a file or folder.

    Raises:
        UserError: it is nothing that we know, is not whole, does not fit together, contradicts `told`, or leaves
            something open that `told` must say.
    """
    told = told or Told()
    if path.is_dir():
        return open_folder(path, told)
    if path.suffix in KINDS:
        return open_file(path, told)
    raise UserError(f"{path} is no file of weights: give one of {', '.join(KINDS)}, or a folder.")


def agree(told: Told, path: pathlib.Path, **known: Any) -> None:
    """Raises UserError if a flag contradicts what the source says itself."""
    for name, value in known.items():
        given = getattr(told, name)
        if given is not None and given != value:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is {given}, but {path} says {value}: leave {flag} out.")


def needless(told: Told, reason: str, *names: str) -> None:
    """Raises UserError if a flag is given that has no meaning for the source."""
    for name in names:
        if getattr(told, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no meaning here, since {reason}: leave it out.")


# ------------------------------------------------------------------------------------------------ published files


def open_file(path: pathlib.Path, told: Told) -> Source:
    """A file with the published names."""
    tensors, recorded, part = open_checkpoint(path, told)
    tensors = to_float32(without_prefixes(tensors), path)
    if "config" in tensors.metadata:
        source = open_described(path, (path,), tensors, parse_config(tensors.metadata["config"], path), told)
        names = json.loads(tensors.metadata.get("id2label", "{}"))
        return dataclasses.replace(source, labels=class_names(names, source.model.backbone.num_classes, path))
    model = make_model(
        tensors.shapes,
        num_heads=1,  # until it is known how wide and deep the model is
        history_layers=first_known(told.history_layers, recorded.get("stack"), 6),
        steps=len(told.points) if told.points else None,
        frequency_shift=told.frequency_shift or 0.0,
    )
    model = model.with_backbone(num_heads=find_heads(model, recorded, told))
    check_names(tensors.shapes, expected_shapes(model))
    objective = find_objective(path, model, recorded, told)
    if isinstance(model, ARDStudent):
        model = model.clone(mask=told.mask or "causal")
    else:
        needless(told, f"{path} holds a teacher", *OF_STUDENTS)
    config = describe(model, told)
    if objective == "velocity":  # SiT: time runs from noise to data, over a length of 1
        config.diffusion.update(process="flow", reversed=True, time_scale=1.0)
    names = {"noise": "DiT", "velocity": "SiT"}
    kind = "ARD student" if isinstance(model, ARDStudent) else f"{names[objective]} teacher"
    published = re.match(r"(DiT|SiT)-XL-2-\d+", path.name)
    return Source(
        what=f"{kind}, {f'the {part} of a training checkpoint' if part else 'a state dict'} with the published names",
        files=(path,),
        config=config,
        model=model,
        tensors=tensors,
        license=told.license or (PUBLISHED_LICENSES[published[1]] if published else None),
    )


def open_checkpoint(path: pathlib.Path, told: Told) -> tuple[Tensors, dict[str, Any], str]:
    """A file's arrays, the arguments that its training recorded, and which part of a training checkpoint they are."""
    loaded = pickles.load(path) if path.suffix in PICKLES else None
    parts = [name for name in CHECKPOINT_PARTS if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping)]
    if not parts:
        needless(told, f"{path} is no training checkpoint with ema and model in it", "weights")
        return open_tensors(path) if loaded is None else pickles.state_dict_tensors(loaded, path), {}, ""
    part = told.weights or parts[0]
    if part not in parts:
        raise UserError(f"{path} has no {part!r}: it has {' and '.join(parts)}, choose that with --weights.")
    recorded = loaded.get("args", {})
    recorded = vars(recorded) if isinstance(recorded, argparse.Namespace) else recorded
    return pickles.state_dict_tensors(loaded[part], path), dict(recorded) if isinstance(recorded, Mapping) else {}, part


def without_prefixes(tensors: Tensors) -> Tensors:
    """Names as the model's own, without what wrappers put before all of them."""
    stored = tensors.stored
    while prefix := next((p for p in PREFIXES if stored and all(name.startswith(p) for name in stored)), None):
        stored = {name.removeprefix(prefix): array for name, array in stored.items()}
    return Tensors(stored, tensors.metadata)


def first_known(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def find_heads(model: DiT, recorded: Mapping[str, Any], told: Told) -> int:
    """Attention heads: no shape tells them, but the published sizes' widths and depths do.

    Raises:
        UserError: nothing tells them.
    """
    size = model.backbone.hidden_size, model.backbone.depth
    known = [heads for width, depth, heads in SIZES.values() if (width, depth) == size]
    heads = first_known(told.num_heads, recorded.get("num_heads"), *known, 0)
    if not heads:
        raise UserError(
            f"nothing tells the attention heads of this model of width {size[0]} and depth {size[1]}, "
            f"which is no published size: give --num-heads."
        )
    return heads


def find_objective(path: pathlib.Path, model: DiT, recorded: Mapping[str, Any], told: Told) -> str:
    """ "noise" or "velocity", by the training's arguments, the flag, or the file's name; students predict from noise.

    Raises:
        UserError: nothing tells it, or it is SiT's with another path or prediction than its published ones.
    """
    by_name = {"SiT": "velocity", "DiT": "noise"}
    found = re.match("SiT|DiT", str(recorded.get("model", "")))
    if found:
        agree(told, path, objective=by_name[found[0]])
    for key, usual in (("path_type", "Linear"), ("prediction", "velocity")):
        if recorded.get(key, usual) != usual:
            raise UserError(f"{path} was trained with {key} {recorded[key]}, but only {usual} can be converted.")
    found = found or re.search("(?<![A-Za-z])(?:SiT|DiT)(?![a-z])", path.name)
    if not told.objective and not found and not isinstance(model, ARDStudent):
        raise UserError(
            f"nothing tells whether {path} predicts noise, as DiT does, or velocity, as SiT does: "
            f"give --objective noise or --objective velocity."
        )
    return told.objective or (by_name[found[0]] if found else "noise")


def describe(model: DiT, told: Told, latent: bool = False) -> ConfigDict:
    """A config for the later stages that makes this very model.

    Raises:
        UserError: the points of a student of this many steps are unknown.
    """
    config = default_config()
    config.data.update(
        image_size=model.backbone.image_size,
        channels=model.backbone.channels,
        num_classes=model.backbone.num_classes,
        space="latent" if latent or model.backbone.channels not in (1, 3) else "pixel",
    )
    fields = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "learn_sigma", "frequency_shift")
    config.model.update({name: getattr(model.backbone, name) for name in (*fields, "mlp_norm_eps")})
    config.sample.models = ("teacher",)
    if isinstance(model, ARDStudent):
        points = told.points or POINTS.get(model.steps)
        if points is None:
            raise UserError(
                f"nothing tells at which of the teacher's steps this student of {model.steps} steps stops: "
                f"give --points, {model.steps} falling numbers that end in 0."
            )
        config.student.update(
            name=told.name or "ard",
            points=points,
            history_layers=model.history_layers,
            mask=model.mask,
            heads=model.heads,
        )
        config.sample.models = (config.student.name,)
    return fit_defaults(config)


def fit_defaults(config: ConfigDict) -> ConfigDict:
    """The later stages' defaults are for XL/2 and 25 steps: fewer layers and other steps want others."""
    steps, usual = config.diffusion.steps, POINTS[4]
    scaled = sorted({round(point * steps / 25) for point in usual}, reverse=True)
    if config.sample.models == ("teacher",):
        config.student.history_layers = min(config.student.history_layers, config.model.depth)
        config.student.points = tuple(scaled)
    config.trajectories.points = tuple(sorted({*scaled, *config.student.points}, reverse=True))
    return config


# --------------------------------------------------------------------------------------------------------- folders


def open_folder(folder: pathlib.Path, told: Told) -> Source:
    """A pipeline, a part of one, or a folder with just one file of weights."""
    if (folder / "model_index.json").is_file():
        index = read_description(folder / "model_index.json")
        kind = index.get("_class_name")
        if kind == "DiTPipeline":
            return open_dit_pipeline(folder, index, told)
        if kind == "ARDPipeline":
            return open_ard_pipeline(folder, index, told)
        raise UserError(f"{folder} holds a {kind}: only a DiTPipeline or ARDPipeline can be converted.")
    if (folder / "config.json").is_file():
        described = read_description(folder / "config.json")
        kind = described.get("_class_name")
        if kind in diffusers.CLASSES:
            return open_transformer(folder, told)
        if kind == "AutoencoderKL":
            known = told.license or folder_license(folder)
            return Source("an autoencoder of diffusers", part_files(folder), vae=folder, license=known)
        if kind in ("DiT", "ARDStudent"):
            return open_part(folder, told)
        raise UserError(f"{folder} holds a {kind}: only a DiT, an ARD student or an AutoencoderKL can be converted.")
    files = [path for path in sorted(folder.iterdir()) if path.suffix in KINDS]
    if len(files) == 1:
        source = open_file(files[0], told)
        return dataclasses.replace(source, license=told.license or folder_license(folder) or source.license)
    raise UserError(
        f"{folder} is no pipeline, since it has no model_index.json or config.json, and it holds {len(files)} files of "
        f"weights: give a pipeline's folder, or the file that you mean."
    )


def open_dit_pipeline(folder: pathlib.Path, index: Mapping[str, Any], told: Told) -> Source:
    """A `DiTPipeline` of diffusers."""
    source = open_transformer(folder / "transformer", told)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    source.config.diffusion.update(scheduler_settings(read_description(scheduler), scheduler))
    vae = folder / "vae"
    read_description(vae / "config.json")
    source.config.data.space = "latent"
    return dataclasses.replace(
        source,
        what="a DiTPipeline of diffusers",
        files=(folder / "model_index.json", scheduler, *source.files),
        vae=vae,
        labels=class_names(index.get("id2label"), source.model.backbone.num_classes, folder / "model_index.json"),
        license=told.license or folder_license(folder),
    )


def open_transformer(folder: pathlib.Path, told: Told) -> Source:
    """The transformer of a `DiTPipeline`."""
    model = diffusers.dit_model(
        read_description(folder / "config.json"), frequency_shift=first_known(told.frequency_shift, 1.0)
    )
    agree(told, folder, num_heads=model.backbone.num_heads, objective="noise")
    needless(told, f"{folder} holds a teacher of diffusers", "weights", *OF_STUDENTS)
    config = describe(model, told)
    config.diffusion.guided_channels = 0  # diffusers guides them all
    return Source(
        what="a DiT transformer of diffusers",
        files=part_files(folder),
        config=config,
        model=model,
        tensors=diffusers.published_names(to_float32(open_tensors(folder), folder), model),
        license=told.license or folder_license(folder),
    )


def scheduler_settings(described: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """What a scheduler's config says, as settings of `config.diffusion`.

    Raises:
        UserError: the network's output or its times mean something else than our noise-predicting process.
    """
    kind = described.get("_class_name", "")
    if "FlowMatch" in kind or "Scheduler" not in kind:
        raise UserError(
            f"{path} describes a {kind}, which is no scheduler of a noise-predicting DiT: give its own one."
        )
    for key, only in MEANING.items():
        if described.get(key, only) != only:
            raise UserError(f"{path} has {key} {described[key]!r}, but only {only!r} can be converted.")
    differing = [
        f"{key} {described.get(key, default)!r}"
        for key, (default, ours) in SAMPLING.items()
        if described.get(key, default) != ours
    ]
    if kind != "DDIMScheduler":
        differing.insert(0, kind)
    if differing:
        log.warning("%s samples with %s; here it is DDIM without that.", path, ", ".join(differing))
    return {
        "train_steps": described.get("num_train_timesteps", 1000),
        "beta_start": described.get("beta_start", 1e-4),
        "beta_end": described.get("beta_end", 0.02),
        "spacing": described.get("timestep_spacing", "leading"),
    }


def class_names(id2label: Any, count: int, path: pathlib.Path) -> tuple[str, ...]:
    """Names by class index, () if there are none; a class without one is called by its number.

    Raises:
        UserError: they are no names by number.
    """
    if not id2label:
        return ()
    if not isinstance(id2label, Mapping) or not all(str(key).isdigit() for key in id2label):
        raise UserError(f"{path} has an id2label that gives no names by number: mend it.")
    names = {int(key): str(name) for key, name in id2label.items()}
    return tuple(names.get(number, f"class {number}") for number in range(count))


def open_ard_pipeline(folder: pathlib.Path, index: Mapping[str, Any], told: Told) -> Source:
    """A pipeline's folder of ours."""
    name = next((name for name in ("student", "teacher") if name in index), None)
    if name is None:
        raise UserError(
            f"{folder / 'model_index.json'} names neither a student nor a teacher: save the pipeline again."
        )
    source = open_part(folder / name, told)
    return dataclasses.replace(
        source,
        what=f"the {name} of an ARDPipeline",
        files=(folder / "model_index.json", *source.files),
        vae=folder / "vae" if "vae" in index else None,
        labels=class_names(index.get("id2label"), source.model.backbone.num_classes, folder / "model_index.json"),
        license=source.license or folder_license(folder),
    )


def open_part(folder: pathlib.Path, told: Told) -> Source:
    """The student or teacher of a pipeline's folder of ours."""
    path = folder / "config.json"
    config = parse_config(read_description(path).get("config"), path)
    return open_described(folder, part_files(folder), to_float32(open_tensors(folder), folder), config, told)


def open_described(
    path: pathlib.Path, files: tuple[pathlib.Path, ...], tensors: Tensors, config: ConfigDict, told: Told
) -> Source:
    """A model of ours, whose config lies with it."""
    is_student = bool(config.sample.models[0] != "teacher")
    model = make_student(config) if is_student else make_teacher(config)
    check_names(tensors.shapes, expected_shapes(model), "its config describes")
    objective = "velocity" if config.diffusion.process == "flow" else "noise"
    agree(
        told,
        path,
        num_heads=model.backbone.num_heads,
        frequency_shift=model.backbone.frequency_shift,
        objective=objective,
    )
    needless(told, f"{path} is no training checkpoint with ema and model in it", "weights")
    if is_student:
        config.student.name = told.name or config.student.name
        config.sample.models = (config.student.name,)
        points = tuple(config.student.points)
        agree(told, path, points=points, history_layers=model.history_layers, mask=model.mask)
    else:
        needless(told, f"{path} holds a teacher", *OF_STUDENTS)
    return Source(
        what=f"{'an ARD student' if is_student else 'a teacher'} that ard_jax exported",
        files=files,
        config=config,
        model=model,
        tensors=tensors,
        license=told.license,
    )


def parse_config(described: Any, path: pathlib.Path) -> ConfigDict:
    """A whole config out of the sections that are kept with a model; `sample.models` says which kind it is.

    Raises:
        UserError: they are broken, or have settings of a later version.
    """
    try:
        described = json.loads(described) if isinstance(described, str) else described
        config, sections = default_config().lock(), {"data", "model", "diffusion"}
        if not sections <= set(described) <= sections | {"student"}:
            raise ValueError(f"it has the sections {', '.join(described)}")
        with config.ignore_type():
            config.update(with_tuples(described))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} describes no model of this version of ard_jax ({first_line(error)}): export it again, or use the "
            f"version that did."
        ) from None
    config.sample.models = (config.student.name,) if "student" in described else ("teacher",)
    return fit_defaults(config)


def with_tuples(value: Any) -> Any:
    """JSON gives lists back where tuples were."""
    if isinstance(value, dict):
        return {key: with_tuples(part) for key, part in value.items()}
    return tuple(value) if isinstance(value, list) else value


def read_description(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object that describes a folder.

    Raises:
        UserError: it is missing or broken.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing, so {path.parent} is not whole: fetch it again.")
    try:
        described = read_json(path)
    except ValueError:
        described = None
    if not isinstance(described, dict):
        raise UserError(f"{path} is no JSON object: fetch it again.")
    return described


def part_files(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """A part's weights and description."""
    return tuple(path for path in sorted(folder.iterdir()) if path.suffix in (*KINDS, ".json"))


def folder_license(folder: pathlib.Path) -> str | None:
    """What the front matter of a folder's README.md calls its licence, or which file to see."""
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    lines = front[1].splitlines() if front else []
    said = {key: value.strip().strip("'\"") for key, _, value in (line.partition(":") for line in lines)}
    if said.get("license"):
        return said.get("license_name", "other") if said["license"] == "other" else said["license"]
    files = sorted(path.name for path in folder.glob("LICENSE*"))
    return f"see {files[0]}" if files else None
