"""One HTML page that shows a run, or a sweep: no file beside it, no request to anywhere."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ard_jax.picture_grid import check_images
from ard_jax.report import captions, checkpoints, figures, film, measures, pieces, steps, words
from ard_jax.report.figures import Series, thin
from ard_jax.report.pieces import Chart, FinalImages, PictureGrid
from ard_jax.report.render import render
from ard_jax.report.words import distance, number, significant
from ard_jax.results import Measured, Results, is_step_distillation, main_target, pair

MEASURED: tuple[str, ...] = (
    "fd",
    "fid",
    "fd_interval",
    "sfid",
    "inception_score",
    "degradation",
    "degradation_interval",
    "precision",
    "recall",
)
MEASURED += ("psnr", "recall_at_1", "recall_at_5")
MEASURED += ("network_calls", "gmac_per_image", "seconds_per_image", "parameters")


def build_report(
    title: str,
    results: Results,
    pictures: Mapping[str, np.ndarray] | None,
    curves: Mapping | None,
    edits: Mapping[str, np.ndarray] | None = None,
    gallery: Mapping[str, np.ndarray] | None = None,
    curve: Sequence[Mapping[str, Any]] = (),
    progress: Mapping[str, Mapping[int, np.ndarray]] | None = None,
) -> str:
    """The whole report as one self-contained HTML page.

    Whatever is missing leaves its section out, with a sentence in its place; numbers that are not finite are
    shown as words; all text is escaped.

    Args:
      title: heading of the page.
      results: of the run.
      pictures: uint8 arrays, all rows from the same noise: `noise` (n, H, W, C); `teacher` and each student by its
        name (n, S, H, W, C); `label` (n,); where there are students with noisy points also
        `teacher_xt` (n, S, H, W, C), the teacher's noisy points. Empty or None where nothing can be shown.
      curves: name of the model → rows of its metrics.jsonl (`step`, `loss`, `samples_per_s`).
      edits: uint8 arrays: `source` (n, H, W, C), `label` (n,) of the class that it is turned into, and by a student's
        name (n, S, H, W, C): without the source, then with it in place of the prediction of step 1, …, S−1.
      gallery: samples of captions: `label` (n,) their words, `held_out` (n,) whether they were held out of training;
        and uint8 (n, H, W, C) under each model's name, and under `real` the data's own picture of each caption.
      curve: lines of what `watch` measured of checkpoints, as `ard_jax.curve` has them.
      progress: as `film.strips` takes it.

    Raises:
      UserError: if a picture is not uint8 or not of the stated shape.
    """
    models, curves = results.models, curves or {}
    lead, detail = words.headline(results)
    columns = measures.columns([model.to_json() for model in models.values()], MEASURED)
    return render(
        "report.html.j2",
        title=title,
        lead=lead,
        detail=detail,
        results=results,
        features=(results.features or "").rstrip("."),
        tiles=_tiles(results, models),
        pictures=_pictures(models, pictures or {}),
        head=["Model", *words.headings(columns)],
        measurements=_measurements(results, columns),
        notes=_notes(results),
        beside_paper=measures.is_of_paper(results.measured_with, results.config),
        judged=captions.judged(results),
        gallery=captions.gallery(models, gallery or {}),
        points=_points(results, models),
        psnr=_by_step(models, "psnr", {"psnr_per_step": ""}, "PSNR to the teacher, dB"),
        exposure=_by_step(
            models, "exposure", {"rollout_mse": ", rollout", "forced_mse": ", forced"}, "mean squared error", log=True
        ),
        by_heart=words.learnt_by_heart(models),
        given=_given(models),
        attention=_attention(models),
        edits=_edits(models, edits or {}),
        losses=_losses(models, curves),
        rates=_rates(models, curves),
        strips=film.strips(models, progress or {}),
        checkpoints=checkpoints.charts(curve, _colours({**checkpoints.models_of(curve), **models})),
        times=_times(results.seconds),
    )


def build_curve(title: str, curve: Sequence[Mapping[str, Any]]) -> str:
    """A page of its own of the distances of checkpoints, for while they come; `curve` as in `build_report`."""
    return render(
        "curve.html.j2",
        title=title,
        features=list(dict.fromkeys(line["features"].rstrip(".") for line in curve if line.get("features"))),
        checkpoints=checkpoints.charts(curve, _colours(checkpoints.models_of(curve))),
    )


def build_sweep(
    about: str,
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    results: Mapping,
    pictures: Mapping[str, Mapping[str, np.ndarray]],
    over: str | None,
) -> str:
    """The page of a sweep: its table, Fréchet distances along a setting, and what the students of each workdir make.

    Args:
      about: the sweep file's docstring, whose first line is the heading.
      table: the heads of its columns, and its rows.
      results: as `sweep._collect` returns them.
      pictures: by workdir, as in `build_report`.
      over: the setting that the entries' `over` are values of, None if they lie along none.

    Raises:
      UserError: if a picture is not uint8 or not of the stated shape.
    """
    title, _, text = about.strip().partition("\n")
    entries = results["entries"]
    settings = {key: value for key, value in results.items() if key != "entries"}
    settings["entries"] = {name: entry["settings"] for name, entry in entries.items()}
    workdirs = []
    for index, (workdir, drawn) in enumerate(pictures.items()):
        own = {name: entry for name, entry in entries.items() if entry["workdir"] == workdir}
        workdirs.append(_workdir(own, drawn, f"workdir-{index}"))
    return render(
        "sweep.html.j2",
        title=title,
        about=[paragraph for paragraph in text.split("\n\n") if paragraph.strip()],
        table=table,
        over=over,
        along=_along(entries, over) if over is not None else [],
        workdirs=workdirs,
        settings=settings,
    )


def _workdir(entries: Mapping[str, Mapping], pictures: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """What the students of one workdir make, how their errors accumulate, and where they look."""
    models = {"teacher": Measured.from_json(next(iter(entries.values()))["teacher"])}
    models |= {name: Measured.from_json(entry["results"] | {"title": name}) for name, entry in entries.items()}
    return {
        "entries": list(entries),
        "finals": pieces.final_images(models, pictures, [name for name in entries if name in pictures]),
        "given": _given(models, prefix),
        "attention": _attention(models, prefix),
    }


def _along(entries: Mapping[str, Mapping], over: str) -> list[Chart]:
    """FD by the value of a setting, a line for all entries that are alike in the others, and the teacher's."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in entries.values():
        rest = {key: value for key, value in entry["settings"].items() if key != over}
        label = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in rest.items()) or "students"
        if (fd := entry["results"].get("fd")) is not None:  # as of too few images
            lines.setdefault(label, []).append((entry["over"], fd))
    colours = ("ard", "step", "other1", "other2", "other3")
    series = [
        Series(label, colours[index % len(colours)], *_columns(points))
        for index, (label, points) in enumerate(lines.items())
    ]
    teachers = [(entry["over"], entry["teacher"]["fd"]) for entry in entries.values() if "fd" in entry["teacher"]]
    if not series or not teachers:
        return []
    series.append(Series("teacher", "teacher", *_columns(teachers), dashed=True))
    name = "Fréchet distance"
    return pieces.charts({"over": (f"{name} along {over}", series)}, over, name, log=True, markers=True)


