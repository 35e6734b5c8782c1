"""How good the checkpoints of a training were, as `watch` measured them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ard_jax.report import pieces, words
from ard_jax.report.figures import Series
from ard_jax.report.pieces import Chart
from ard_jax.results import Measured

# Keys of the curve's lines that are drawn; a FID is also an "fd", and drawn once.
DRAWN = {"fid": "FID", "fd": "Fréchet distance"}
GROUPS = {True: "Teacher", False: "Students"}


def models_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, Measured]:
    """The models of a curve's lines, each as its last one says."""
    return {line["model"]: Measured.from_json(line) for line in lines}


def charts(lines: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> list[Chart]:
    """Distances over training steps; beside its students the teacher's last is a dashed line.

    Args:
      lines: of the curve, by model and step.
      colours: of the models, by name.
    """
    models, drawn = models_of(lines), []
    titles = words.titles(models)
    for key, measure in DRAWN.items():
        shown = [line for line in lines if words.finite(line.get(key)) and (key == "fid" or "fid" not in line)]
        points = {name: [(line["step"], line[key]) for line in shown if line["model"] == name] for name in models}
        for is_teacher, group in GROUPS.items():
            own = {name: found for name, found in points.items() if found and models[name].is_teacher == is_teacher}
            series = [
                Series(titles[name], colours.get(name, "ink"), [step for step, _ in found], [y for _, y in found])
                for name, found in own.items()
            ]
            steps = [step for found in own.values() for step, _ in found]
            for name in points if series and not is_teacher else ():
                if models[name].is_teacher and points[name]:
                    last = points[name][-1][1]
                    ends = (min(steps), max(steps))
                    series.append(Series(titles[name], colours.get(name, "ink"), ends, (last, last), dashed=True))
            chart = {f"checkpoints-{key}-{group.lower()}": (f"{group}, {measure}", series)}
            drawn += pieces.charts(chart, "training step", measure, markers=True)
    return drawn
