"""One HTML page that shows a run: no file beside it, no request to anywhere."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ard_jax.report import figures, pieces, words
from ard_jax.report.figures import Series
from ard_jax.report.words import number, significant

CURVE_POINTS = 300  # more cannot be told apart at the width of a chart


def build_report(
    title: str,
    results: Mapping,
    pictures: Mapping[str, np.ndarray] | None,
    curves: Mapping | None,
    edits: Mapping[str, np.ndarray] | None = None,
) -> str:
    """The whole report as one self-contained HTML page.

    Whatever is missing leaves its section out, with a sentence in its place; numbers that are not finite are
    shown as words; all text is escaped.

    Args:
      title: heading of the page.
      results: `features`, `real_images`, `samples`, `degradation_ratio`, `degradation_ratios`, `seconds` (stage →
        seconds), optionally `config`, and `models`: name → measurements. A teacher has kind "teacher", a
        student kind "student", `objective` ("ard" if absent), `target` ("x0" or "xt"), `steps` (S) and, by step, a
        list of S numbers `psnr_per_step` (dB); one of objective "ard" also `mask`, lists `forced_mse` and
        `rollout_mse`, by k = 0 … S−1 `given_psnr` (dB), and `attention_mass` (layer, query block, key block). Times
        are seconds, costs GMAC.
      pictures: uint8 arrays, all rows from the same noise: `noise` (n, H, W, C); `teacher` and each student by its
        name (n, S, H, W, C); `label` (n,); where there are students with noisy points also
        `teacher_xt` (n, S, H, W, C), the teacher's noisy points. Empty or None where nothing can be shown.
      curves: name of the model → rows of its metrics.jsonl (`step`, `loss`, `samples_per_s`).
      edits: uint8 arrays: `source` (n, H, W, C), `label` (n,) of the class that it is turned into, and by a student's
        name (n, S, H, W, C): without the source, then with it in place of the prediction of step 1, …, S−1.

    Raises:
      UserError: if a picture is not uint8 or not of the stated shape.
    """
    models = results.get("models") or {}
    pictures = pictures or {}
    curves = curves or {}
    sections = [
        _headline(title, results, models),
        pieces.section("Side by side", "pictures", _pictures(models, pictures)),
        pieces.section("Measurements", "measurements", _measurements(results, models)),
        pieces.section("x0 points and noisy points", "points", _points(results, models)),
        pieces.section("Closeness to the teacher, step by step", "psnr", _psnr(models)),
        pieces.section("Exposure bias", "exposure", _exposure(models)),
        pieces.section("Error accumulation", "given", _given(models)),
        pieces.section("Attention to the history", "attention", _attention(models)),
        pieces.section("Image editing", "edits", _edits(models, edits or {})),
        pieces.section("Training", "training", _training(models, curves)),
        pieces.section("Time", "time", _time(results.get("seconds") or {})),
        pieces.section("How it was made", "made", _made(results)),
    ]
    return pieces.document(title, sections)


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
      results: as `sweep.collect` returns them.
      pictures: by workdir, as in `build_report`.
      over: the setting that the entries' `over` are values of, None if they lie along none.

    Raises:
      UserError: if a picture is not uint8 or not of the stated shape.
    """
    title, _, text = about.strip().partition("\n")
    entries = results["entries"]
    sections = [f"<header>\n<h1>{escape(title)}</h1>"]
    sections += [pieces.paragraph(" ".join(paragraph.split())) for paragraph in text.split("\n\n") if paragraph.strip()]
    sections += ["</header>", pieces.section("Every entry", "entries", pieces.table(title, *table))]
    if over is not None:
        sections.append(pieces.section(f"Along {over}", "over", _along(entries, over)))
    for index, (workdir, drawn) in enumerate(pictures.items()):
        own = {name: entry for name, entry in entries.items() if entry["workdir"] == workdir}
        heading = "Students" if len(pictures) == 1 else ", ".join(own)
        sections.append(pieces.section(heading, f"workdir-{index}", _entries(own, drawn, f"workdir-{index}")))
    settings = {key: value for key, value in results.items() if key != "entries"}
    settings["entries"] = {name: entry["settings"] for name, entry in entries.items()}
    sections.append(pieces.section("How it was made", "made", pieces.folded("Sweep file and settings", settings)))
    return pieces.document(title, sections)


