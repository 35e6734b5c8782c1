"""What stands in tables of measurements beside a run's models: columns that were measured, noise, and the paper."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Columns that are left out where nothing was measured in them.
OPTIONAL: tuple[str, ...] = ("fd_interval", "degradation", "degradation_interval", "fid", "sfid", "inception_score")
OPTIONAL += ("recall_at_1", "recall_at_5")
INTERVAL = (
    "An interval is where 95 % of draws of as many samples of the same model have their distance, by bootstrap, with "
    "the real images held fixed."
)
PAIRED = (
    "For that of a degradation, samples of the student and of the teacher are drawn in pairs of the same noise and "
    "condition, so that it is narrower than either distance’s; one that holds 0 says that they cannot be told apart."
)
HALVES = (
    "Two halves of the same images, parted at random, are apart by chance alone, and as sets of half the size a little "
    "more than whole ones would be: differences between models that are smaller than that are noise."
)
LEAST = (
    "Real pictures of the captions that were sampled are what a model draws that makes no mistake: what distance is "
    "left comes of which captions were sampled, and how often."
)
# The paper's table of ImageNet 256×256 (arXiv 2504.11295), in the same features: title, steps, what was measured.
REPORTED = ("fid", "inception_score", "precision", "recall")
PAPER: tuple[tuple[str, int, dict[str, float]], ...] = tuple(
    (f"Paper: {title}", steps, dict(zip(REPORTED, found, strict=True)))
    for title, steps, *found in (
        ("teacher", 25, 2.89, 230.22, 0.797, 0.572),
        ("step distillation", 4, 10.25, 181.58, 0.704, 0.474),
        ("ARD", 4, 4.32, 209.03, 0.770, 0.574),
        ("ARD with a discriminator", 4, 1.84, 235.84, 0.797, 0.615),
    )
)


def columns(measured: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> tuple[str, ...]:
    """Those of a table's columns that it has, of what was measured of each model; FID stands in the place of FD."""
    there = {key for model in measured for key, value in model.items() if value is not None}
    left_out = {key for key in OPTIONAL if key not in there} | ({"fd"} if "fid" in there else set())
    return tuple(key for key in keys if key not in left_out)


def halves(real: Mapping[str, float], teacher: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Rows of what is noise, and of captions the least that there is: title, distances.

    Args:
        real: `Results.halves`.
        teacher: what was measured of the teacher.
    """
    own = {name: teacher.get(f"{name}_halves") for name in ("fd", "sfid")}
    rows = {
        "Two halves of the real images": real,
        "Two halves of the teacher’s samples": own,
        "Real pictures of the samples’ captions": {"fd": teacher.get("fd_least")},
    }
    return [(title, {**found, "fid": found["fd"]}) for title, found in rows.items() if found.get("fd") is not None]


def notes_on_halves(real: Mapping[str, float], teacher: Mapping[str, Any]) -> list[str]:
    """What is to be said of these rows."""
    of_halves = bool(real) or teacher.get("fd_halves") is not None
    return [HALVES] * of_halves + [LEAST] * (teacher.get("fd_least") is not None)


def is_of_paper(measured_with: Mapping[str, Any], config: Mapping[str, Any] | None) -> bool:
    """Whether a run measured ImageNet 256×256 as the paper did, so that its numbers may stand beside the run's."""
    data = (config or {}).get("data")
    if not measured_with.get("published_weights") or not isinstance(data, Mapping):
        return False
    if measured_with.get("dtype", "float32") != "float32":
        return False
    side = {"latent": 32, "pixel": 256}.get(data.get("space", ""))
    return data.get("num_classes") == 1000 and data.get("image_size") == side
