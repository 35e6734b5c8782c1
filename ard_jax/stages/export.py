"""Writes a finished teacher or student of a workdir in a form that others can use.

--format pipeline      a folder that ARDPipeline.from_pretrained opens
--format diffusers     a folder that diffusers' DiTPipeline or PixArt's opens (teachers of latents, with their VAE)
--format safetensors   one file with the published DiT names, which `convert` reads back
--format stablehlo     the whole sampler, noise and labels in, images out, for a machine that has just jax and numpy

Takes the last checkpoint of a finished training; --checkpoint takes another that is there, of one that goes on too: a
step, or the best by --metric of those that `watch` measured.

Writes WORKDIR/export/MODEL/FORMAT/ with a model card, and done.json last. Run again, it replaces what it wrote.

--push ORG/NAME        puts that folder on the Hugging Face hub too, in one commit, with the token of `hf auth login`; a
                       repository that is not there is made, and its owners alone see it unless --public is given
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections

from ard_jax.config import plain
from ard_jax.convert.card import Facts, choose_base_model, choose_license, model_card
from ard_jax.convert.diffusers_pipeline import check_diffusers, sampling_differences
from ard_jax.convert.families.folders import PIPELINE, folder_class
from ard_jax.convert.families.pixart import NULL_CAPTION_FILE
from ard_jax.convert.hub import check_push, push_folder
from ard_jax.convert.published import NULL_CAPTION, to_torch
from ard_jax.convert.stablehlo import PLATFORMS, parse_batch_sizes, parse_platforms
from ard_jax.curve import FRECHET, METRICS, check_metric
from ard_jax.errors import UserError
from ard_jax.files import file_sha256, read_json, read_npz, whole_folder, write_json
from ard_jax.models import count_parameters
from ard_jax.pipeline import ARDPipeline
from ard_jax.pipeline.files import open_workdir, with_dtype
from ard_jax.pipeline.formats import label_names, write_diffusers, write_stablehlo
from ard_jax.results import Results, read_results
from ard_jax.snapshots import at_checkpoint
from ard_jax.weights.tensors import write_tensors
from ard_jax.workdir import load_weights, read_done, recorded_config, require_done, teacher_folder, vae_folder

log = logging.getLogger("ard_jax")


def run(args: argparse.Namespace) -> None:
    """Exports.

    Raises:
        UserError: there is no such model or it is unfinished, it cannot have this form, or the output is not ours.
    """
    output = args.output or args.workdir / "export" / args.model / args.format
    _check_output(output)
    with _chosen(args) as chosen:
        _export(chosen, output)


def _export(args: argparse.Namespace, output: pathlib.Path) -> None:
    folder = _model_folder(args.workdir, args.model)
    done, config = require_done(folder, args.model), recorded_config(folder)
    _check_flags(args, done["sha256"])
    source = _teacher_source(folder, args)
    license = choose_license(source or {}, args.license)
    base_model = choose_base_model(source or {}, args.base_model)
    if args.push:
        check_push(args.push)
    is_student = args.model != "teacher"
    if args.format == "diffusers":
        check_diffusers(config, is_student)
    pipe = load(folder, args, done["sha256"])
    images = pipe.image_shape
    if images is None and args.format in ("diffusers", "stablehlo"):
        raise UserError(
            f"{folder} makes latents, and there is no VAE in {vae_folder(config, args.workdir)} that --format "
            f"{args.format} could make images of them with: put one there with 'convert', or choose --format pipeline "
            f"or safetensors."
        )
    notes = sampling_differences(config) if args.format == "diffusers" else []
    for note in notes:
        log.warning("%s", note)
    facts = Facts(
        name=args.model,
        form=args.format,
        config=config,
        is_student=is_student,
        part=args.weights,
        sha256=done["sha256"][args.weights],
        parameters=count_parameters(pipe.params),
        images=images,
        converted=(folder / "source.json").exists(),
        source=source,
        license=license,
        results=_measured(args, config, done["sha256"]["ema"]),
        notes=notes,
        repository=args.push,
        base_model=base_model,
        start=_start(config, args.workdir),
        text_encoder=pipe.prompts.source if pipe.prompts else "",
    )
    pipe.card = model_card(facts)
    with whole_folder(output) as temporary:
        FORMATS[args.format](pipe, temporary, args)
        (temporary / "README.md").write_text(pipe.card, encoding="utf-8")
        _finish(temporary, args, facts.sha256)
    print(f"done: {output}: {_how_to_open(output, args)}", flush=True)
    if args.push:
        print(f"pushed: {push_folder(output, args.push, args.public)}", flush=True)


# ---------------------------------------------------------------------------------------------- what is exported


@contextlib.contextmanager
def _chosen(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The flags, with a workdir in which the checkpoint that they name is the model's last."""
    check_metric(args.metric, "--metric")
    if args.checkpoint is None:
        yield args
        return
    folder = _model_folder(args.workdir, args.model, finished=False)
    with at_checkpoint(folder, args.workdir, args.checkpoint, args.metric, args.weights) as view:
        yield argparse.Namespace(**{**vars(args), "workdir": view})