def _entries(entries: Mapping[str, Mapping], pictures: Mapping[str, np.ndarray], prefix: str) -> str:
    """What the students of one workdir make, how their errors accumulate, and where they look."""
    models = {name: {**entry["results"], "title": name} for name, entry in entries.items()}
    models = {"teacher": next(iter(entries.values()))["teacher"], **models}
    finals = pieces.final_images("Final images", models, pictures, [name for name in entries if name in pictures])
    return "\n".join([finals, _given(models, prefix), _attention(models, prefix)])


def _along(entries: Mapping[str, Mapping], over: str) -> str:
    """FD by the value of a setting, a line for all entries that are alike in the others, and the teacher's."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in entries.values():
        rest = {key: value for key, value in entry["settings"].items() if key != over}
        label = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in rest.items()) or "students"
        lines.setdefault(label, []).append((entry["over"], entry["results"]["fd"]))
    colours = ("ard", "step", "other1", "other2", "other3")
    series = [
        Series(label, colours[index % len(colours)], *zip(*sorted(points), strict=True))
        for index, (label, points) in enumerate(lines.items())
    ]
    teachers = sorted((entry["over"], entry["teacher"]["fd"]) for entry in entries.values())
    series.append(Series("teacher", "teacher", *zip(*teachers, strict=True), dashed=True))
    name = "Fréchet distance"
    chart = pieces.chart("over", f"{name} along {over}", series, over, name, log=True, markers=True)
    return pieces.charts([chart], "The entries have no Fréchet distances, so there is no plot.")


def _capital(phrase: str) -> str:
    """First letter large, except that of the symbol x0."""
    return phrase if phrase.startswith("x0") else phrase.capitalize()


def _students(models: Mapping[str, Mapping], target: str) -> dict[str, Mapping]:
    """Step distillation first: what ARD is compared with is read before it."""
    students = {n: m for n, m in models.items() if not words.is_teacher(m) and m.get("target", "x0") == target}
    return dict(sorted(students.items(), key=lambda item: not words.is_step_distillation(item[1])))


def _colours(models: Mapping[str, Mapping]) -> dict[str, str]:
    """A colour a model: the same for step distillation, and for the first ARD student, whatever the target."""
    colours = {name: "teacher" for name, model in models.items() if words.is_teacher(model)}
    for target in words.TARGETS:
        first = dict(zip(words.pair(models, target), ("step", "ard"), strict=True))
        rest = 0
        for name in _students(models, target):
            colours[name] = first.get(name) or f"other{rest % 3 + 1}"
            rest += name not in first
    return colours


# --- sections ---------------------------------------------------------------------------------------------------------


def _headline(title: str, results: Mapping, models: Mapping[str, Mapping]) -> str:
    lead, detail = words.headline(results)
    said = [f"<header>\n<h1>{escape(title)}</h1>", pieces.paragraph(lead, "lead"), _tiles(results, models)]
    if models:
        said.append(pieces.paragraph(f"{detail} {_how_measured(results)}".strip()))
    return "\n".join([*said, pieces.paragraph(words.PAPER, "note"), "</header>"])


def _how_measured(results: Mapping) -> str:
    measured = "Measured here, on this data, in one run"
    if results.get("samples") is not None and results.get("real_images") is not None:
        samples, real = number(results["samples"], ",.0f"), number(results["real_images"], ",.0f")
        measured += f": FD between {samples} samples of each model and {real} real images"
    if results.get("features"):
        measured += f", in {str(results['features']).rstrip('.')}"
    return (
        f"{measured}. Degradation is a student’s FD less the teacher’s; the ratio divides two such differences, so "
        "read it together with them."
    )


def _tiles(results: Mapping, models: Mapping[str, Mapping]) -> str:
    """The few numbers that a reader came for."""
    tiles = []
    ratio = results.get("degradation_ratio")
    step, ard = words.pair(models, "x0")
    both = [name for name in (step, ard) if name is not None]
    risen = [words.degradation(models, name) for name in both]
    if len(both) == 2 and words.finite(ratio) and all(words.finite(value) and value > 0 for value in risen):
        tiles.append((f"{number(ratio, ',.1f')}×", "degradation, step distillation over ARD", "ink"))
    teacher = words.teacher_of(models)
    if teacher.get("fd") is not None:
        calls = teacher.get("network_calls")
        note = "FD of the teacher" + (f", {number(calls, ',.0f')} network calls" if calls is not None else "")
        tiles.append((number(teacher["fd"]), note, "teacher"))
    for name, colour in ((step, "step"), (ard, "ard")):
        if name is not None and models[name].get("fd") is not None:
            calls = models[name].get("network_calls")
            note = f"FD of {'step distillation' if colour == 'step' else 'ARD'}"
            note += f", {number(calls, ',.0f')} network calls" if calls is not None else ""
            tiles.append((number(models[name]["fd"]), note, colour))
    return pieces.tiles(tiles)


def _pictures(models: Mapping[str, Mapping], pictures: Mapping[str, np.ndarray]) -> str:
    drawn = [name for name in pictures if name not in ("label", "noise", "teacher", "teacher_xt")]
    if not drawn and "teacher" not in pictures:
        return pieces.paragraph(
            "There are no pictures in these results: a latent-space model needs a decoder before it can be shown.",
            "absent",
        )
    models = {name: models.get(name, {}) for name in ("teacher", *models, *drawn)} | {
        "teacher": {"kind": "teacher", **models.get("teacher", {})}
    }
    body = []
    for target, word in words.TARGETS.items():
        names = [name for name in _students(models, target) if name in pictures]
        if not names and not (target == "x0" and not drawn):
            continue
        body.append(pieces.final_images(f"Final images, {word}", models, pictures, names))
        body.append(_progressions(models, pictures, names, target))
    return "\n".join(body)


def _progressions(
    models: Mapping[str, Mapping], pictures: Mapping[str, np.ndarray], names: Sequence[str], target: str
) -> str:
    """For the first few samples: the noise and then every step, a row a model."""
    titles = words.titles(models)
    shown = {titles[name]: np.asarray(pictures[name]) for name in names}
    taught = _taught(pictures, target)
    rows = ({titles["teacher"]: taught} if taught is not None else {}) | shown
    noise = pictures.get("noise")
    steps = max(points.shape[1] for points in rows.values())
    count = min(4 if target == "x0" else 2, *(len(points) for points in rows.values()))
    blocks = [_progression(rows, noise, steps, sample) for sample in range(count)]
    said = {
        "x0": "Each step is a prediction of the clean image, the teacher’s or the student’s own.",
        "xt": "Each step is a noisy point, less noisy every time; the last one is the image.",
    }[target]
    return (
        f"<figure>\n<figcaption><b>Step by step, {escape(words.TARGETS[target])}.</b> {escape(said)} "
        "Students run on their own predictions.</figcaption>\n"
        f'<div class="steps">{"".join(blocks)}</div>\n</figure>'
    )


def _taught(pictures: Mapping[str, np.ndarray], target: str) -> np.ndarray | None:
    """The teacher's points (n, S, H, W, C) of this kind; of both kinds the last one is the image."""
    if target == "xt" and "teacher_xt" in pictures:
        return np.asarray(pictures["teacher_xt"])
    points = pictures.get("teacher")
    if points is None:
        return None
    return np.asarray(points) if target == "x0" else np.asarray(points)[:, -1:]


