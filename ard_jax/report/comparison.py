"""The page and the Markdown table of `compare`: methods by steps, measured alike."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from ard_jax.report import pieces, words
from ard_jax.report.figures import Series
from ard_jax.report.words import number, significant

PAPER = (
    "From the paper (arXiv 2504.11295), not measured here: ImageNet 256×256, FID, 2.89 for the 25-step teacher. In 4 "
    "steps step distillation has 10.25, ARD 4.32, ARD with a discriminator 1.84; in 2 steps step distillation has "
    "10.92, ARD 6.29. Every other number on this page was measured here, on this data, in another measure: the two "
    "kinds must not be compared."
)

COST = (
    "Training examples, FLOPs and time are those of the student with whatever student it starts from, compiling "
    "included in the time; the teacher’s training and its trajectories are shared by all and not in them. A "
    "multiply-accumulate is two FLOPs, and only matrix products count."
)


class Column(NamedTuple):
    """One measurement: its key in a row's measurements, its heading, and how a value is written."""

    key: str
    heading: str
    write: Any


COLUMNS = (
    Column("fd", "FD ↓", number),
    Column("precision", "Precision ↑", lambda value: number(value, ".3f")),
    Column("recall", "Recall ↑", lambda value: number(value, ".3f")),
    Column("psnr", "PSNR to teacher, dB ↑", lambda value: number(value, ".1f")),
    Column("network_calls", "Network calls", lambda value: number(value, ",.0f")),
    Column("gmac_per_image", "GMAC / image", significant),
    Column("training_examples", "Training examples", lambda value: number(value, ",.0f")),
    Column("training_flops", "Training TFLOPs", lambda value: significant(value and value / 1e12)),
    Column("training_seconds", "Training time", lambda value: words.ABSENT if value is None else words.duration(value)),
)
HEAD = ("Method", "Steps", *(column.heading for column in COLUMNS))


def build_comparison(title: str, comparison: Mapping, pictures: Mapping[str, np.ndarray]) -> str:
    """The whole comparison as one self-contained HTML page.

    Args:
      title: heading of the page.
      comparison: what compare.json holds, see `stages.compare`.
      pictures: as `page.build_report` takes them, of the first seed.

    Raises:
      UserError: if a picture is not uint8 or not of the stated shape.
    """
    sections = [
        _headline(title, comparison),
        pieces.section("Measurements", "measurements", _measurements(comparison)),
        pieces.section("Quality over steps", "steps", _over_steps(comparison)),
        pieces.section("The same noises", "pictures", _pictures(comparison, pictures)),
        pieces.section("How it was made", "made", _how(comparison)),
    ]
    return pieces.document(title, sections)


def markdown(comparison: Mapping) -> str:
    """The table as Markdown, a row a line, then what is in it."""
    cells = ([cell.replace("|", "\\|") for cell in row] for row in _cells(comparison, " ({})"))
    lines = [HEAD, ("---", *["---:"] * (len(HEAD) - 1)), *cells]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([table, *_notes(comparison), COST]) + "\n"


def ranked(comparison: Mapping) -> list[Mapping]:
    """The teacher, then students by S, the nearest to the data first."""
    students = [row for row in comparison["rows"] if not words.is_teacher(row)]
    students.sort(key=lambda row: (row["steps"], _rank(row["mean"]["fd"])))
    return [row for row in comparison["rows"] if words.is_teacher(row)] + students


def _rank(value: Any) -> float:
    return value if words.finite(value) else np.inf


def _cells(comparison: Mapping, spread: str) -> Iterable[Sequence[str]]:
    """The table's rows; `spread` says how least and greatest follow the mean where there are several seeds."""
    for row in ranked(comparison):
        cells = []
        for column in COLUMNS:
            mean, least, greatest = (column.write(row[kind].get(column.key)) for kind in ("mean", "least", "greatest"))
            cells.append(mean if least == greatest else mean + spread.format(f"{least}–{greatest}"))
        yield [row["title"], str(row["steps"]), *cells]


def _notes(comparison: Mapping) -> list[str]:
    """What the numbers are, in sentences."""
    samples, real = (number(comparison[key], ",.0f") for key in ("samples", "real_images"))
    fd = (
        f"FD is the Fréchet distance between {samples} samples of each model and {real} real images, in "
        f"{str(comparison['features'][0]).rstrip('.')}. It ranks the models of this page and nothing else."
    )
    seeds = comparison["seeds"]
    said = f"One seed, {seeds[0]}, so that differences of a few per cent may be chance."
    if len(seeds) > 1:
        said = (
            f"Means over the seeds {', '.join(map(str, seeds))}, each with its own teacher; least–greatest with them."
        )
    notes = [fd, said, *_worsened(comparison)]
    if comparison["quick"]:
        changes = ", ".join(f"{key} {value}" for key, value in comparison["quick"].items())
        notes.insert(0, f"A quick run, which trains and measures too little to rank methods by: {changes}.")
    return notes


def _worsened(comparison: Mapping) -> list[str]:
    """Says which students are farther from the data than the one of as many steps that they start from."""
    rows = {row["name"]: row for row in ranked(comparison)}
    said = []
    for row in rows.values():
        start = rows.get(row.get("start", ""))
        if start is None or start["steps"] != row["steps"]:
            continue
        before, after = start["mean"]["fd"], row["mean"]["fd"]
        if words.finite(before) and words.finite(after) and after > before:
            said.append(f"{_titled(row)} ({number(after)}, from {number(before)} of {start['title']})")
    if not said:
        return []
    return [
        f"Farther from the real images than the students that they start from, which is not what their papers report: "
        f"{'; '.join(said)}."
    ]