def _model_folder(workdir: pathlib.Path, name: str, finished: bool = True) -> pathlib.Path:
    """The folder of a model.

    Raises:
        UserError: there is none of this name, or its training is not finished and has to be.
    """
    folders = {"teacher": workdir / "teacher"} | {
        path.name: path for path in sorted((workdir / "distill").glob("*")) if path.is_dir()
    }
    there = [name for name, folder in folders.items() if (folder / "config.json").exists()]
    if name not in there:
        hint = f"it has {', '.join(there)}" if there else "it has none, so train or convert one there first"
        raise UserError(f"{workdir} has no model {name!r}: {hint}.")
    if finished and read_done(folders[name]) is None:
        stage = "teacher" if name == "teacher" else "distill"
        raise UserError(
            f"{folders[name]} has no done.json, so its training is not finished: run the stage '{stage}' to its "
            f"end, or name a --checkpoint."
        )
    return folders[name]


def _check_flags(args: argparse.Namespace, sha256: dict[str, str]) -> None:
    """Raises UserError for flags that do not go with the format or the model."""
    for flag in ("batch_sizes", "platforms"):
        if getattr(args, flag) is not None and args.format != "stablehlo":
            raise UserError(f"--{flag.replace('_', '-')} is for --format stablehlo: leave it out.")
    parse_batch_sizes(args.batch_sizes)
    parse_platforms(args.platforms)
    if args.weights not in sha256:
        raise UserError(
            f"the {args.model} was converted and has just one set of weights, the ones called ema: leave --weights out."
        )


