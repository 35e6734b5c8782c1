"""What `compare` compares: an entry for each method and each S, with a config of its own derived from the one given.

`config.compare.methods` says what a method changes; who trains, for how long and from what follows here, so that all
methods have the same teacher, trajectories, noises, labels and training FLOPs.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections

from ard_jax.checks import is_folder_name, validate
from ard_jax.config import OF_STUDENTS, flatten, method_defaults
from ard_jax.errors import UserError
from ard_jax.runner import TEACHER, Entry, Place, prefix_errors, with_settings

STAGES = ("distill", "finetune")  # that train students

# Settings that follow from the entry.
DERIVED = (
    "student.name", "student.points", "distill.start", "distill.steps", "finetune.name", "finetune.start"
)  # fmt: skip

# (config, S that it starts from or None) → training FLOPs; raises UserError where the method cannot be built
Flops = Callable[[ml_collections.ConfigDict, int | None], float]


def entries_of(config: ml_collections.ConfigDict, flops: Flops, workdir: pathlib.Path) -> dict[str, Entry]:
    """Every entry by its name, in an order in which they can be trained.

    Args:
        config: the config; the training of its own student is the budget of every method.
        flops: of a whole training, such as `methods.training_flops`.
        workdir: in which all of them lie, with one teacher and one store.

    Raises:
        UserError: a method is described wrongly or cannot be trained; the sentence names it.
    """
    methods = {name: _complete_method(name, method) for name, method in config.compare.methods.items()}
    if not methods:
        raise UserError("compare.methods is empty: name methods to compare, as configs/compare_digits.py does.")
    entries: dict[str, Entry] = {}
    for name in _order_by_start(methods):
        with prefix_errors(f"compare.methods.{name}"):
            for entry in _entries_of_method(name, methods[name], Place(str(workdir), config), entries, flops):
                entries[entry.name] = entry
    if not any(entry.shown for entry in entries.values()):
        raise UserError(f"no method has any of the steps {tuple(config.compare.steps)}: change compare.steps.")
    return entries


def _complete_method(name: str, method: Any) -> dict[str, Any]:
    """A method's description with the defaults filled in.

    Raises:
        UserError: it has an unknown key or a value of the wrong type, or its name cannot be one.
    """
    defaults = method_defaults()
    if not is_folder_name(name) or name == TEACHER:
        raise UserError(f"compare.methods has {name!r}, which cannot name a folder: use letters, digits, '-' and '_'.")
    if not isinstance(method, ml_collections.ConfigDict):
        raise UserError(f"compare.methods.{name} is {method!r}: give a dict of {', '.join(defaults)}.")
    given = method.to_dict()
    for key, value in given.items():
        if key not in defaults:
            raise UserError(f"compare.methods.{name} has {key!r}, which it cannot: it may have {', '.join(defaults)}.")
        if not isinstance(value, type(defaults[key])):
            expected = type(defaults[key]).__name__
            raise UserError(f"compare.methods.{name}.{key} is {value!r}, which is no {expected}: give one.")
    if given.get("stage", "distill") not in STAGES:
        raise UserError(f"compare.methods.{name}.stage is {given['stage']!r}: choose {' or '.join(STAGES)}.")
    return defaults | given


def _order_by_start(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of methods, each after the one that it starts from.

    Raises:
        UserError: a method starts from one that is not there, or from itself by a detour.
    """
    order: list[str] = []
    while waiting := [name for name in methods if name not in order]:
        ready = [name for name in waiting if methods[name]["start"] in ("", *order)]
        if not ready:
            name = waiting[0]
            others = ", ".join(other for other in methods if other not in waiting) or "none"
            raise UserError(
                f"compare.methods.{name} starts from {methods[name]['start']!r}, which is no method that can be "
                f"trained before it: choose one of those that can ({others}), or leave start out for the teacher."
            )
        order += ready
    return order


