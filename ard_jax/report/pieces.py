"""Pieces of HTML that the pages are put together from; all text is escaped."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ard_jax.report import figures, words
from ard_jax.report.figures import Series
from ard_jax.report.style import CSS
from ard_jax.report.words import number

DIFFERENCE_GAIN = 3  # an error of 10 in 255 is plain in numbers and invisible on a screen


def document(title: str, sections: Sequence[str]) -> str:
    """A page of these sections."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # The policy makes "no request to anywhere" a thing that the browser enforces.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, name: str, body: str) -> str:
    return f'<section id="{name}">\n<h2>{escape(heading)}</h2>\n{body}\n</section>'


def paragraph(text: str, kind: str = "") -> str:
    return f"<p{_class(kind)}>{escape(text)}</p>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def folded(heading: str, values: Any) -> str:
    """Values as JSON, unfolded by a click."""
    text = json.dumps(values, indent=2, default=str)
    return f"<details><summary>{escape(heading)}</summary><pre>{escape(text)}</pre></details>"


def tiles(given: Sequence[tuple[str, str, str]]) -> str:
    """Large numbers, each a value, its words and its colour; nothing if there are none."""
    cells = "".join(
        f'<div style="border-color:var(--{colour})"><strong>{escape(value)}</strong><span>{escape(note)}</span></div>'
        for value, note, colour in given
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways on a narrow screen; the first cell of a row is its heading."""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>\n'
        for first, *rest in rows
    )
    label = f' tabindex="0" role="region" aria-label="{escape(caption)}"'
    return (
        f'<div class="scroll"{label}><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def picture(image: np.ndarray, alt: str) -> str:
    data = base64.b64encode(figures.cell_png(image)).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def chart(name: str, caption: str, series: Sequence[Series], xlabel: str, ylabel: str, **options: bool) -> str:
    """A chart with its legend, or nothing if no point of it is finite."""
    svg = figures.line_chart(name, series, xlabel, ylabel, **options)
    if svg is None:
        return ""
    legend = "".join(
        f'<li><span class="{"dashed" if line.dashed else "solid"}" style="border-color:var(--{line.colour})"></span>'
        f"{escape(line.label)}</li>"
        for line in series
    )
    return (
        f"<figure>\n<figcaption><b>{escape(caption)}</b></figcaption>\n"
        f'<ul class="legend">{legend}</ul>\n{svg}\n</figure>'
    )


def charts(drawn: Sequence[str], absent: str) -> str:
    """Charts side by side, or a sentence if there is none."""
    joined = "".join(drawn)
    return f'<div class="charts">{joined}</div>' if joined else paragraph(absent, "absent")


def final_images(
    heading: str,
    models: Mapping[str, Mapping],
    pictures: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    differences: bool = True,
) -> str:
    """Rows of finished pictures, a column a noise, and if asked under each student what parts it from the teacher."""
    titles = words.titles(models)
    teacher = pictures.get("teacher")
    rows = [name for name in ("teacher", *names) if name in pictures]
    finals = {name: figures.check_images(np.asarray(pictures[name])[:, -1]) for name in rows}
    count = min(figures.shown(images) for images in finals.values())
    cells = []
    labels = pictures.get("label")
    if labels is not None:
        cells.append('<span class="name note">class</span>')
        cells += [f'<span class="class">{escape(str(label))}</span>' for label in np.asarray(labels)[:count]]
        cells += ["<span></span>"] * (count - len(labels))
    for name in rows:
        cells.append(row_name(titles[name], _fd_note(models[name])))
        cells += [picture(image, f"{titles[name]}, sample {i + 1}") for i, image in enumerate(finals[name][:count])]
        if differences and name != "teacher" and teacher is not None:
            apart = _apart(finals[name][:count], finals["teacher"][:count])
            cells.append(f'<span class="name note">difference from the teacher, ×{DIFFERENCE_GAIN}</span>')
            cells += [picture(image, f"{titles[name]}, difference, sample {i + 1}") for i, image in enumerate(apart)]
    said = "Every column starts from one noise, the same for all rows; the samples are the first ones, not chosen."
    said += " Black difference: a perfect copy of the teacher." * differences
    return (
        f"<figure>\n<figcaption><b>{escape(heading)}.</b> {said}</figcaption>\n"
        f'<div class="scroll"><div class="finals" style="--n:{count}">{"".join(cells)}</div></div>\n</figure>'
    )


def _apart(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.minimum(np.abs(images.astype(int) - others) * DIFFERENCE_GAIN, 255).astype(np.uint8)


def row_name(title: str, note: str = "") -> str:
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<span class="name">{escape(title)}{small}</span>'


def _fd_note(model: Mapping) -> str:
    return f"FD {number(model['fd'])}" if model.get("fd") is not None else ""
