"""results.json: what `evaluate` writes of a run, and reports, cards, sweeps and comparisons read.

The keys of the file are the fields here, in their order, but for those that are None; a model stands under its name in
`models`. `report` writes the same with the models beside the other keys, and `seconds` last.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Self

from ard_jax.errors import UserError
from ard_jax.files import read_json


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model; None where a field was not measured, or has no meaning for it.

    Attributes:
        ema_sha256: hash of its weights.
        steps: S of a student, the solver's of the teacher.
        network_calls, parameters, gmac_per_image, seconds_per_image: what an image costs.
        fd, precision, recall: of its samples to the real images, in the features of `Results.features`.
        fd_interval: where 95 % of draws of its samples have their fd, by bootstrap.
        fd_halves: fd of two halves of its samples, which is what is noise.
        fd_least: fd of real images of its samples' captions, which a model has that draws every caption as it is.
        fid: the same as fd where the features are Inception's and the definitions ADM's.
        sfid, sfid_halves, inception_score: in these features alone.
        recall_at_1, recall_at_5: share of its samples whose caption is the first of all, or among the first five, by
            the judge: "trained", and of captions that are held out of training "held_out".
        kind: "teacher" or "student".
        objective, target: of a student's training: of `distill.objective`, and "x0" or "xt".
        psnr: of its images to the teacher's from the same noise, dB.
        mse_per_step, psnr_per_step: the same by step, (S,).
        mask, history_layers: of an ARD student, the layers that look across blocks.
        forced_mse, rollout_mse: by step, with the teacher's history and with its own, (S,).
        trained_mse: as forced_mse, of trajectories that it was trained on, (S,).
        times_seen: how often its training saw each trajectory.
        given_psnr: of the image when the first 0, 1, …, S−1 points are the teacher's, dB, (S,).
        attention_mass: (layer, query block, key block).
        degradation: Fréchet distance less the teacher's.
        degradation_interval: where 95 % of draws of its samples and the teacher's, in pairs, have it, by bootstrap.
        title: what a page calls it, if not as its other fields say.
    """

    ema_sha256: str | None = None
    steps: int | None = None
    network_calls: int | None = None
    parameters: int | None = None
    gmac_per_image: float | None = None
    seconds_per_image: float | None = None
    fd: float | None = None
    fd_interval: tuple[float, float] | None = None
    fd_halves: float | None = None
    fd_least: float | None = None
    fid: float | None = None
    sfid: float | None = None
    sfid_halves: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    recall_at_1: Mapping[str, float] | None = None
    recall_at_5: Mapping[str, float] | None = None
    kind: str | None = None
    objective: str | None = None
    target: str | None = None
    psnr: float | None = None
    mse_per_step: list[float] | None = None
    psnr_per_step: list[float] | None = None
    mask: str | None = None
    history_layers: int | None = None
    forced_mse: list[float] | None = None
    rollout_mse: list[float] | None = None
    trained_mse: list[float] | None = None
    times_seen: float | None = None
    given_psnr: list[float] | None = None
    attention_mass: list[list[list[float]]] | None = None
    degradation: float | None = None
    degradation_interval: tuple[float, float] | None = None
    title: str | None = None

    @property
    def is_teacher(self) -> bool:
        return self.kind == "teacher"

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Of what a file says of a model; a key that is no field is passed over."""
        return cls(**{field.name: found.get(field.name) for field in dataclasses.fields(cls)})

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Results:
    """A run.

    Attributes:
        features: in words, what Fréchet distance, precision and recall are measured in.
        real_images, samples, paired: how many real images, samples of each model that are held against them, and paired
            trajectories there are.
        labels: how the conditions of samples were drawn: "uniform"ly, "balanced", or "chosen" by number.
        models: by name.
        degradation_ratio: of the students with `main_target`, that of step distillation over that of ARD.
        degradation_ratios: the same by target.
        measured_with: what numbers in these features depend on: "features", the network's "sha256", and more.
        halves: Fréchet distances of two halves of the real images, by the field of `Measured` that they stand beside.
        judge: of captioned images, the judge's own `recall_at_1` and `recall_at_5` on "real" images, and on "augmented"
            ones, which says how far it can be trusted.
        config: plain, as it was resolved.
        seconds: by stage, of a report's alone.
    """

    features: str | None = None
    real_images: int | None = None
    samples: int | None = None
    labels: str | None = None
    paired: int | None = None
    models: Mapping[str, Measured] = dataclasses.field(default_factory=dict)
    degradation_ratio: float | None = None
    degradation_ratios: Mapping[str, float] = dataclasses.field(default_factory=dict)
    measured_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    halves: Mapping[str, float] = dataclasses.field(default_factory=dict)
    judge: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Of what a file says; one of an earlier version may lack keys."""
        names = [field.name for field in dataclasses.fields(cls)]
        given = {name: found[name] for name in names if found.get(name) is not None}
        models = {name: Measured.from_json(model) for name, model in given.pop("models", {}).items()}
        return cls(models=models, **given)

    def to_json(self) -> dict[str, Any]:
        """What the file says, where a ratio that there is not is null."""
        found = {key: value for key, value in vars(self).items() if value is not None or key == "degradation_ratio"}
        found["models"] = {name: model.to_json() for name, model in self.models.items()}
        return found if self.seconds else {key: value for key, value in found.items() if key != "seconds"}


