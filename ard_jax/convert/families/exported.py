"""What ard_jax exported: an `ARDPipeline`, its student or teacher alone, or a .safetensors file with its config."""

import dataclasses
import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from ard_jax.build import BACKBONES, make_student, make_teacher
from ard_jax.config import default_config
from ard_jax.convert.families.base import STUDENT_HINTS, Hints, Source, fit_defaults
from ard_jax.convert.families.folders import (
    PART,
    PIPELINE,
    class_names,
    find_text_encoder,
    folder_class,
    folder_license,
    part_files,
    read_description,
)
from ard_jax.convert.published import check_published
from ard_jax.errors import UserError, first_line
from ard_jax.files import file_sha256, read_json
from ard_jax.weights.lazy import Tensors
from ard_jax.weights.tensors import open_tensors, to_float32, without_prefixes


def recognise(path: pathlib.Path, hints: Hints) -> Source | None:
    """A pipeline's folder, a part's, or a file whose metadata have a config.

    Raises:
        UserError: it is not whole, does not fit its config, or contradicts `hints`.
    """
    if folder_class(path, PIPELINE) == "ARDPipeline":
        return _open_pipeline(path, hints)
    if folder_class(path, PART) in (*BACKBONES, "ARDStudent"):
        return _open_part(path, hints)
    if path.suffix == ".safetensors" and not path.is_dir():
        return _open_file(path, hints)
    return None


def _open_pipeline(folder: pathlib.Path, hints: Hints) -> Source:
    path = folder / PIPELINE
    index = read_description(path)
    _check_weights(folder)
    name = next((name for name in ("student", "teacher") if name in index), None)
    if name is None:
        raise UserError(f"{path} names neither a student nor a teacher: save the pipeline again.")
    source = _open_part(folder / name, hints)
    assert source.model is not None and source.config is not None
    source.config.captions.encoder = find_text_encoder(folder)
    return dataclasses.replace(
        source,
        what=f"the {name} of an ARDPipeline",
        files=(path, *source.files),
        vae=folder / "vae" if "vae" in index else None,
        labels=class_names(index.get("id2label"), source.model.backbone.num_classes, path),
        license=source.license or folder_license(folder),
    )


def _check_weights(folder: pathlib.Path) -> None:
    """Raises UserError if weights are not those that `export` wrote, of which it left the hashes."""
    done = folder / "done.json"
    hashes = read_json(done, dict[str, Any]).get("sha256", {}) if done.exists() else {}
    for name, sha256 in hashes.items():
        path = folder / name
        if path.suffix == ".safetensors" and (not path.exists() or file_sha256(path) != sha256):
            raise UserError(
                f"{path} is not the file that was exported (its SHA-256 is not {sha256[:12]}…): get it again, or "
                f"delete {done.name} in it if you changed the weights yourself."
            )


def _open_part(folder: pathlib.Path, hints: Hints) -> Source:
    path = folder / PART
    config = _parse_config(read_description(path).get("config"), path)
    return _open_described(folder, part_files(folder), to_float32(open_tensors(folder), folder), config, hints)


def _open_file(path: pathlib.Path, hints: Hints) -> Source | None:
    """None for a file without a config."""
    hints.check_no_training_checkpoint(path)
    tensors = open_tensors(path)
    if "config" not in tensors.metadata:
        return None
    tensors = to_float32(without_prefixes(tensors), path)
    config = _parse_config(tensors.metadata["config"], path)
    source = _open_described(path, (path,), tensors, config, hints)
    assert source.model is not None
    id2label = json.loads(tensors.metadata.get("id2label", "{}"))
    return dataclasses.replace(source, labels=class_names(id2label, source.model.backbone.num_classes, path))


def _open_described(
    path: pathlib.Path, files: tuple[pathlib.Path, ...], tensors: Tensors, config: ConfigDict, hints: Hints
) -> Source:
    """A model whose config lies with it."""
    is_student = bool(config.sample.models[0] != "teacher")
    model = make_student(config) if is_student else make_teacher(config)
    check_published(tensors.shapes, model, "its config describes")
    hints.check_agreement(
        path,
        num_heads=model.backbone.num_heads,
        frequency_shift=model.backbone.frequency_shift,
        objective="velocity" if config.diffusion.process == "flow" else "noise",
    )
    hints.check_no_training_checkpoint(path)
    if is_student:
        config.student.name = hints.name or config.student.name
        config.sample.models = (config.student.name,)
        points = tuple(config.student.points)
        hints.check_agreement(path, points=points, history_layers=model.history_layers, mask=model.mask)
    else:
        hints.check_absent(f"{path} holds a teacher", *STUDENT_HINTS)
    return Source(
        what=f"{'an ARD student' if is_student else 'a teacher'} that ard_jax exported",
        files=files,
        config=config,
        model=model,
        tensors=tensors,
        license=hints.license,
    )


def _parse_config(described: Any, path: pathlib.Path) -> ConfigDict:
    """A whole config out of the sections that are kept with a model; `sample.models` says which kind it is.

    Raises:
        UserError: they are broken, or have settings of a later version.
    """
    try:
        described = json.loads(described) if isinstance(described, str) else described
        config, sections = default_config().lock(), {"data", "model", "diffusion"}
        if not sections <= set(described) <= sections | {"student", "captions"}:
            raise ValueError(f"it has the sections {', '.join(described)}")
        with config.ignore_type():
            config.update(_with_tuples(described))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} describes no model of this version of ard_jax ({first_line(error)}): export it again, or use the "
            f"version that did."
        ) from None
    config.sample.models = (config.student.name,) if "student" in described else ("teacher",)
    return fit_defaults(config)


def _with_tuples(value: Any) -> Any:
    """JSON gives lists back where tuples were."""
    if isinstance(value, dict):
        return {key: _with_tuples(part) for key, part in value.items()}
    return tuple(value) if isinstance(value, list) else value
