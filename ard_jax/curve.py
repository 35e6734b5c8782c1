"""evaluate/curve.jsonl: what `watch` measured of the checkpoints of a run, a line a checkpoint and model.

A line holds "model", "step", "checkpoint" (which one: `training.checkpoints.checkpoint_sha256`), what of
`results.Measured` is a number or a word, and of `results.Results` "features", "real_images" and "samples".
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ard_jax.errors import UserError
from ard_jax.files import read_json_lines, write_text
from ard_jax.results import Results

Line = Mapping[str, Any]

# Metrics by which a checkpoint can be the best: the function that chooses out of two.
BETTER = {
    "fid": min,
    "sfid": min,
    "fd": min,
    "inception_score": max,
    "precision": max,
    "recall": max,
    "psnr": max,
}
FRECHET = "frechet"  # the metric that is "fid" where that was measured, else "fd"
METRICS = (FRECHET, *BETTER)


def curve_path(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "evaluate" / "curve.jsonl"


def read_curve(workdir: pathlib.Path) -> list[Line]:
    """The lines, by model and step; none if there is no such file."""
    lines = [line for line in read_json_lines(curve_path(workdir)) if {"model", "step", "checkpoint"} <= line.keys()]
    return sorted(lines, key=_place)


def add_line(workdir: pathlib.Path, line: Line) -> list[Line]:
    """Adds a line, in place of one of the same model and step; the file is whole at every instant.

    Returns:
        All lines.
    """
    lines = [other for other in read_curve(workdir) if _place(other) != _place(line)]
    lines = sorted([*lines, line], key=_place)
    write_text(curve_path(workdir), "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _place(line: Line) -> tuple[str, int]:
    return str(line["model"]), int(line["step"])


def line_of(results: Results, model: str, step: int, checkpoint: str) -> dict[str, Any]:
    """What the curve keeps of results that `evaluate` wrote of one checkpoint; lists and tables are left out."""
    found = results.models[model].to_json()
    kept = {key: value for key, value in found.items() if isinstance(value, (int, float, str))}
    about = {key: getattr(results, key) for key in ("features", "real_images", "samples")}
    return {"model": model, "step": step, "checkpoint": checkpoint, **kept, **about}


def check_metric(metric: str, key: str) -> None:
    """Raises UserError, about the setting or flag `key`, for a metric by which no checkpoint can be the best."""
    if metric not in METRICS:
        raise UserError(f"{key} is {metric!r}: choose one of {', '.join(METRICS)}.")


def named_metric(lines: Iterable[Line], metric: str) -> str:
    """The key of lines that a metric stands for."""
    if metric != FRECHET:
        return metric
    return "fid" if any("fid" in line for line in lines) else "fd"


def best_line(lines: Iterable[Line], model: str, metric: str, is_there: Callable[[Line], bool]) -> Line | None:
    """The line of a model's best checkpoint, of equals the earliest; None if none was measured by that metric.

    Args:
        lines: of a curve.
        model, metric: whose best, and by what.
        is_there: whether the checkpoint of a line still is: that of the same step may be another training's. It may be
            slow to answer, and is asked of the best first, until it says yes.
    """
    own = [line for line in lines if line["model"] == model]
    key = named_metric(own, metric)
    own = [line for line in own if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])]
    ranked = sorted(own, key=lambda line: line[key], reverse=BETTER[key] is max)  # which leaves equals in their order
    return next(filter(is_there, ranked), None)


def require_best(workdir: pathlib.Path, model: str, metric: str, is_there: Callable[[Line], bool]) -> Line:
    """The same of a workdir's curve.

    Raises:
        UserError: nothing was measured by that metric of the checkpoints that are there.
    """
    best = best_line(read_curve(workdir), model, metric, is_there)
    if best is None:
        raise UserError(
            f"{curve_path(workdir)} says nothing of {model!r} by {metric!r} that is of a checkpoint which is there "
            f"now, so none of these is the best: run 'watch', or give a step, or another metric."
        )
    return best