def _columns(points: Iterable[tuple[float, float]]) -> tuple[Sequence[float], Sequence[float]]:
    """Points, sorted, as all x and all y."""
    x, y = zip(*sorted(points), strict=True)
    return x, y


def _capital(phrase: str) -> str:
    """First letter large, except that of the symbol x0."""
    return phrase if phrase.startswith("x0") else phrase.capitalize()


def _students(models: Mapping[str, Measured], target: str) -> dict[str, Measured]:
    """Step distillation first: what ARD is compared with is read before it."""
    students = {n: m for n, m in models.items() if not m.is_teacher and (m.target or "x0") == target}
    return dict(sorted(students.items(), key=lambda item: not is_step_distillation(item[1])))


def _colours(models: Mapping[str, Measured]) -> dict[str, str]:
    """A colour a model: the same for step distillation, and for the first ARD student, whatever the target."""
    colours = {name: "teacher" for name, model in models.items() if model.is_teacher}
    for target in words.TARGETS:
        first = dict(zip(pair(models, target), ("step", "ard"), strict=True))
        rest = 0
        for name in _students(models, target):
            colours[name] = first.get(name) or f"other{rest % 3 + 1}"
            rest += name not in first
    return colours


# --- what fills the sections ------------------------------------------------------------------------------------------


