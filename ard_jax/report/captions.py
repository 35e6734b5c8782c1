"""What a report shows of captions: pictures under them, and how often a judge finds the right one."""

from collections.abc import Mapping

import numpy as np

from ard_jax.picture_grid import check_images
from ard_jax.report import pieces, words
from ard_jax.report.pieces import FinalImages, Row
from ard_jax.results import Measured, Results


def judged(results: Results) -> list[list[str]]:
    """Cells of the judge's own rows: how often it finds the captions of real images."""
    found = results.judge or {}
    names = {"real": "Real images", "augmented": "Real images, shifted, blurred and noised"}
    keys = ("recall_at_1", "recall_at_5")
    return [[name, *words.cells(found[key], keys)] for key, name in names.items() if key in found]


def gallery(models: Mapping[str, Measured], drawn: Mapping[str, np.ndarray]) -> dict[str, FinalImages]:
    """Samples under their captions, those that were trained on and those held out apart; a row a model."""
    if not drawn:
        return {}
    names = [name for name in drawn if name not in ("label", "held_out", "real")]
    titles = words.titles(models)
    titles = ({"real": "The data’s own"} if "real" in drawn else {}) | {name: titles.get(name, name) for name in names}
    shown = {}
    for heading, rows in {"trained on": ~drawn["held_out"], "held out of training": drawn["held_out"]}.items():
        labels = [str(label) for label in drawn["label"][rows]]
        if labels:
            made = [_row(title, models.get(name), drawn[name][rows], labels) for name, title in titles.items()]
            shown[f"Captions {heading}"] = FinalImages(len(labels), labels, made, differences=False)
    return shown


def _row(title: str, model: Measured | None, images: np.ndarray, labels: list[str]) -> Row:
    pictures = zip(check_images(images), labels, strict=True)
    return Row(
        title, model.fd if model else None, [pieces.picture(image, f"{title}: {label}") for image, label in pictures]
    )
