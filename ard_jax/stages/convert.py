"""Turns weights that were trained elsewhere into a teacher, a student or a VAE of a workdir, with a config for the
later stages.

A source is a published DiT or SiT file (.pt or .safetensors; a state dict, or a training checkpoint with `ema`), a
student of the ARD repository, a diffusers DiTPipeline folder (or its transformer or an AutoencoderKL alone), an
ARDPipeline folder, or hf:ORG/NAME, which is downloaded. PyTorch's own files need torch, and nothing in them is run.

Writes WORKDIR/teacher/ or WORKDIR/distill/NAME/ (checkpoints/, config.json, source.json with the licence, labels.json
where the names of the classes are known, done.json), WORKDIR/vae/ where the source has a VAE, and WORKDIR/config.py:
    python -m ard_jax sample --config WORKDIR/config.py --workdir WORKDIR
FID's Inception, as torch-fidelity and pytorch-fid publish it, goes into the user's cache folder, where `evaluate` finds
it. All of it is whole or absent. A second source may join it, such as a student its teacher, or a teacher its VAE; a
config.py that somebody has changed is never replaced.

What a source does not tell is asked for: --num-heads of a model of no published size, --points of a student of neither
4, 2 nor 1 steps (they also make a student of a file with a single final layer), --objective of a file that is not named
after DiT or SiT. A diffusers folder is converted as diffusers runs it; --frequency-shift 0 gives the spacing of the
time's sinusoids that the published weights were trained with.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import TypedDict

import numpy as np
from ml_collections import ConfigDict

from ard_jax.checks import validate
from ard_jax.config import default_config, plain
from ard_jax.convert.families.base import Hints, Source
from ard_jax.convert.families.folders import part_files, read_description
from ard_jax.convert.families.pixart import NULL_CAPTION_FILE
from ard_jax.convert.hub import fetch_source
from ard_jax.convert.published import stored_parameters
from ard_jax.convert.sources import open_source
from ard_jax.convert.vae import vae_from_diffusers, vae_to_diffusers
from ard_jax.convert.write import files_sha256, save_parameters
from ard_jax.errors import UserError
from ard_jax.files import file_sha256, read_json, require_finite, write_json, write_npz, write_text
from ard_jax.models import MASKS, Backbone
from ard_jax.progress import Stopwatch
from ard_jax.weights.tensors import WEIGHT_SUFFIXES, open_tensors, to_float32, write_tensors
from ard_jax.workdir import (
    check_same_config,
    merge_done,
    network_settings,
    read_config,
    read_done,
    recorded_config,
    require_done,
)

log = logging.getLogger("ard_jax")

VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
WRITTEN_BY = '"""Written for the later stages by `python -m ard_jax convert`; change what you like.'
WRITTEN_BY_OLDER = '"""Written by `python -m ard_jax convert`'  # in versions without a seal
SEAL = "# The SHA-256 of all above, as convert wrote it, by which it knows what you changed and leaves it alone: "
# Sections of the config that the source settles, and what it settles of them.
SETTLED = {
    "data": ("source", "name", "split", "image_size", "channels", "num_classes", "space", "horizontal_flip"),
    "model": (
        "name", "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "learn_sigma", "frequency_shift",
        "mlp_norm_eps", "caption_width", "interpolation", "size_conditioning", "null_mask",
    ),
    "captions": ("encoder", "length", "cleaning"),
    "diffusion": (
        "process", "train_steps", "beta_start", "beta_end", "spacing", "time_scale", "reversed", "solver", "steps",
        "guidance_scale", "guided_channels", "guidance_interval",
    ),
    "trajectories": ("points", "keep_noisy"),
    "student": ("name", "points", "target", "history_layers", "mask", "heads", "block_times"),
    "sample": ("models",),
}  # fmt: skip


# Of these, what a DiT has no use for is not written down for it, nor noisy points for who needs none.
SOMETIMES = {
    "model.name", "model.caption_width", "model.interpolation", "model.size_conditioning", "model.null_mask",
    "captions.encoder", "captions.length", "captions.cleaning", "trajectories.keep_noisy",
}  # fmt: skip


class Recorded(TypedDict):
    """What is read of a source.json."""

    source: str
    sha256: str


