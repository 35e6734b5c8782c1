"""The page and the Markdown table of `compare`: methods by steps, measured alike."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from ard_jax.report import measures, pieces, words
from ard_jax.report.figures import Series
from ard_jax.report.pieces import Chart, FinalImages
from ard_jax.report.render import render
from ard_jax.report.words import distance, number
from ard_jax.results import Measured

COST = (
    "Training examples, FLOPs and time are those of the student with whatever student it starts from, compiling "
    "included in the time; the teacher’s training and its trajectories are shared by all and not in them. A "
    "multiply-accumulate is two FLOPs, and only matrix products count."
)


MEASURED: tuple[str, ...] = ("fd", "fid", "fd_interval", "sfid", "inception_score", "degradation")
MEASURED += ("degradation_interval", "precision", "recall", "psnr", "recall_at_1", "recall_at_5")
MEASURED += ("network_calls", "gmac_per_image")
MEASURED += ("training_examples", "training_flops", "training_seconds")
# Of two values or of two kinds of captions: their means say enough.
WITHOUT_SPREAD = ("fd_interval", "degradation_interval", "recall_at_1", "recall_at_5")


def build_comparison(title: str, comparison: Mapping, pictures: Mapping[str, np.ndarray]) -> str:
    """The whole comparison as one self-contained HTML page.

    Args:
      title: heading of the page.
      comparison: what compare.json holds, see `stages.compare`.
      pictures: as `page.build_report` takes them, of the first seed.

    Raises:
      UserError: if a picture is not uint8 or not of the stated shape.
    """
    return render(
        "comparison.html.j2",
        title=title,
        lead=_lead(comparison),
        tiles=_tiles(comparison),
        notes=_notes(comparison),
        head=_head(comparison),
        beside_paper=_is_of_paper(comparison),
        rows=_cells(comparison, "\n{}"),
        cost=COST,
        charts=_over_steps(comparison),
        pictures=_pictures(comparison, pictures),
        seed=comparison["seeds"][0],
        budget=comparison["budget"] / 1e12,
        students=_students(comparison),
        config=comparison["config"],
    )


def markdown(comparison: Mapping) -> str:
    """The table as Markdown, a row a line, then what is in it."""
    table = pieces.markdown_table(_head(comparison), _cells(comparison, " ({})"))
    return "\n\n".join([table, *_notes(comparison), COST]) + "\n"


def _ranked(comparison: Mapping) -> list[Mapping]:
    """The teacher, then its students."""
    return [row for row in comparison["rows"] if row["kind"] == "teacher"] + _students(comparison)


def _students(comparison: Mapping) -> list[Mapping]:
    """By S, the nearest to the data first."""
    students = [row for row in comparison["rows"] if row["kind"] != "teacher"]
    return sorted(students, key=lambda row: (row["steps"], _rank(row["mean"]["fd"])))


def _rank(value: float | None) -> float:
    return value if words.finite(value) else np.inf


def _columns(comparison: Mapping) -> tuple[str, ...]:
    return measures.columns([row["mean"] for row in comparison["rows"]], MEASURED)


def _head(comparison: Mapping) -> tuple[str, ...]:
    return ("Method", "Steps", *words.headings(_columns(comparison)))


def _is_of_paper(comparison: Mapping) -> bool:
    return measures.is_of_paper(comparison.get("measured_with", [{}])[0], comparison["config"])


def _cells(comparison: Mapping, spread: str) -> Iterable[Sequence[str]]:
    """The table's rows; `spread` says how least and greatest follow the mean where there are several seeds.

    After the models come what is noise and, where it was measured alike, what the paper reports.
    """
    columns = _columns(comparison)
    for row in _ranked(comparison):
        measured = (words.cells(row[kind], columns) for kind in ("mean", "least", "greatest"))
        cells = [
            mean if least == greatest or key in WITHOUT_SPREAD else mean + spread.format(words.between(least, greatest))
            for key, mean, least, greatest in zip(columns, *measured, strict=True)
        ]
        yield [row["title"], str(row["steps"]), *cells]
    for title, found in measures.halves(*_noise(comparison)):
        yield [title, words.ABSENT, *words.cells(found, columns)]
    for title, steps, found in measures.PAPER if _is_of_paper(comparison) else ():
        yield [title, str(steps), *words.cells(found, columns)]


def _noise(comparison: Mapping) -> tuple[Mapping[str, float], Mapping[str, Any]]:
    """What `measures.halves` asks for."""
    teacher: Mapping[str, Any] = next((row["mean"] for row in comparison["rows"] if row["kind"] == "teacher"), {})
    return comparison.get("halves", {}), teacher


def _notes(comparison: Mapping) -> list[str]:
    """What the numbers are, in sentences."""
    columns = _columns(comparison)
    samples, real = number(comparison["samples"], ",.0f"), "real images"
    if comparison["real_images"] is not None:  # of ADM's reference file nobody says
        real = f"{number(comparison['real_images'], ',.0f')} {real}"
    fd = (
        f"FD is the Fréchet distance between {samples} samples of each model and {real}, in "
        f"{str(comparison['features'][0]).rstrip('.')}."
    )
    if "fid" not in columns:
        fd += " It ranks the models of this page and nothing else."
    seeds = comparison["seeds"]
    said = f"One seed, {seeds[0]}, so that differences of a few per cent may be chance."
    if len(seeds) > 1:
        said = (
            f"Means over the seeds {', '.join(map(str, seeds))}, each with its own teacher; least–greatest with them."
        )
    notes_on = {"fd_interval": measures.INTERVAL, "degradation_interval": measures.PAIRED}
    intervals = [note for key, note in notes_on.items() if key in columns]
    halves = measures.notes_on_halves(*_noise(comparison))
    notes = [fd, said, *intervals, *halves, *_worsened(comparison)]
    if comparison["quick"]:
        changes = ", ".join(f"{key} {value}" for key, value in comparison["quick"].items())
        notes.insert(0, f"A quick run, which trains and measures too little to rank methods by: {changes}.")
    return notes


def _worsened(comparison: Mapping) -> list[str]:
    """Says which students are farther from the data than the one of as many steps that they start from."""
    rows = {row["name"]: row for row in _ranked(comparison)}
    said = []
    for row in rows.values():
        start = rows.get(row.get("start", ""))
        if start is None or start["steps"] != row["steps"]:
            continue
        before, after = start["mean"]["fd"], row["mean"]["fd"]
        if words.finite(before) and words.finite(after) and after > before:
            said.append(f"{_titled(row)} ({distance(after)}, from {distance(before)} of {start['title']})")
    if not said:
        return []
    return [
        f"Farther from the real images than the students that they start from, which is not what their papers report: "
        f"{'; '.join(said)}."
    ]


# --- what fills the sections ------------------------------------------------------------------------------------------


def _best(comparison: Mapping) -> list[Mapping]:
    """Of each S the row of least FD."""
    best: dict[int, Mapping] = {}
    for row in _students(comparison):
        if words.finite(row["mean"]["fd"]):
            best.setdefault(row["steps"], row)
    return list(best.values())


def _lead(comparison: Mapping) -> str:
    methods = {row["method"] for row in _students(comparison)}
    said = f"{len(methods)} method{'s' * (len(methods) != 1)}, one teacher, one budget of training"
    if comparison["quick"]:
        return f"{said}: a quick look."
    nearest = ", ".join(_titled(row) for row in _best(comparison))
    return f"{said}. Nearest to the data: {nearest}." if nearest and len(methods) > 1 else f"{said}."


def _titled(row: Mapping) -> str:
    return f"{row['title']} in {_steps(row['steps'])}"


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number != 1)}"


def _tiles(comparison: Mapping) -> list[tuple[str, str, str]]:
    colours = _colours(comparison)
    rows = [row for row in comparison["rows"] if row["kind"] == "teacher"] + _best(comparison)
    return [(distance(row["mean"]["fd"]), f"FD, {_titled(row)}", colours[row["method"]]) for row in rows]


def _colours(comparison: Mapping) -> dict[str, str]:
    """A colour a method: the report's for ARD and step distillation, others in turn."""
    methods = dict.fromkeys(row["method"] for row in comparison["rows"])
    own = [name for name in methods if name not in ("teacher", "ard", "step")]
    turns = {name: f"other{place % 5 + 1}" for place, name in enumerate(own)}
    return {name: turns.get(name, name) for name in methods}