def add_degradation(models: dict[str, Measured]) -> dict[str, Measured]:
    """Adds each student's Fréchet distance minus the teacher's, where the teacher has been sampled."""
    teacher = models["teacher"].fd if "teacher" in models else None

    def add(model: Measured) -> Measured:
        if model.is_teacher or model.fd is None or teacher is None:
            return model
        return dataclasses.replace(model, degradation=model.fd - teacher)

    return {name: add(model) for name, model in models.items()}


def degradation_ratios(models: dict[str, Measured]) -> dict[str, float]:
    """Degradation of step distillation over that of ARD, for each kind of target that both were trained on."""
    ratios = {}
    for target in ("x0", "xt"):
        step, ard = (models[name].degradation if name else None for name in pair(models, target))
        if step is not None and ard is not None and step > 0 and ard > 0:
            ratios[target] = step / ard
    return ratios


def pair(models: Mapping[str, Measured], target: str) -> tuple[str | None, str | None]:
    """Names of the step-distillation student and of the ARD student with this target, the first of each.

    Students of other numbers of steps are no pair: it is the first ARD student's that both have, where any step
    distillation has as many.
    """
    students = {
        name: model
        for name, model in models.items()
        if not model.is_teacher and objective_of(model) == "ard" and (model.target or "x0") == target
    }
    steps = [name for name, model in students.items() if is_step_distillation(model)]
    ours = [name for name in students if name not in steps]
    pairs = [(step, ard) for ard in ours for step in steps if students[step].steps == students[ard].steps]
    if pairs:
        return pairs[0]
    return (None, ours[0]) if ours else (next(iter(steps), None), None)


def is_step_distillation(model: Measured) -> bool:
    """A student without history: docs/METHOD.md section 1, mask M1 or no history layers."""
    return model.mask == "diagonal" or model.history_layers == 0


def objective_of(model: Measured) -> str:
    return model.objective or "ard"


def main_target(models: Mapping[str, Measured]) -> str:
    """The kind of point that a run is about: "x0", the paper's, or "xt" where all students of ARD have noisy ones."""
    ours = [model for model in models.values() if not model.is_teacher and objective_of(model) == "ard"]
    targets = {model.target or "x0" for model in ours}
    return "xt" if targets == {"xt"} else "x0"


def distance_format(value: float, sign: str = "") -> str:
    """How a Fréchet distance, or with the sign `+` a difference of two, is written; small networks' lie far below 1."""
    return f"{sign},.2f" if abs(value) >= 1 else f"{sign}.3f"


def shares(found: Mapping[str, float] | None) -> str:
    """A `Measured.recall_at_5` in percent, of captions that were trained on and of those held out; "" for none."""
    return (
        " / ".join(f"{100 * found[part]:.0f} %" for part in ("trained", "held_out") if part in found) if found else ""
    )


def read_results(workdir: pathlib.Path) -> Results:
    """What `evaluate` wrote in a workdir.

    Raises:
        UserError: it wrote nothing there, or the file cannot be read.
    """
    path = workdir / "evaluate" / "results.json"
    remedy = "run 'evaluate' again"
    if not path.exists():
        raise UserError(f"{path} is missing: {remedy}.")
    found = read_json(path, dict[str, Any], remedy)
    try:
        return Results.from_json(found)
    except (AttributeError, TypeError):
        raise UserError(f"{path} is damaged: {remedy}.") from None
