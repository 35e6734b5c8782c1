"""Puts a run on one self-contained HTML page: pictures from the same noise, tables, curves.

Reads `evaluate/`, with the curve that `watch` left there, and the metrics and pictures of every training, and writes
`report/index.html`, `report/results.json` and `report/teaser.png`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
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


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the report.

    Raises:
        UserError: the run has not been evaluated.
    """
    if not is_first():
        return
    watch, directory = Stopwatch(), workdir / "report"
    require_done(workdir / "evaluate", "evaluate")
    results = dataclasses.replace(read_results(workdir), seconds=_stage_seconds(workdir))
    paths = [workdir / "evaluate" / f"{name}.npz" for name in ("pictures", "edits", "gallery")]
    pictures, edits, gallery = (read_npz(path) if path.exists() else {} for path in paths)  # not every run has all
    folders = _folders(config, workdir, results.models)
    curves, progress = _read_curves(folders), {name: _read_progress(folder) for name, folder in folders.items()}
    html = build_report(config.report.title, results, pictures, curves, edits, gallery, read_curve(workdir), progress)
    atomic_write(directory / "index.html", lambda temporary: temporary.write_text(html, encoding="utf-8"))
    atomic_write(directory / "teaser.png", lambda temporary: temporary.write_bytes(teaser(pictures, results, gallery)))
    write_json(directory / "results.json", summary(results))
    files = ("index.html", "teaser.png", "results.json")
    write_done(directory, {file: file_sha256(directory / file) for file in files}, watch())


def summary(results: Results) -> dict[str, Any]:
    """results.json: each model under its own name, then the rest."""
    found = results.to_json()
    return found.pop("models") | found


def _stage_seconds(workdir: pathlib.Path) -> dict[str, float]:
    """Seconds of every finished stage; one entry a model where a stage runs model by model."""
    seconds: dict[str, float] = {}
    for stage in ("teacher", "trajectories", "distill", "sample", "evaluate"):
        done = read_done(workdir / stage) or {}
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