def _progression(rows: Mapping[str, np.ndarray], noise: np.ndarray | None, steps: int, sample: int) -> str:
    heads = ["", *(["noise"] if noise is not None else []), *(f"step {step}" for step in range(1, steps + 1))]
    cells = [f'<span class="class">{escape(head)}</span>' for head in heads]
    for title, points in rows.items():
        cells.append(pieces.row_name(words.short(title)))
        if noise is not None:
            cells.append(pieces.picture(np.asarray(noise)[sample], f"noise {sample + 1}"))
        own = points.shape[1]
        # Fewer steps spread over the same trajectory: step s of S stands where the trajectory has got to.
        places = {round((step + 1) * steps / own): step for step in range(own)}
        for place in range(1, steps + 1):
            step = places.get(place)
            alt = "" if step is None else f"{title}, sample {sample + 1}, step {step + 1} of {own}"
            cells.append("<span></span>" if step is None else pieces.picture(points[sample, step], alt))
    return f'<div class="progression" style="--n:{len(heads) - 1}">{"".join(cells)}</div>'


def _measurements(results: Mapping, models: Mapping[str, Mapping]) -> str:
    if not models:
        return pieces.paragraph("No model was measured.", "absent")
    titles = words.titles(models)
    head = [
        "Model",
        "FD\N{NO-BREAK SPACE}↓",
        "Degradation\N{NO-BREAK SPACE}↓",
        "Precision\N{NO-BREAK SPACE}↑",
        "Recall\N{NO-BREAK SPACE}↑",
        "PSNR to teacher, dB\N{NO-BREAK SPACE}↑",
    ]
    head += ["Network calls", "GMAC / image", "ms / image", "Parameters"]
    rows = []
    teachers = {name: model for name, model in models.items() if words.is_teacher(model)}
    for name, model in (teachers | _students(models, "x0") | _students(models, "xt")).items():
        seconds = model.get("seconds_per_image")
        rows.append(
            [
                titles[name],
                number(model.get("fd")),
                words.ABSENT if words.is_teacher(model) else number(words.degradation(models, name)),
                number(model.get("precision"), ".3f"),
                number(model.get("recall"), ".3f"),
                number(model.get("psnr"), ".1f"),
                number(model.get("network_calls"), ",.0f"),
                significant(model.get("gmac_per_image")),
                significant(seconds * 1000 if words.finite(seconds) else seconds),
                number(model.get("parameters"), ",.0f"),
            ]
        )
    note = (
        "↓ lower is better, ↑ higher is better. FD: Fréchet distance to the real images; PSNR: to the teacher’s image "
        "from the same noise. The teacher’s network calls count guidance, which a student has learned and no longer "
        "pays for."
    )
    if results.get("features"):
        note += f" Features: {str(results['features']).rstrip('.')}."
    return pieces.table("Every model of this run", head, rows) + "\n" + pieces.paragraph(note, "note")