def _whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _whole_numbers(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 15,10,5,0")
    return tuple(map(int, text.split(",")))


FLAGS = {
    "--source": dict(required=True, metavar="FILE|FOLDER|hf:ORG/NAME", help="the weights"),
    "--workdir": dict(type=pathlib.Path, required=True, help="folder of the run"),
    "--dry-run": dict(action="store_true", help="say what the source is and where it would go; shapes alone are read"),
    "--name": dict(help="a student's folder under distill/ (default: what the source calls it, or ard)"),
    "--num-heads": dict(type=_whole_number, metavar="H", help="attention heads, if the source does not tell"),
    "--history-layers": dict(type=int, metavar="N", help="of a student (default: what its training recorded, or 6)"),
    "--points": dict(
        type=_whole_numbers, metavar="15,10,5,0", help="of a student: the teacher's steps that it stops at"
    ),
    "--mask": dict(choices=tuple(MASKS), help="of a student (default: causal)"),
    "--weights": dict(choices=("ema", "model"), help="of a training checkpoint (default: ema where there is one)"),
    "--objective": dict(choices=("noise", "velocity"), help="what the network predicts: DiT's noise or SiT's velocity"),
    "--frequency-shift": dict(type=float, metavar="0|1", help="of the time's sinusoids (default: 0; 1 for diffusers)"),
    "--allow-not-finite": dict(
        action="store_true", help="take weights that are NaN or infinite, which nothing samples"
    ),
    "--license": dict(metavar="ID", help="of the weights (default: what the source says)"),
}


def run(args: argparse.Namespace) -> None:
    """Converts.

    Raises:
        UserError: the source is none that we know, or its place in the workdir is taken by another.
    """
    watch = Stopwatch()
    hints = Hints(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Hints)})
    path = fetch_source(args.source)
    if _is_inception(path):
        return _cache_inception(path, args.dry_run)
    source = open_source(path, hints)
    if source.config is not None:
        if args.source.startswith("hf:") and source.config.captions.encoder == str(path.absolute()):
            source.config.captions.encoder = args.source  # and not where this machine keeps its copy
        validate(source.config)
    folders = _destinations(source, args)
    print("\n".join(_summary(source, args.source, folders)), flush=True)
    if args.dry_run:
        return
    missing = {part: folder for part, folder in folders.items() if not _is_converted(part, folder, source)}
    _check_compatible(missing, source, args)
    with _partial_folder(args.workdir) as temporary:
        if "vae" in missing:
            _write_vae(temporary / "vae", source, args.source)
        if "model" in missing:
            look = (lambda name, array: None) if args.allow_not_finite else require_finite
            _write_model(temporary / "model", source, args.source, watch, look)
        for part, folder in missing.items():
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / part, folder)
    _finish(folders, source, args, joins="model" in missing)


def _is_inception(path: pathlib.Path) -> bool:
    """Whether a file holds weights of some Inception v3, by the names of its arrays."""
    if not (path.is_file() and path.suffix in WEIGHT_SUFFIXES):
        return False
    try:
        names = open_tensors(path, leave_out=".num_batches_tracked").shapes
    except UserError:  # damaged, or arrays lie deeper in it: `open_source` says or knows
        return False
    return any(name.startswith("Mixed_7c.") for name in names)


def _cache_inception(path: pathlib.Path, dry_run: bool) -> None:
    """Converts FID's Inception for `evaluate`, which is given its file and finds this by its hash."""
    try:  # what measures wants more than the base requirements, which are enough for all else here
        from ard_jax.evaluation.inception import PUBLISHED_SHA256, InceptionFeatures, cached_path
    except ModuleNotFoundError as error:
        raise UserError(
            f"FID's Inception needs {error.name}, which is not installed: install ard_jax with its extra train."
        ) from None
    sha256 = file_sha256(path)
    kind = "the published weights" if sha256 == PUBLISHED_SHA256 else "other than the published weights"
    print(f"{path}: FID's Inception, {kind}\n  goes to     {cached_path(sha256)}", flush=True)
    if not dry_run:
        InceptionFeatures.from_file(path)
        print(f"done: give {path} to evaluate as evaluate.weights.", flush=True)


def _destinations(source: Source, args: argparse.Namespace) -> dict[str, pathlib.Path]:
    """Folders to be made, in this order; the model's comes last since it makes the workdir whole."""
    folders = {"vae": args.workdir / "vae"} if source.vae else {}
    if source.model is not None and source.config is not None:
        student = args.workdir / "distill" / source.config.student.name
        folders["model"] = student if source.model.is_student else args.workdir / "teacher"
    return folders