# --- sections ---------------------------------------------------------------------------------------------------------


def _headline(title: str, comparison: Mapping) -> str:
    said = [pieces.paragraph(note) for note in _notes(comparison)]
    return "\n".join(
        [
            f"<header>\n<h1>{escape(title)}</h1>",
            pieces.paragraph(_lead(comparison), "lead"),
            _tiles(comparison),
            *said,
            pieces.paragraph(PAPER, "note"),
            "</header>",
        ]
    )


def _best(comparison: Mapping) -> list[Mapping]:
    """Of each S the row of least FD."""
    best: dict[int, Mapping] = {}
    for row in ranked(comparison):
        if not words.is_teacher(row) and words.finite(row["mean"]["fd"]):
            best.setdefault(row["steps"], row)
    return list(best.values())


def _lead(comparison: Mapping) -> str:
    methods = {row["method"] for row in comparison["rows"] if not words.is_teacher(row)}
    said = f"{len(methods)} method{'s' * (len(methods) != 1)}, one teacher, one budget of training"
    if comparison["quick"]:
        return f"{said}: a quick look."
    nearest = ", ".join(_titled(row) for row in _best(comparison))
    return f"{said}. Nearest to the data: {nearest}." if nearest and len(methods) > 1 else f"{said}."


def _titled(row: Mapping) -> str:
    return f"{row['title']} in {_steps(row['steps'])}"


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number != 1)}"


def _tiles(comparison: Mapping) -> str:
    colours = _colours(comparison)
    rows = [row for row in comparison["rows"] if words.is_teacher(row)] + _best(comparison)
    return pieces.tiles([(number(row["mean"]["fd"]), f"FD, {_titled(row)}", colours[row["method"]]) for row in rows])


def _measurements(comparison: Mapping) -> str:
    note = (
        "↓ lower is better, ↑ higher is better. PSNR: to the teacher’s image from the same noise. The teacher’s "
        "network calls count guidance, which a student has learned and no longer pays for. "
    )
    head = [heading.replace(" ↓", "\N{NO-BREAK SPACE}↓").replace(" ↑", "\N{NO-BREAK SPACE}↑") for heading in HEAD]
    table = pieces.table("Every model, by steps and then by FD", head, _cells(comparison, "\n{}"))
    return table + "\n" + pieces.paragraph(note + COST, "note")


def _colours(comparison: Mapping) -> dict[str, str]:
    """A colour a method: the report's for ARD and step distillation, others in turn."""
    methods = dict.fromkeys(row["method"] for row in comparison["rows"])
    own = [name for name in methods if name not in ("teacher", "ard", "step")]
    turns = {name: f"other{place % 5 + 1}" for place, name in enumerate(own)}
    return {name: turns.get(name, name) for name in methods}


def _over_steps(comparison: Mapping) -> str:
    fd = _chart(comparison, "fd", "FD, lower is better", "FD", log=True)
    psnr = _chart(comparison, "psnr", "PSNR to the teacher, higher is better", "PSNR, dB")
    return pieces.charts([fd, psnr], "Nothing finite was measured, so there is no plot of it.")


def _chart(comparison: Mapping, key: str, caption: str, ylabel: str, **options: bool) -> str:
    """A line a method over S, and the teacher as a dashed level."""
    colours = _colours(comparison)
    rows = ranked(comparison)
    steps = sorted({row["steps"] for row in rows if not words.is_teacher(row)})
    series = []
    for method, colour in colours.items():
        own = [row for row in rows if row["method"] == method and words.finite(row["mean"].get(key))]
        if own and method == "teacher":
            level = [own[0]["mean"][key]] * len(steps)
            series.append(Series(_titled(own[0]), colour, steps, level, dashed=True))
        elif own:
            series.append(Series(own[0]["title"], colour, [r["steps"] for r in own], [r["mean"][key] for r in own]))
    return pieces.chart(f"{key}-over-steps", caption, series, "steps", ylabel, markers=True, **options)


def _pictures(comparison: Mapping, pictures: Mapping[str, np.ndarray]) -> str:
    rows = ranked(comparison)
    models = {
        row["name"]: {"kind": row["kind"], "title": row["title"], "fd": _first(comparison, row)["fd"]} for row in rows
    }
    body = []
    for steps in sorted({row["steps"] for row in rows if not words.is_teacher(row)}):
        names = [row["name"] for row in rows if row["steps"] == steps and not words.is_teacher(row)]
        own = {name: models[name] for name in ("teacher", *names)}
        heading = f"{_steps(steps)}, seed {comparison['seeds'][0]}"
        body.append(pieces.final_images(heading, own, pictures, names, differences=False))
    return "\n".join(body)


def _first(comparison: Mapping, row: Mapping) -> Mapping:
    """A row's measurements at the first seed, which the pictures are of."""
    return row["by_seed"][str(comparison["seeds"][0])]


def _how(comparison: Mapping) -> str:
    said = (
        "Every method was trained from the same teacher on the same trajectories, noises and labels, for as many steps "
        f"as {significant(comparison['budget'] / 1e12)} TFLOPs allow, which is what the config’s own student takes; a "
        "chain of students shares that, and a fine-tune has a number of steps of its own."
    )
    trained = "; ".join(
        f"{row['title']} ({row['steps']}): {number(row['training_steps'], ',.0f')} × {row['batch_size']}"
        for row in ranked(comparison)
        if not words.is_teacher(row)
    )
    details = pieces.folded("Config, as it was resolved", comparison["config"])
    return pieces.paragraph(said) + pieces.paragraph(f"Training steps × batch: {trained}.", "note") + details