def _points(results: Mapping, models: Mapping[str, Mapping]) -> str:
    body = [pieces.paragraph(words.POINTS)]
    ratios = results.get("degradation_ratios") or {}
    rows = []
    for target, word in words.TARGETS.items():
        step, ard = words.pair(models, target)
        if step is None and ard is None:
            body.append(pieces.paragraph(f"These results hold no student with {word}.", "absent"))
            continue
        by_step, by_ard = (None if name is None else words.degradation(models, name) for name in (step, ard))
        rows.append([_capital(word), *_degradations(by_step, by_ard, ratios.get(target))])
    if rows:
        head = ["Points", "Step distillation", "ARD", "Ratio"]
        body.append(pieces.table("Degradation (FD less the teacher’s) by kind of point, as measured here", head, rows))
    return "\n".join(body)


def _degradations(by_step: float | None, by_ard: float | None, ratio: float | None) -> list[str]:
    """Cells; a ratio is only shown of two differences that are both above zero, else it means nothing."""
    meant = all(words.finite(value) and value > 0 for value in (by_step, by_ard))
    none = "none" if by_step is not None and by_ard is not None else None
    return [number(by_step, "+,.2f"), number(by_ard, "+,.2f"), number(ratio, ",.1f") if meant else number(none)]


def _psnr(models: Mapping[str, Mapping]) -> str:
    titles, colours = words.titles(models), _colours(models)
    charts = []
    for target, word in words.TARGETS.items():
        series = [
            _by_step(words.short(titles[name]), colours[name], model["psnr_per_step"])
            for name, model in _students(models, target).items()
            if model.get("psnr_per_step")
        ]
        charts.append(
            pieces.chart(f"psnr-{target}", _capital(word), series, "step", "PSNR to the teacher, dB", markers=True)
        )
    said = (
        "PSNR of each prediction to the teacher’s point of the same step, on the student’s own rollout; higher is "
        "better. Each kind of point has its own scale: compare lines within a plot."
    )
    absent = "PSNR by step was not measured, so there is no plot of it."
    return (pieces.paragraph(said) + "\n" if any(charts) else "") + pieces.charts(charts, absent)


