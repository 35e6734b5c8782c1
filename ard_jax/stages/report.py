"""Puts a run on one self-contained HTML page: pictures from the same noise, tables, curves.

Reads `evaluate/`, with the curve that `watch` left there, and the metrics and pictures of every training, and writes
`report/index.html`, `report/results.json` and, unless a teacher of classes is alone, `report/teaser.png`.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from operator import methodcaller
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from ard_jax.curve import read_curve
from ard_jax.files import atomic_write, file_sha256, read_json_lines, read_npz, write_json
from ard_jax.parallel import is_first
from ard_jax.progress import Stopwatch
from ard_jax.report import build_report, film_steps, teaser
from ard_jax.results import Measured, Results, read_results
from ard_jax.training.pictures import pictures_in
from ard_jax.workdir import read_done, require_done, teacher_folder, write_done

log = logging.getLogger("ard_jax")


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the report.

    Raises:
        UserError: the run has not been evaluated.
    """
    if not is_first():
        return
    watch, directory = Stopwatch(), workdir / "report"
    made = require_done(workdir / "evaluate", "evaluate")["sha256"]
    results = dataclasses.replace(read_results(workdir), seconds=_stage_seconds(workdir))
    # not every run has all: what evaluate did not make this time is of other weights
    files = [f"{name}.npz" for name in ("pictures", "edits", "gallery")]
    pictures, edits, gallery = (read_npz(workdir / "evaluate" / file) if file in made else {} for file in files)
    folders = _folders(config, workdir, results.models)
    curves, progress = _read_curves(folders), {name: _read_progress(folder) for name, folder in folders.items()}
    html = build_report(config.report.title, results, pictures, curves, edits, gallery, read_curve(workdir), progress)
    written = {"index.html": html.encode()}
    if gallery or any(not model.is_teacher for model in results.models.values()):
        written["teaser.png"] = teaser(pictures, results, gallery)
    else:
        (directory / "teaser.png").unlink(missing_ok=True)  # of an earlier evaluation
        log.info("teaser.png is left out, which shows students beside their teacher: none was evaluated.")
    for file, content in written.items():  # once all of it is made: what is refused leaves the last report whole
        atomic_write(directory / file, methodcaller("write_bytes", content))
    write_json(directory / "results.json", summary(results))
    write_done(directory, {file: file_sha256(directory / file) for file in (*written, "results.json")}, watch())


def summary(results: Results) -> dict[str, Any]:
    """results.json: each model under its own name, then the rest."""
    found = results.to_json()
    return found.pop("models") | found


def _stage_seconds(workdir: pathlib.Path) -> dict[str, float]:
    """Seconds of every finished stage; one entry a model where a stage runs model by model."""
    seconds: dict[str, float] = {}
    for stage in ("captions", "encode", "teacher", "trajectories", "distill", "sample", "evaluate"):
        done = read_done(workdir / {"encode": "latents"}.get(stage, stage)) or {}
        if "models" in done:
            seconds |= {f"{stage}/{name}": model["seconds"] for name, model in done["models"].items()}
        elif done:
            seconds[stage] = done["seconds"]
    return seconds


def _folders(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, models: Mapping[str, Measured]
) -> dict[str, pathlib.Path]:
    """The folder of every training, by model."""
    students = {name: workdir / "distill" / name for name in models if name != "teacher"}
    return {"teacher": teacher_folder(config, workdir), **students}


def _read_progress(folder: pathlib.Path) -> dict[int, np.ndarray]:
    """What a training's film strip shows: uint8 (H, W, 3), by step."""
    paths = pictures_in(folder)
    return {step: np.asarray(Image.open(paths[step]).convert("RGB")) for step in film_steps(paths)}


def _read_curves(folders: Mapping[str, pathlib.Path]) -> dict[str, list[dict]]:
    """The lines of every training's metrics.jsonl, by model."""
    paths = {name: folder / "metrics.jsonl" for name, folder in folders.items()}
    return {name: read_json_lines(path) for name, path in paths.items() if path.exists()}