def _told(network: Backbone) -> str:
    """What a network is told, in words."""
    return f"{network.num_classes} classes" if network.num_classes else "captions"


def _summary(source: Source, name: str, folders: dict[str, pathlib.Path]) -> list[str]:
    """What a source is, line by line."""
    lines = [f"{name}: {source.what}"]
    if model := source.model:
        config, tensors, network = source.config, source.tensors, model.backbone
        assert config is not None and tensors is not None and network.image_size is not None
        side, tokens = network.image_size, (network.image_size // network.patch_size) ** 2
        count = sum(math.prod(shape) for shape in tensors.shapes.values())
        objective = "velocity" if config.diffusion.process == "flow" else "noise"
        with_table = f" with the position table of {tokens} tokens" if "pos_embed" in tensors else ""
        lines += [
            f"  images      {side}×{side}×{network.channels} ({config.data.space}), {_told(network)}",
            f"  model       width {network.hidden_size}, depth {network.depth}, {network.num_heads} heads, patch "
            f"{network.patch_size}, predicts {objective}",
            f"  parameters  {count:,}{with_table}",
        ]
        if model.is_student:
            points = ", ".join(map(str, config.student.points))
            lines.append(
                f"  student     {model.steps} steps (points {points}), {model.history_layers} history layers, "
                f"{model.mask} mask, {model.heads} heads"
            )
        if network.frequency_shift:
            lines.append("  time        as diffusers runs it; published weights were trained with --frequency-shift 0")
    lines.append(f"  licence     {source.license or 'unknown: --license says it'}")
    return [*lines, f"  goes to     {', '.join(map(str, folders.values()))}"]


# ------------------------------------------------------------------------------------------ what is there already


def _is_converted(part: str, folder: pathlib.Path, source: Source) -> bool:
    """Whether a folder holds this very part of the source.

    Raises:
        UserError: it holds anything else.
    """
    if not folder.exists():
        return False
    if not (folder / "source.json").exists():
        raise UserError(f"{folder} was not made by convert: choose another --workdir, or move that folder away.")
    recorded = read_json(folder / "source.json", Recorded)
    if recorded["sha256"] != files_sha256(_files_of(part, source)):
        raise UserError(
            f"{folder} was converted from another source ({recorded['source']}): choose another --workdir, or "
            f"move that folder away."
        )
    if part == "model":
        check_same_config(read_config(folder / "config.json"), plain(source.config), tuple(SETTLED), folder)
    print(f"{folder} holds this already.", flush=True)
    return True


def _check_compatible(missing: dict[str, pathlib.Path], source: Source, args: argparse.Namespace) -> None:
    """Raises UserError if a new model does not fit the models that are there, or would replace a config.py not ours."""
    if "model" not in missing:
        return
    for folder in _models_of(args.workdir):
        others = recorded_config(folder)
        found, given = network_settings(others), network_settings(source.config)
        check_same_config(found, given, ("data", "model", "diffusion"), folder)
    file = args.workdir / "config.py"
    if _has_config(source, args.workdir) and _is_as_written(file) is False:
        raise UserError(
            f"{file} is not as convert wrote it, and this model's would replace it: move it away, run the same command "
            f"again, and put what is yours into the new one."
        )


def _models_of(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Folders of the finished models of a workdir."""
    folders = (workdir / "teacher", *sorted((workdir / "distill").glob("*")))
    return [folder for folder in folders if folder.is_dir() and read_done(folder)]


def _has_config(source: Source, workdir: pathlib.Path) -> bool:
    """Whether config.py is to be of this model: a student's serves its teacher too."""
    students = [folder for folder in _models_of(workdir) if folder.parent.name == "distill"]
    is_student = source.model is not None and source.model.is_student
    return is_student or not students or not (workdir / "config.py").exists()


def _is_as_written(file: pathlib.Path) -> bool | None:
    """Whether convert may write a config.py: there is none, or it is as convert wrote it.

    None for one of an older version, which does not tell whether it was changed.
    """
    if not file.exists():
        return True
    text = file.read_text(encoding="utf-8", errors="replace")
    if text.startswith(WRITTEN_BY_OLDER):
        return None
    return text == _sealed(text.rpartition(SEAL)[0])


def _sealed(text: str) -> str:
    """A config.py with its hash as the last line."""
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


# --------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def _partial_folder(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder in the workdir that does not outlive the block; nor does the workdir if it was made here for nothing."""
    created = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    temporary = workdir / ".partial-convert"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary)
        with contextlib.suppress(OSError):  # it is not empty, as it should be
            for folder in created:
                folder.rmdir()


def _write_model(
    folder: pathlib.Path, source: Source, name: str, watch: Stopwatch, look: Callable[[str, np.ndarray], None]
) -> None:
    """A teacher's or student's folder, `done.json` last. A second thread hashes the source meanwhile."""
    folder.mkdir()
    with concurrent.futures.ThreadPoolExecutor(1) as hasher:
        source_hash = hasher.submit(files_sha256, source.files)
        assert source.model is not None and source.tensors is not None and source.config is not None
        params_hash = save_parameters(folder / "checkpoints", stored_parameters(source.tensors, source.model), look)
        write_json(folder / "config.json", plain(source.config) | {"inputs": {"source": source_hash.result()}})
        _write_source(folder, name, source_hash.result(), source.license)
        if source.labels:
            write_json(folder / "labels.json", source.labels)
        if source.null_caption is not None:
            write_npz(folder / NULL_CAPTION_FILE, vectors=np.asarray(source.null_caption.read(), np.float32))
    write_json(folder / "done.json", {"sha256": {"ema": params_hash}, "seconds": round(watch(), 2)})


def _write_vae(folder: pathlib.Path, source: Source, name: str) -> None:
    """A VAE's folder in diffusers' format, float32, with today's names."""
    assert source.vae is not None
    described = read_description(source.vae / "config.json")
    tensors = to_float32(open_tensors(source.vae), source.vae)
    state_dict, config = vae_to_diffusers(*vae_from_diffusers(tensors, described))
    for key, array in state_dict.items():
        require_finite(key, array)
    write_tensors(folder / VAE_WEIGHTS, state_dict, {"format": "pt"})
    _write_source(folder, name, files_sha256(_files_of("vae", source)), source.license)
    write_json(folder / "config.json", config)


def _write_source(folder: pathlib.Path, name: str, sha256: str, license: str | None) -> None:
    write_json(folder / "source.json", {"source": name, "sha256": sha256, "license": license})


def _finish(folders: dict[str, pathlib.Path], source: Source, args: argparse.Namespace, joins: bool) -> None:
    """What lies outside the parts' folders: distill/done.json, and config.py if the model has just joined.

    A run that was killed may have left an older config.py beside a whole model, so one that nobody changed is written
    again.
    """
    folder = folders.get("model")
    if folder is None:
        print(f"done: {args.workdir / 'vae'}", flush=True)
        return
    assert source.model is not None and source.config is not None
    if source.model.is_student:
        merge_done(args.workdir / "distill", {folder.name: require_done(folder, "convert")})
    file = args.workdir / "config.py"
    if _has_config(source, args.workdir) and (joins or _is_as_written(file)):
        config = source.config.copy_and_resolve_references()
        config.sample.models = (*(("teacher",) if (args.workdir / "teacher").exists() else ()), *config.sample.models)
        config.sample.models = tuple(dict.fromkeys(config.sample.models))
        write_text(file, _config_text(config, args.source))
    print(f"done: {folder}: python -m ard_jax sample --config {file} --workdir {args.workdir}", flush=True)


def _config_text(config: ConfigDict, name: str) -> str:
    """A config file for the later stages."""
    lines = [WRITTEN_BY, '"""', "", "from ard_jax.config import default_config", "", f"SOURCE = {name!r}", "", ""]
    lines += ["def get_config():", "    config = default_config()"]
    for section, every in SETTLED.items():
        usual = default_config()[section]
        keys = [key for key in every if f"{section}.{key}" not in SOMETIMES or config[section][key] != usual[key]]
        if not keys:
            continue
        lines.append(f"    config.{section}.update(")
        lines += [f"        {key}={config[section][key]!r}," for key in keys]
        lines.append("    )")
    return _sealed("\n".join([*lines, "    return config", "", "", ""]))


def _files_of(part: str, source: Source) -> tuple[pathlib.Path, ...]:
    return part_files(source.vae) if part == "vae" and source.vae else source.files