def _over_steps(comparison: Mapping) -> list[Chart]:
    fd = {"fd-over-steps": ("FD, lower is better", _lines(comparison, "fd"))}
    psnr = {"psnr-over-steps": ("PSNR to the teacher, higher is better", _lines(comparison, "psnr"))}
    return [
        *pieces.charts(fd, "steps", "FD", log=True, markers=True),
        *pieces.charts(psnr, "steps", "PSNR, dB", markers=True),
    ]


def _lines(comparison: Mapping, key: str) -> list[Series]:
    """A line a method over S, and the teacher as a dashed level."""
    rows = _ranked(comparison)
    steps = sorted({row["steps"] for row in _students(comparison)})
    series = []
    for method, colour in _colours(comparison).items():
        own = [row for row in rows if row["method"] == method and words.finite(row["mean"].get(key))]
        if own and method == "teacher":
            level = [own[0]["mean"][key]] * len(steps)
            series.append(Series(_titled(own[0]), colour, steps, level, dashed=True))
        elif own:
            series.append(Series(own[0]["title"], colour, [r["steps"] for r in own], [r["mean"][key] for r in own]))
    return series


def _pictures(comparison: Mapping, pictures: Mapping[str, np.ndarray]) -> dict[str, FinalImages]:
    """By the number of steps in words: what the students of so many steps make, with the FD of their own seed."""
    seed = str(comparison["seeds"][0])
    models = {
        row["name"]: Measured(kind=row["kind"], title=row["title"], fd=row["by_seed"][seed]["fd"])
        for row in comparison["rows"]
    }
    shown = {}
    for steps, rows in groupby(_students(comparison), key=lambda row: row["steps"]):
        names = [row["name"] for row in rows]
        own = {name: models[name] for name in ("teacher", *names)}
        shown[_steps(steps)] = pieces.final_images(own, pictures, names, differences=False)
    return shown
