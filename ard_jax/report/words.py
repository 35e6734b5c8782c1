"""Numbers and findings in words: everything on the page that is said rather than drawn.

Plain text throughout; the templates escape it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeGuard

from ard_jax.results import (
    Measured,
    Results,
    distance_format,
    is_step_distillation,
    main_target,
    objective_of,
    pair,
    shares,
)

ABSENT = "–"
TARGETS = {"x0": "x0 points", "xt": "noisy points"}
NOISY = ", noisy points"
# What students of other objectives than "ard" are called; one that somebody has added is called by its own name.
RIVALS = {
    "progressive": "Progressive distillation",
    "consistency": "Consistency distillation",
    "distribution_matching": "Distribution matching",
    "trajectory_matching": "Trajectory matching",
    "mean_flow": "Mean flow",
}


def finite(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that can be compared and divided by."""
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def is_positive(value: Any) -> TypeGuard[float]:
    return finite(value) and value > 0


def number(value: Any, spec: str = ",.2f") -> str:
    """`value` in the format `spec`; a dash where it is missing, words where it is not finite."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return ABSENT if value is None else str(value)
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    return format(value, spec).replace("-", "\N{MINUS SIGN}")


def significant(value: Any) -> str:
    """About three significant digits and never an exponent that a reader has to decode."""
    if not finite(value):
        return number(value)
    size = abs(value)
    return number(value, ",.0f" if size >= 100 else ",.1f" if size >= 10 else ",.2f" if size >= 1 else ",.3g")


def distance(value: Any, sign: str = "") -> str:
    """A Fréchet distance, or with the sign `+` a difference of two; see `distance_format`."""
    return number(value, distance_format(value, sign)) if finite(value) else number(value)


def duration(seconds: Any) -> str:
    """Seconds as a person says them: `4.2 s`, `1 min 20 s`, `2 h 5 min`."""
    if not finite(seconds):
        return number(seconds)
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def span(ends: Any) -> str:
    """Two ends of an interval; a dash where there is none."""
    if ends is None:
        return ABSENT
    return between(*map(distance, ends))


def between(low: str, high: str) -> str:
    """From one written number to another."""
    return f"{low} to {high}" if low.startswith("−") else f"{low}–{high}"


# From this ratio of errors, on fresh noise to trajectories of the training, a page speaks of it; digits have up to 1.3.
BY_HEART = 1.5

# Key of a model's measurements → the heading of their column, and how one is written.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "fd": ("FD ↓", distance),
    "fid": ("FID ↓", distance),
    "fd_interval": ("95 % interval", span),
    "sfid": ("sFID ↓", number),
    "inception_score": ("IS ↑", partial(number, spec=",.1f")),
    "degradation": ("Degradation ↓", distance),
    "degradation_interval": ("its 95 % interval", span),
    "precision": ("Precision ↑", partial(number, spec=".3f")),
    "recall": ("Recall ↑", partial(number, spec=".3f")),
    "psnr": ("PSNR to teacher, dB ↑", partial(number, spec=".1f")),
    "recall_at_1": ("Caption first, trained / held out ↑", lambda found: shares(found) or ABSENT),
    "recall_at_5": ("Caption in first 5, trained / held out ↑", lambda found: shares(found) or ABSENT),
    "network_calls": ("Network calls", partial(number, spec=",.0f")),
    "gmac_per_image": ("GMAC / image", significant),
    "seconds_per_image": ("ms / image", lambda value: significant(value * 1000 if finite(value) else value)),
    "parameters": ("Parameters", partial(number, spec=",.0f")),
    "training_examples": ("Training examples", partial(number, spec=",.0f")),
    "training_flops": ("Training TFLOPs", lambda value: significant(value and value / 1e12)),
    "training_seconds": ("Training time", duration),
}


def headings(keys: Iterable[str]) -> list[str]:
    return [COLUMNS[key][0] for key in keys]


def cells(measured: Mapping, keys: Iterable[str]) -> list[str]:
    """What was measured of one model, as it is written into these columns."""
    return [COLUMNS[key][1](measured.get(key)) for key in keys]


def _usual_title(model: Measured) -> str:
    """What a model is called that does not say so itself."""
    if model.is_teacher:
        return "Teacher"
    objective = objective_of(model)
    if objective != "ard":
        return RIVALS.get(objective, objective)
    return "Step distillation" if is_step_distillation(model) else "ARD"


def titles(models: Mapping[str, Measured]) -> dict[str, str]:
    """What each model is called on the page; no two alike."""
    named = {}
    for name, model in models.items():
        title = str(model.title or _usual_title(model))
        if model.target == "xt" and "noisy" not in title.lower():
            title += NOISY
        named[name] = title
    shared = {title for title in named.values() if list(named.values()).count(title) > 1}
    return {name: f"{title} ({name})" if title in shared else title for name, title in named.items()}


def short_title(title: str) -> str:
    """A title where the heading above it already says which kind of point is meant."""
    return title.removesuffix(NOISY)


def teacher_of(models: Mapping[str, Measured]) -> Measured:
    return next((model for model in models.values() if model.is_teacher), Measured(kind="teacher"))


def degradation(models: Mapping[str, Measured], name: str) -> float | None:
    """FD of the student less FD of the teacher; None where either was not measured."""
    student, teacher = models[name], teacher_of(models)
    if student.degradation is not None:
        return student.degradation
    if student.fd is None or teacher.fd is None:
        return None
    return student.fd - teacher.fd


def headline(results: Results) -> tuple[str, str]:
    """What the degradation ratio says, claiming no more than was measured: a sentence, and the numbers behind it."""
    models = results.models
    target = main_target(models)
    step, ard = pair(models, target)
    if step is None or ard is None:
        missing = " and no ".join(word for word, name in (("step distillation", step), ("ARD", ard)) if name is None)
        return f"These results hold no {missing} with {TARGETS[target]}, so the two cannot be compared here.", ""
    by_step, by_ard = degradation(models, step), degradation(models, ard)
    if not (finite(by_step) and finite(by_ard)):
        reason = f"The degradation of step distillation is {_measured(by_step)}, that of ARD {_measured(by_ard)}."
        return "The two students cannot be compared here.", reason
    detail = (
        f"In Fréchet distance (FD), step distillation stands at {distance(by_step, '+')} against the teacher’s "
        f"{_measured(teacher_of(models).fd)}, ARD at {distance(by_ard, '+')}."
    )
    ratio = results.degradation_ratio
    if min(by_step, by_ard) <= 0:
        level = [word for word, value in (("step distillation", by_step), ("ARD", by_ard)) if value <= 0]
        return f"No degradation ratio can be given: {_are(level)} no worse than the teacher by this measure.", detail
    if level := [word for word, name in (("step distillation", step), ("ARD", ard)) if is_level(models[name])]:
        unsure = f"{' and '.join(level)} cannot be told from the teacher by these samples"
        return f"No degradation ratio can be given: {unsure}.", detail
    if not finite(ratio):
        return "No degradation ratio was computed for these results.", detail
    return _compare(ratio, models[ard].steps, target), detail


def learnt_by_heart(models: Mapping[str, Measured]) -> list[str]:
    """Says which students err far more on fresh noise than on trajectories that they were trained on."""
    named, said = titles(models), []
    for name, model in models.items():
        if not (model.forced_mse and model.trained_mse):
            continue
        by_step = enumerate(zip(model.forced_mse, model.trained_mse, strict=True), start=1)
        known = [
            (fresh / trained, step)
            for step, (fresh, trained) in by_step
            if finite(fresh) and finite(trained) and trained > 0
        ]
        ratio, step = max(known, default=(0.0, 0))
        if ratio < BY_HEART:
            continue
        often = f", each of which it saw {number(model.times_seen, '.1f')} times" if model.times_seen else ""
        said.append(
            f"{named[name]} errs {number(ratio, '.1f')} times as much on fresh noise, at step {step}, as on "
            f"trajectories that it was trained on{often}: more trajectories (trajectories.count) would help it more "
            f"than more training."
        )
    return said


def is_level(model: Measured) -> bool:
    """Whether a student's distance may as well be its teacher's: the interval of its degradation holds 0."""
    return model.degradation_interval is not None and model.degradation_interval[0] <= 0


def has_ratio(models: Mapping[str, Measured], names: Iterable[str | None]) -> bool:
    """Whether all these students are farther from the data than their teacher for certain, which a ratio wants."""
    return all(
        name is not None and is_positive(degradation(models, name)) and not is_level(models[name]) for name in names
    )


def _are(level: list[str]) -> str:
    return f"{' and '.join(level)} {'is' if len(level) == 1 else 'are'}"


def _measured(value: float | None) -> str:
    return "not measured" if value is None else distance(value)


def _compare(ratio: float, steps: int | None, target: str) -> str:
    start = f"Distilled to {steps} step{'s' * (steps != 1)}" if steps else "Distilled"
    start += f" with {TARGETS[target]}" * (target != "x0")
    if 0.95 <= ratio <= 1.05:
        return f"{start}, ARD and step distillation fall about equally far behind their teacher."
    if ratio > 1:
        return f"{start}, step distillation falls {number(ratio, ',.1f')} times as far behind its teacher as ARD does."
    return f"{start}, ARD falls {number(1 / ratio, ',.1f')} times as far behind its teacher as step distillation does."
