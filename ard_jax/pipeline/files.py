"""Pipelines on disk: our own folders, diffusers' `DiTPipeline`, finished folders of a workdir, and the hub.

A folder of ours:
model_index.json         which parts there are, and the names of the classes (id2label)
student/ or teacher/     config.json: its settings; diffusion_pytorch_model.safetensors: its weights, published names
vae/                     an AutoencoderKL, as diffusers writes it
README.md                the model card
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ard_jax.build import make_student, make_teacher
from ard_jax.config import plain
from ard_jax.convert import to_torch, vae_to_diffusers
from ard_jax.convert.families.folders import find_text_encoder, read_description
from ard_jax.convert.hub import fetch_source, is_repository
from ard_jax.convert.published import parameters
from ard_jax.convert.sources import open_source
from ard_jax.convert.usage import EMBEDS
from ard_jax.convert.vae import open_vae
from ard_jax.errors import UserError
from ard_jax.files import local_path, read_json, whole_folder, write_json
from ard_jax.models import AutoencoderKL, Network
from ard_jax.parallel import make_mesh
from ard_jax.pipeline.prompts import copy_encoder, describe_encoder
from ard_jax.types import Params, PyTree
from ard_jax.version import __version__
from ard_jax.weights.tensors import write_tensors
from ard_jax.workdir import (
    captions_folder,
    find_vae,
    load_student,
    load_teacher,
    read_done,
    recorded_config,
    teacher_folder,
)

OURS = {"model_index.json", "README.md", "vae", "student", "teacher", "text_encoder", "tokenizer"}
WEIGHTS = "diffusion_pytorch_model.safetensors"

# The keyword arguments of `ARDPipeline`.
Opened = dict[str, Any]


def open_pipeline(
    source: str | os.PathLike, dtype: jax.typing.DTypeLike | None = None, revision: str | None = None
) -> Opened:
    """What `ARDPipeline.from_pretrained` opens, see there."""
    folder = _find_folder(source, revision)
    _check_dtype(dtype)
    return with_dtype(_choose_opener(folder)(folder), dtype)


def with_dtype(opened: Opened, dtype: jax.typing.DTypeLike | None) -> Opened:
    """The parts set to compute in a type, and their parameters kept in it if it is bfloat16; None changes nothing.

    Raises:
        UserError: the type is neither float32 nor bfloat16.
    """
    name = _check_dtype(dtype)
    if name is None:
        return opened
    opened["config"].model.dtype = name
    if name == "bfloat16":
        for part in ("params", "vae_params"):
            opened[part] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), opened.get(part))
        if opened.get("vae") is not None:
            opened["vae"] = opened["vae"].clone(dtype=jnp.bfloat16)
    return opened


def _check_dtype(dtype: jax.typing.DTypeLike | None) -> str | None:
    """The name of a compute type, None for None."""
    if dtype is None:
        return None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {dtype!r}: choose float32 or bfloat16, or None.")
    return name


def _find_folder(source: str | os.PathLike, revision: str | None) -> pathlib.Path:
    """The folder that is meant, downloaded if it is the name of a hub repository.

    Raises:
        UserError: there is neither, or a folder has no revision.
    """
    name = os.fspath(source)
    if name.startswith("hf:"):
        return fetch_source(name, revision)
    folder = local_path(name)
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision is {revision!r}, but {name} is a folder here and has just one: leave it out.")
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file, but a pipeline is a folder: name the folder.")
    if not is_repository(name):
        raise UserError(f"there is no folder {name}: name a pipeline's folder, or a repository as hf:ORG/NAME.")
    try:
        return fetch_source(f"hf:{name}", revision)
    except UserError as error:
        raise UserError(f"there is no folder {name}, and {error}") from None


def _choose_opener(folder: pathlib.Path) -> Callable[[pathlib.Path], Opened]:
    """Which kind of folder it is.

    Raises:
        UserError: none that we know.
    """
    if (folder / "model_index.json").is_file():
        return _open_folder
    if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        return open_workdir
    paths = folder / "teacher", *sorted(folder.glob("distill/*")), *sorted(folder.glob("*"))
    models = [str(path) for path in paths if (path / "config.json").is_file() and (path / "checkpoints").is_dir()]
    hint = " or ".join(models[:2]) or "one with a model_index.json, or a finished one such as runs/x/distill/ard"
    raise UserError(f"{folder} is no pipeline: name {hint}.")


# ------------------------------------------------------------------------------------------------------ reading


def _open_folder(folder: pathlib.Path) -> Opened:
    """A folder of ours or of diffusers, which `convert` reads too."""
    source = open_source(folder)
    assert source.model is not None and source.tensors is not None  # a pipeline is no autoencoder alone
    vae, vae_params = open_vae(source.vae) if source.vae else (None, None)
    card = folder / "README.md"
    return {
        "params": parameters(source.tensors, source.model, array=np.asarray),
        "config": describe_model(source.config, source.model.is_student),
        "vae": vae,
        "vae_params": vae_params,
        "id2label": dict(enumerate(source.labels)),
        "text_encoder": find_text_encoder(folder),
        "card": card.read_text(encoding="utf-8") if card.is_file() else "",
    }


def describe_model(config: ml_collections.ConfigDict, is_student: bool) -> ml_collections.ConfigDict:
    """What of a config describes a model; where its data lay on some machine does not."""
    names = ("data", "model", "diffusion", *(("student",) if is_student else ()))
    names += () if config.data.num_classes else ("captions",)
    described = ml_collections.ConfigDict({name: config[name].to_dict() for name in names})
    described.data.dir = ""
    if "captions" in described:
        described.captions.update(dir="", path="", encoder="", prompts=())
    return described


def open_workdir(folder: pathlib.Path) -> Opened:
    """A teacher's or student's finished folder, with the VAE and the names that lie beside it."""
    mesh, config = make_mesh(devices=jax.local_devices()), recorded_config(folder)
    is_student = folder.absolute().parent.name == "distill" or "teacher" in (read_done(folder) or {})
    workdir = folder.absolute().parents[1 if is_student else 0]
    if is_student and config.student.kind != "history":
        raise UserError(
            f"{folder} holds a student of kind {config.student.kind!r}, which only the stages sample and evaluate run: "
            f"give the folder of an ARD student."
        )
    if is_student:
        params = load_student(folder, mesh).params
    else:
        config.teacher.dir = os.fspath(folder)
        params = load_teacher(config, workdir, mesh).params
    vae, vae_params = find_vae(config, workdir) or (None, None)  # latents can be made without one
    encoded = captions_folder(config, workdir) / "config.json"  # which says what text encoder made them
    captions = recorded_config(encoded.parent).captions if encoded.is_file() else config.captions
    config.captions.update(length=captions.length, cleaning=captions.cleaning)
    return {
        "params": params,
        "config": describe_model(config, is_student),
        "vae": vae,
        "vae_params": vae_params,
        "id2label": _read_names(folder / "labels.json") or _read_names(teacher_folder(config, workdir) / "labels.json"),
        "text_encoder": "" if config.data.num_classes else captions.encoder,
    }


def _read_names(path: pathlib.Path) -> dict[int, str]:
    """Names by class number, none if there is no such file."""
    return dict(enumerate(read_json(path, list[str]))) if path.is_file() else {}


# ------------------------------------------------------------------------------------------------------ writing


def write_pipeline(
    folder: str | os.PathLike,
    params: Params,
    config: ml_collections.ConfigDict,
    *,
    vae: AutoencoderKL | None,
    vae_params: PyTree,
    id2label: Mapping[int, str],
    text_encoder: str,
    card: str,
) -> None:
    """Writes a pipeline's folder, whole or not at all.

    Args:
        folder: its place.
        params, config, vae, vae_params, id2label, text_encoder, card: see `ARDPipeline`. A text encoder in a folder
            is copied; one that a package ships, or that is on the hub, is named.

    Raises:
        UserError: something is there that is no earlier pipeline of ours, or the text encoder's folder is not there.
    """
    folder = local_path(folder)
    _check_place(folder)
    how, named = describe_encoder(text_encoder) if text_encoder else ("", None)
    with whole_folder(folder) as new:
        name = "student" if config.get("student") else "teacher"
        model = make_student(config) if name == "student" else make_teacher(config)
        kind = type(model).__name__
        index: dict[str, Any] = {
            "_class_name": "ARDPipeline",
            "_ard_jax_version": __version__,
            name: ["ard_jax", kind],
        }
        described = {"_class_name": kind, "config": plain(describe_model(config, name == "student"))}
        write_json(new / name / "config.json", described)
        write_tensors(new / name / WEIGHTS, to_torch(model, params))
        if vae is not None:
            index["vae"] = ["diffusers", "AutoencoderKL"]
            state_dict, settings = vae_to_diffusers(vae, vae_params)
            write_json(new / "vae" / "config.json", settings)
            write_tensors(new / "vae" / WEIGHTS, state_dict)
        if how:
            index["text_encoder"] = named
        if how == "copied":
            copy_encoder(text_encoder, new)
        (new / "README.md").write_text(card or default_card(model, bool(how)), encoding="utf-8")
        index["id2label"] = {str(number): label for number, label in id2label.items()}
        write_json(new / "model_index.json", index)


def _check_place(folder: pathlib.Path) -> None:
    """Raises UserError if writing there would delete something that is not ours."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but a pipeline is a folder: choose another name.")
    there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if not there:
        return
    index = folder / "model_index.json"
    if not index.exists() or read_description(index).get("_class_name") != "ARDPipeline":
        raise UserError(f"{folder} is there and is no earlier pipeline of ours: choose another folder, or empty it.")
    others = [name for name in there if name not in OURS]
    if others:
        raise UserError(
            f"{folder} has more in it than an earlier pipeline of ours ({', '.join(others[:3])}): choose another "
            f"folder, or take that out."
        )


def default_card(model: Network, has_text_encoder: bool) -> str:
    """What a folder says of itself if nobody wrote it a card."""
    is_student = model.is_student
    what = f"An ARD student of {model.steps} steps" if is_student else "A diffusion transformer"
    classes = model.backbone.num_classes
    told = f"{classes} classes of images" if classes else "images of captions"
    words = '"a red apple"' if has_text_encoder else EMBEDS
    call = "class_labels=[0, 1]" if classes else words
    return (
        f"---\nlibrary_name: ard_jax\n---\n\n{what} for {told}.\n\n"
        "```python\nfrom ard_jax import ARDPipeline\n\n"
        'pipe = ARDPipeline.from_pretrained(".")  # this folder\n'
        f"images = pipe({call}, seed=0).images\n```\n"
    )