def _by_step(label: str, colour: str, values: Sequence[float], dashed: bool = False) -> Series:
    y = [np.nan if value is None else float(value) for value in values]
    return Series(label, colour, range(1, len(y) + 1), y, dashed)


def _exposure(models: Mapping[str, Mapping]) -> str:
    titles, colours = words.titles(models), _colours(models)
    charts = []
    for target, word in words.TARGETS.items():
        series = []
        for name, model in _students(models, target).items():
            title = words.short(titles[name])
            if model.get("rollout_mse"):
                series.append(_by_step(f"{title}, rollout", colours[name], model["rollout_mse"]))
            if model.get("forced_mse"):
                series.append(_by_step(f"{title}, forced", colours[name], model["forced_mse"], dashed=True))
        charts.append(
            pieces.chart(
                f"exposure-{target}", _capital(word), series, "step", "mean squared error", log=True, markers=True
            )
        )
    said = (
        "Error of each step when the student is fed the teacher’s points, as in training (forced, dashed), and when it "
        "is fed its own predictions, as in use (rollout, solid). The gap between the two is the exposure bias; at step "
        "1 both see only the noise."
    )
    return (pieces.paragraph(said) + "\n" if any(charts) else "") + pieces.charts(
        charts, "Errors by step were not measured, so there is no plot."
    )


def _given(models: Mapping[str, Mapping], prefix: str = "all") -> str:
    """Charts of error accumulation; `prefix` tells their ids apart from those of others on the page."""
    titles, colours = words.titles(models), _colours(models)
    charts = []
    for target, word in words.TARGETS.items():
        series = []
        for name, model in _students(models, target).items():
            if model.get("given_psnr"):
                line = _by_step(words.short(titles[name]), colours[name], model["given_psnr"])
                series.append(line._replace(x=range(len(line.y))))
        charts.append(
            pieces.chart(
                f"{prefix}-given-{target}",
                _capital(word),
                series,
                "first points that are the teacher’s",
                "PSNR of the image, dB",
                markers=True,
            )
        )
    said = (
        "PSNR of the final image to the teacher’s when the first k points are the teacher’s and the student makes the "
        "rest; at 0 it is the student alone, at the right end only the last step is its own. A steep line is a student "
        "whose early errors reach the image."
    )
    absent = "No student was run from the teacher’s first points, so there is no plot."
    return (pieces.paragraph(said) + "\n" if any(charts) else "") + pieces.charts(charts, absent)


def _attention(models: Mapping[str, Mapping], prefix: str = "all") -> str:
    """Maps of attention; `prefix` as in `_given`."""
    titles = words.titles(models)
    maps = []
    for name, model in models.items():
        if model.get("attention_mass"):
            svg = figures.block_maps(f"{prefix}-attention-{len(maps)}", np.asarray(model["attention_mass"], float))
            maps.append(f"<figure>\n<figcaption><b>{escape(titles[name])}</b></figcaption>\n{svg}\n</figure>")
    said = (
        "Where the tokens of each block look, in percent of their attention, in every layer that sees the history: a "
        "row is the block that looks, a column the block that is looked at. Means over tokens, heads and trajectories, "
        "on the student’s own points."
    )
    absent = "These results hold no student whose attention to the history was measured."
    return (pieces.paragraph(said) + "\n" if maps else "") + pieces.charts(maps, absent)