def _tiles(results: Results, models: Mapping[str, Measured]) -> list[tuple[str, str, str]]:
    """The few numbers that a reader came for: each with its words and its colour."""
    tiles = []
    ratio = results.degradation_ratio
    names = pair(models, main_target(models))
    step, ard = (models.get(name or "", Measured()) for name in names)
    if words.finite(ratio) and words.has_ratio(models, names):
        tiles.append((f"{number(ratio, ',.1f')}×", "degradation, step distillation over ARD", "ink"))
    shown = {"the teacher": (words.teacher_of(models), "teacher"), "step distillation": (step, "step")}
    for of, (model, colour) in (shown | {"ARD": (ard, "ard")}).items():
        if model.fd is not None:
            calls = model.network_calls
            said = f", {number(calls, ',.0f')} network calls" if calls is not None else ""
            tiles.append((distance(model.fd), f"FD of {of}{said}", colour))
    return tiles


def _pictures(
    models: Mapping[str, Measured], pictures: Mapping[str, np.ndarray]
) -> dict[str, tuple[FinalImages, Sequence[PictureGrid]]]:
    """By kind of point the final images, and for the first few samples every step; empty if nothing can be shown."""
    drawn = [name for name in pictures if name not in ("label", "noise", "teacher", "teacher_xt")]
    if not drawn and "teacher" not in pictures:
        return {}
    models = {name: models.get(name, Measured()) for name in ("teacher", *models, *drawn)}
    models["teacher"] = dataclasses.replace(models["teacher"], kind="teacher")
    shown: dict[str, tuple[FinalImages, Sequence[PictureGrid]]] = {}
    for target in words.TARGETS:
        names = [name for name in _students(models, target) if name in pictures]
        if names or (target == "x0" and not drawn):
            finals = pieces.final_images(models, pictures, names)
            shown[target] = finals, steps.progressions(models, pictures, names, target)
    return shown


def _measurements(results: Results, columns: Sequence[str]) -> list[list[str]]:
    """Cells of the table's rows: the teacher's first, after the students' what is noise and what the paper reports."""
    models = results.models
    titles, rows = words.titles(models), []
    teachers = {name: model for name, model in models.items() if model.is_teacher}
    for name, model in (teachers | _students(models, "x0") | _students(models, "xt")).items():
        degradation = None if model.is_teacher else words.degradation(models, name)
        rows.append([titles[name], *words.cells(model.to_json() | {"degradation": degradation}, columns)])
    beside = measures.halves(results.halves, words.teacher_of(models).to_json())
    if measures.is_of_paper(results.measured_with, results.config):
        beside += [(f"{title}, {steps} steps", found) for title, steps, found in measures.PAPER]
    return rows + [[title, *words.cells(found, columns)] for title, found in beside if rows]


def _notes(results: Results) -> list[str]:
    """What is to be said of the table's rows and columns."""
    models = results.models.values()
    notes = [measures.INTERVAL] if any(model.fd_interval for model in models) else []
    if any(model.degradation_interval for model in models):
        notes.append(measures.PAIRED)
    return notes + measures.notes_on_halves(results.halves, words.teacher_of(results.models).to_json())


def _points(results: Results, models: Mapping[str, Measured]) -> dict[str, list[str]]:
    """By kind of point that there are students of: cells with their degradations and the ratio of these.

    A ratio is only shown of two differences that are both above zero for certain, else it means nothing.
    """
    ratios = results.degradation_ratios
    rows = {}
    for target, word in words.TARGETS.items():
        names = pair(models, target)
        if names == (None, None):
            continue
        degradations = [None if name is None else words.degradation(models, name) for name in names]
        if words.has_ratio(models, names):
            ratio = number(ratios.get(target), ",.1f")
        else:
            ratio = words.ABSENT if None in degradations else "none"
        rows[target] = [_capital(word), *(distance(value, "+") for value in degradations), ratio]
    return rows