def _teacher_source(folder: pathlib.Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """`source.json` of a converted model, or of the teacher that it comes from.

    {} if that was trained with ard_jax, None if the teacher is not there any more.
    """
    teacher = teacher_folder(recorded_config(folder), args.workdir) if args.model != "teacher" else folder
    found = [path for path in (folder / "source.json", teacher / "source.json") if path.exists()]
    if found:
        return read_json(found[0], dict[str, Any])
    return {} if teacher.exists() else None


def load(folder: pathlib.Path, args: argparse.Namespace, sha256: dict[str, str]) -> ARDPipeline:
    """The model with the weights and in the type that are asked for."""
    opened = open_workdir(folder)
    if args.weights != "ema":
        like = jax.tree.map(_abstract, opened.pop("params"))
        opened["params"] = load_weights(folder, like, sha256[args.weights], args.weights)
    dtype = args.dtype or ("float32" if args.format == "stablehlo" else None)
    return ARDPipeline(**with_dtype(opened, dtype))


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _measured(args: argparse.Namespace, config: ml_collections.ConfigDict, ema: str) -> Results:
    """The workdir's results, without those of other weights than the model (hash `ema`) and its teacher now have."""
    path, teacher = args.workdir / "evaluate" / "results.json", read_done(teacher_folder(config, args.workdir))
    if args.weights != "ema" or not path.exists():
        return Results()
    results = read_results(args.workdir)
    now = ({"teacher": teacher["sha256"]["ema"]} if teacher else {}) | {args.model: ema}
    older = [name for name in now if name in results.models and results.models[name].ema_sha256 != now[name]]
    if older:
        names = " and ".join(older)
        log.warning("The results of %s in %s are of older weights, and are left out of the card.", names, path)
    return dataclasses.replace(results, models={name: results.models[name] for name in results.models.keys() - older})


def _start(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
    """The name of the student that a fine-tuned one started from, as the config or the workdir tells; or else ""."""
    students = (read_done(workdir / "distill") or {}).get("models", {})
    names = {made["sha256"]["ema"]: name for name, made in students.items()}
    return config.finetune.start or names.get(config.get("inputs", {}).get("start"), "")


# --------------------------------------------------------------------------------------------------- the formats


def write_pipeline(pipe: ARDPipeline, folder: pathlib.Path, args: argparse.Namespace) -> None:
    pipe.save_pretrained(folder)


def _write_safetensors(pipe: ARDPipeline, folder: pathlib.Path, args: argparse.Namespace) -> None:
    """Published names; the metadata says what their shapes do not: the model's whole config, and its classes."""
    metadata = {
        "format": "pt",
        "num_heads": str(pipe.model.backbone.num_heads),
        "config": json.dumps(plain(pipe.config)),
        "id2label": json.dumps(label_names(pipe)),
    }
    arrays, kept = to_torch(pipe.model, pipe.params), args.workdir / "teacher" / NULL_CAPTION_FILE
    if args.model == "teacher" and kept.is_file():  # of a PixArt's own file, which had it
        arrays[NULL_CAPTION] = read_npz(kept)["vectors"]
    write_tensors(folder / f"{args.model}.safetensors", arrays, metadata)


def _write_stablehlo(pipe: ARDPipeline, folder: pathlib.Path, args: argparse.Namespace) -> None:
    write_stablehlo(pipe, folder, parse_batch_sizes(args.batch_sizes), parse_platforms(args.platforms))


Writer = Callable[[ARDPipeline, pathlib.Path, argparse.Namespace], None]
FORMATS: dict[str, Writer] = {
    "pipeline": write_pipeline,
    "diffusers": lambda pipe, folder, args: write_diffusers(pipe, folder),
    "safetensors": _write_safetensors,
    "stablehlo": _write_stablehlo,
}

FLAGS = {
    "--workdir": dict(type=pathlib.Path, required=True, help="folder of the run"),
    "--model": dict(required=True, help="teacher, or a student's name, such as ard"),
    "--format": dict(required=True, choices=FORMATS),
    "--weights": dict(
        choices=("ema", "params"), default="ema", help="the running average (default), or the last step's"
    ),
    "--checkpoint": dict(metavar="best|STEP", help="one that is there, not the last of a finished training"),
    "--metric": dict(default=FRECHET, metavar="NAME", help=f"that best goes by: {', '.join(METRICS)}"),
    "--output": dict(type=pathlib.Path, help="folder to write (default: WORKDIR/export/MODEL/FORMAT)"),
    "--license": dict(default="", metavar="ID", help="licence of your own teacher's weights, such as apache-2.0"),
    "--push": dict(default="", metavar="ORG/NAME", help="a repository on the Hugging Face hub to put it in"),
    "--public": dict(action="store_true", help="let everybody see a repository that --push makes"),
    "--base-model": dict(default="", metavar="ORG/NAME", help="repository of the teacher, for the card"),
    "--dtype": dict(choices=("float32", "bfloat16"), help="of the weights, and of stablehlo's sums (default: float32)"),
    "--batch-sizes": dict(metavar="symbolic|1,8,…", help="stablehlo: any one (symbolic, the default), or just these"),
    "--platforms": dict(metavar=",".join(PLATFORMS), help="stablehlo: where it shall run (default: on all of these)"),
}


# ----------------------------------------------------------------------------------------------------- the folder


def _check_output(output: pathlib.Path) -> None:
    """Raises UserError if writing there would delete what no earlier export wrote."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file, but an export is a folder: choose another --output.")
    files = [path.relative_to(output) for path in sorted(output.rglob("*")) if path.is_file()]
    there = [str(path) for path in files if "__pycache__" not in path.parts]
    if not there:
        return
    done = read_done(output) or {}
    others = [name for name in there if name not in ("done.json", *done.get("sha256", ()))]
    if "format" not in done or others:
        raise UserError(
            f"{output} holds what no export wrote ({', '.join((others or there)[:3])}): choose another --output, or "
            f"take it out."
        )


def _finish(folder: pathlib.Path, args: argparse.Namespace, sha256: str) -> None:
    """Writes done.json, with the hash of the weights as the workdir has them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(
        folder / "done.json",
        {
            "sha256": {str(path.relative_to(folder)): file_sha256(path) for path in files},
            "format": args.format,
            "model": args.model,
            "weights": {args.weights: sha256},
        },
    )


def _how_to_open(output: pathlib.Path, args: argparse.Namespace) -> str:
    kind = folder_class(output, PIPELINE)  # of diffusers' folder
    return {
        "pipeline": f'open it with ARDPipeline.from_pretrained("{output}").',
        "diffusers": f'open it with {kind}.from_pretrained("{output}").',
        "safetensors": f"read it with python -m ard_jax convert --source {output} --workdir DIR.",
        "stablehlo": f"run it with python {output / 'run.py'} --out images.png (its --help says how to tell it what).",
    }[args.format]