def _edits(models: Mapping[str, Mapping], edits: Mapping[str, np.ndarray]) -> str:
    names = [name for name in edits if name not in ("source", "label")]
    if not names or "source" not in edits:
        return pieces.paragraph("These results hold no edited images.", "absent")
    titles = words.titles({name: models.get(name, {}) for name in (*models, *names)})
    sources = figures.check_images(edits["source"])
    count = min(8, len(sources))
    grids = []
    for name in names:
        images = np.asarray(edits[name])
        steps = images.shape[1]
        heads = ["", "source", *(f"after step {step}" for step in range(1, steps)), "no source"]
        cells = [f'<span class="class">{escape(head)}</span>' for head in heads]
        for row in range(count):
            cells.append(pieces.row_name(f"into {edits['label'][row]}") if "label" in edits else "<span></span>")
            cells.append(pieces.picture(sources[row], f"source {row + 1}"))
            cells += [
                pieces.picture(images[row, step % steps], f"{titles[name]}, edit {row + 1}, {heads[step + 1]}")
                for step in range(1, steps + 1)
            ]
        grid = f'<div class="progression" style="--n:{len(heads) - 1}">{"".join(cells)}</div>'
        grids.append(f"<figure>\n<figcaption><b>{escape(titles[name])}</b></figcaption>\n{grid}\n</figure>")
    said = (
        "The source takes the place of the student’s prediction after a step, and the student goes on with another "
        "class, from another noise. The later the step, the more of the source should stay; without a source the same "
        "noise and class give the last column. The sources are images of the teacher."
    )
    return f'{pieces.paragraph(said)}\n<div class="steps">{"".join(grids)}</div>'


def _training(models: Mapping[str, Mapping], curves: Mapping[str, Sequence[Mapping]]) -> str:
    titles, colours = words.titles(models), _colours(models)
    groups = {"teacher": ("Teacher", [n for n, m in models.items() if words.is_teacher(m)])}
    groups |= {t: (f"Students, {w}", list(_students(models, t))) for t, w in words.TARGETS.items()}
    known = {name for _, names in groups.values() for name in names}
    groups["rest"] = ("Other runs", [name for name in curves if name not in known])
    charts = []
    for group, (caption, names) in groups.items():
        series = [
            Series(titles.get(name, name), colours.get(name, f"other{i % 3 + 1}"), *_thinned(curves[name]))
            for i, name in enumerate(names)
            if curves.get(name)
        ]
        charts.append(pieces.chart(f"loss-{group}", caption, series, "training step", "loss", log=True))
    body = pieces.charts(charts, "There are no loss curves in these results.")
    rates = {name: _median(rows, "samples_per_s") for name, rows in curves.items()}
    rates = [f"{titles.get(name, name)} {significant(rate)}" for name, rate in rates.items() if rate is not None]
    return body + (
        "\n" + pieces.paragraph(f"Median throughput in samples a second: {'; '.join(rates)}.", "note") if rates else ""
    )


def _thinned(rows: Sequence[Mapping]) -> tuple[list[float], list[float]]:
    """Steps and losses of the rows that have both finite, as means over equal runs of them where there are many."""
    points = [
        (row["step"], row["loss"]) for row in rows if words.finite(row.get("step")) and words.finite(row.get("loss"))
    ]
    runs = np.array_split(np.asarray(points, float).reshape(-1, 2), min(len(points), CURVE_POINTS) or 1)
    means = [run.mean(axis=0) for run in runs if len(run)]
    return [float(step) for step, _ in means], [float(loss) for _, loss in means]


def _median(rows: Sequence[Mapping], key: str) -> float | None:
    values = [row[key] for row in rows if words.finite(row.get(key))]
    return float(np.median(values)) if values else None


def _time(seconds: Mapping[str, Any]) -> str:
    if not seconds:
        return pieces.paragraph("The stages’ times were not recorded.", "absent")
    finite = {stage: value for stage, value in seconds.items() if words.finite(value)}
    longest = max(finite.values(), default=0)
    rows = "".join(
        f'<tr><th scope="row">{escape(str(stage))}</th>'
        f'<td class="bar"><i style="width:{_share(value, longest):.1f}%"></i></td>'
        f"<td>{escape(words.duration(value))}</td></tr>\n"
        for stage, value in seconds.items()
    )
    total = f'<tr class="total"><th scope="row">total</th><td></td><td>{words.duration(sum(finite.values()))}</td></tr>'
    return f'<table class="times"><caption>Wall-clock time by stage</caption><tbody>\n{rows}{total}</tbody></table>'


def _share(value: Any, longest: float) -> float:
    return 100 * value / longest if words.finite(value) and longest > 0 else 0.0


def _made(results: Mapping) -> str:
    if results.get("config") is None:
        return pieces.paragraph("The config was not handed over with these results.", "absent")
    return pieces.folded("Config, as it was resolved", results["config"])