def _by_step(
    models: Mapping[str, Measured],
    prefix: str,
    lines: Mapping[str, str],
    ylabel: str,
    xlabel: str = "step",
    first: int = 1,
    log: bool = False,
) -> list[Chart]:
    """A chart a kind of point of what was measured by step.

    Args:
      prefix: what the charts' ids begin with.
      lines: key of a model's measurements → what its lines are called after the model's title; those of
        `forced_mse` are dashed.
      first: where the first value stands.
    """
    titles, colours = words.titles(models), _colours(models)
    drawn = {}
    for target, word in words.TARGETS.items():
        series = []
        for name, model in _students(models, target).items():
            for key, suffix in lines.items():
                if values := getattr(model, key):
                    y = [np.nan if value is None else float(value) for value in values]
                    x = range(first, first + len(y))
                    label = words.short_title(titles[name]) + suffix
                    series.append(Series(label, colours[name], x, y, dashed=key == "forced_mse"))
        drawn[f"{prefix}-{target}"] = _capital(word), series
    return pieces.charts(drawn, xlabel, ylabel, log=log, markers=True)


def _given(models: Mapping[str, Measured], prefix: str = "all") -> list[Chart]:
    """Charts of error accumulation; `prefix` tells their ids apart from those of others on the page."""
    xlabel = "first points that are the teacher’s"
    return _by_step(models, f"{prefix}-given", {"given_psnr": ""}, "PSNR of the image, dB", xlabel, first=0)


def _attention(models: Mapping[str, Measured], prefix: str = "all") -> list[Chart]:
    """Maps of attention; `prefix` as in `_given`."""
    titles = words.titles(models)
    maps: list[Chart] = []
    for name, model in models.items():
        if model.attention_mass:
            svg = figures.block_maps(f"{prefix}-attention-{len(maps)}", np.asarray(model.attention_mass, float))
            maps.append(Chart(titles[name], svg))
    return maps


def _edits(models: Mapping[str, Measured], edits: Mapping[str, np.ndarray]) -> dict[str, PictureGrid]:
    """By the student's title its edited images, a row a source."""
    names = [name for name in edits if name not in ("source", "label")]
    if not names or "source" not in edits:
        return {}
    titles = words.titles({name: models.get(name, Measured()) for name in (*models, *names)})
    sources = check_images(edits["source"])[:8]
    grids = {}
    for name in names:
        images = np.asarray(edits[name])
        steps = images.shape[1]
        heads = [*(f"after step {step}" for step in range(1, steps)), "no source"]
        rows = []
        for row, source in enumerate(sources):
            made = [
                pieces.picture(images[row, (place + 1) % steps], f"{titles[name]}, edit {row + 1}, {head}")
                for place, head in enumerate(heads)
            ]
            label = f"into {edits['label'][row]}" if "label" in edits else None
            rows.append((label, [pieces.picture(source, f"source {row + 1}"), *made]))
        grids[titles[name]] = PictureGrid(["", "source", *heads], rows)
    return grids


def _losses(models: Mapping[str, Measured], curves: Mapping[str, Sequence[Mapping]]) -> list[Chart]:
    titles, colours = words.titles(models), _colours(models)
    groups = {"teacher": ("Teacher", [n for n, m in models.items() if m.is_teacher])}
    groups |= {t: (f"Students, {w}", list(_students(models, t))) for t, w in words.TARGETS.items()}
    known = {name for _, names in groups.values() for name in names}
    groups["rest"] = ("Other runs", [name for name in curves if name not in known])
    drawn = {}
    for group, (caption, names) in groups.items():
        series = [
            Series(titles.get(name, name), colours.get(name, f"other{i % 3 + 1}"), *thin(curves[name]))
            for i, name in enumerate(names)
            if curves.get(name)
        ]
        drawn[f"loss-{group}"] = caption, series
    return pieces.charts(drawn, "training step", "loss", log=True)


def _rates(models: Mapping[str, Measured], curves: Mapping[str, Sequence[Mapping]]) -> list[str]:
    """Median samples a second of every training that recorded them."""
    titles = words.titles(models)
    rates = []
    for name, rows in curves.items():
        values = [row["samples_per_s"] for row in rows if words.finite(row.get("samples_per_s"))]
        if values:
            rates.append(f"{titles.get(name, name)} {significant(np.median(values))}")
    return rates


def _times(seconds: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """Stage, seconds and the length of its bar in percent of the longest; at the end the total, which has no bar."""
    if not seconds:
        return []
    finite = {stage: value for stage, value in seconds.items() if words.finite(value)}
    longest = max(finite.values(), default=0)
    bars = {stage: 100 * value / longest for stage, value in finite.items()} if longest > 0 else {}
    rows = [(stage, value, bars.get(stage, 0.0)) for stage, value in seconds.items()]
    return [*rows, ("total", sum(finite.values()), None)]