def _entries_of_method(
    name: str, method: Mapping[str, Any], home: Place, before: Mapping[str, Entry], flops: Flops
) -> Iterator[Entry]:
    """A method's entries; `before` holds those of the methods that came before it."""
    config = home.config
    rounds = _rounds_of(method, tuple(config.compare.steps))
    unknown = set(method["settings_at"]) - {str(len(points)) for points in config.compare.points}
    if unknown:
        raise UserError(f"settings_at has {min(unknown)!r}, a number of steps that compare.points has no points of.")
    budget = flops(config, None) / (len(rounds) if method["chain"] else 1)
    previous = None
    for steps in rounds:
        start = previous or _start_of(method, steps, before)
        derived = _derive_config(f"{name}_{steps}", method, steps, config, start)
        validate(derived)
        if method["stage"] == "distill":
            derived = _fit_budget(budget, derived, flops, start.steps if start else None)
            validate(derived)  # a warm-up may be longer than the training that the budget pays for
        entry = Entry(
            name=f"{name}_{steps}",
            stage=method["stage"],
            trained=home._replace(config=derived),
            home=home,
            captions=home,
            teacher=home,
            store=home,
            method=name,
            title=method["title"] or name,
            shown=steps in config.compare.steps,
        )
        yield entry
        previous = entry if method["chain"] else None


def _start_of(method: Mapping[str, Any], steps: int, before: Mapping[str, Entry]) -> Entry | None:
    """The entry that a method's training starts from; None for the teacher.

    Raises:
        UserError: the method that it starts from has no such S.
    """
    if not method["start"]:
        return None
    name = f"{method['start']}_{steps}"
    if name not in before:
        raise UserError(f"it starts from {method['start']!r}, which has no {steps} steps: leave {steps} out of steps.")
    return before[name]


def _rounds_of(method: Mapping[str, Any], compared: tuple[int, ...]) -> tuple[int, ...]:
    """S of a method's trainings in their order: those that are compared, and of a chain those on the way to them."""
    steps = method["steps"] or compared
    shown = [place for place, number in enumerate(steps) if number in compared]
    return steps[: max(shown, default=-1) + 1] if method["chain"] else tuple(steps[place] for place in shown)


def _derive_config(
    name: str, method: Mapping[str, Any], steps: int, config: ml_collections.ConfigDict, start: Entry | None
) -> ml_collections.ConfigDict:
    """The config of an entry, but for the length of its training; that of a fine-tune is its start's config, changed.

    Raises:
        UserError: the method changes what it may not or what there is not, S has no points, or a fine-tune no start.
    """
    stage = method["stage"]
    own: dict[str, Any] = {"student.name": name, f"{stage}.start": start.name if start else ""}
    if stage == "distill":
        own["student.points"] = _points_of(steps, config)
    elif start:
        own["finetune.name"], config = name, start.config
    else:
        raise UserError("a fine-tune starts from a student: name its method as start.")
    for changes in (method["settings"], method["settings_at"].get(str(steps), {})):
        _check_changes(changes)
        config = with_settings(config, changes)
    return with_settings(config, own)


def _check_changes(changes: Mapping[str, Any]) -> None:
    """Raises UserError if a method changes what all share, or what follows from its entry."""
    for key in flatten(changes):
        if key.split(".")[0] not in OF_STUDENTS:
            raise UserError(f"{key} is the same for all methods: a method may change {', '.join(OF_STUDENTS)}.")
        if key in DERIVED:
            raise UserError(f"{key} follows from the method's name, S and start and from the budget: leave it out.")


def _points_of(steps: int, config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """The points of S, out of `compare.points`."""
    known = {len(points): tuple(points) for points in config.compare.points}
    if steps not in known:
        raise UserError(f"it has {steps} steps, for which compare.points has no points: add some to it.")
    return known[steps]


def _fit_budget(
    budget: float, config: ml_collections.ConfigDict, flops: Flops, start: int | None
) -> ml_collections.ConfigDict:
    """A config whose training takes so many FLOPs.

    Raises:
        UserError: that is not enough for a single step.
    """
    one = flops(with_settings(config, {"distill.steps": 1}), start)
    steps = round(budget / one)
    if not steps:
        raise UserError(f"a step of it takes {one:.3g} FLOPs, but its budget is {budget:.3g}: lower its batch_size.")
    return with_settings(config, {"distill.steps": steps})
