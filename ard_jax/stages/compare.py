"""Trains, samples and measures many methods of distillation, and puts them side by side.

`compare.methods` of the config names them; configs/compare_digits.py has all that there are here. Every method has the
same teacher, trajectories, noises, labels and training FLOPs. Runs the other stages in a folder a seed, WORKDIR/seed0/
and so on, each with a config derived from the one given, and writes `compare/compare.json`, `table.md` and
`index.html`. Started again, it makes only what is missing. With --quick, a look at all of it in WORKDIR/quick/: the
first seed alone, with the changes of `compare.quick`.
"""

import functools
import importlib
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from ard_jax import runner
from ard_jax.config import flatten, plain
from ard_jax.entries import STAGES, entries_of
from ard_jax.errors import UserError
from ard_jax.files import file_sha256
from ard_jax.methods import training_flops
from ard_jax.progress import Stopwatch
from ard_jax.report import build_comparison, markdown
from ard_jax.results import Measured, read_results
from ard_jax.runner import TEACHER, Entry, Job, Place, prefix_errors, with_settings
from ard_jax.workdir import require_done, teacher_folder, write_done

log = logging.getLogger("ard_jax")

MEASURED: tuple[str, ...] = (
    "fd",
    "fid",
    "fd_interval",
    "fd_halves",
    "fd_least",
    "sfid",
    "sfid_halves",
    "inception_score",
    "degradation",
    "degradation_interval",
    "recall_at_1",
    "recall_at_5",
)
MEASURED += ("precision", "recall", "psnr", "network_calls", "gmac_per_image", "seconds_per_image")
TRAINED = ("examples", "flops", "seconds")  # of done.json, "training_" before them in compare.json


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path, quick: bool) -> None:
    """Compares.

    Raises:
        UserError: a method is described wrongly, before anything is made; or what another stage raises.
    """
    watch = Stopwatch()
    if jax.process_count() > 1:
        raise UserError("compare runs on one host: start it on one alone, with as many devices as that has.")
    seeds = tuple(config.compare.seeds)
    if quick:
        workdir, seeds = workdir / "quick", seeds[:1]
        config = quick_config(config)
    homes = {seed: Place(str(workdir / f"seed{seed}"), with_settings(config, {"seed": seed})) for seed in seeds}
    entries = {seed: entries_of(home.config, training_flops, home.path) for seed, home in homes.items()}
    for every in entries.values():
        runner.run_missing(runner.jobs_of(every.values()), functools.partial(_run_stage, students=list(every)))
    comparison = _compare_models(config, entries[seeds[0]], homes, quick)
    title = f"{config.report.title}: methods of distillation compared"
    page = build_comparison(title, comparison, runner.pictures_of(homes[seeds[0]]))
    folder = workdir / "compare"
    files = runner.write_page(folder, "compare.json", comparison, markdown(comparison), page)
    write_done(folder, {file: file_sha256(folder / file) for file in files}, watch())


def quick_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of a quick run.

    Raises:
        UserError: `compare.quick` is empty, or changes what there is not.
    """
    changes = config.compare.quick.to_dict()
    if not flatten(changes):
        raise UserError("compare.quick is empty: say there what --quick makes smaller, or leave --quick out.")
    with prefix_errors("compare.quick"):
        return with_settings(config, changes)


def _run_stage(job: Job, students: Sequence[str]) -> None:
    """Runs a stage, which is imported when it is its turn, as the command line does.

    Args:
        job: the stage.
        students: names of all that are trained in its workdir, in their order.
    """
    workdir = job.place.path
    if job.stage in STAGES:
        number = students.index(job.models[0]) + 1
        log.info("%s: student %d of %d, %s.", workdir.name, number, len(students), *job.models)
    measured = [job.models] if job.stage == "evaluate" else []
    importlib.import_module(f"ard_jax.stages.{job.stage}").run(job.place.config, workdir, *measured)


# --- gathering --------------------------------------------------------------------------------------------------------


def _compare_models(
    config: ml_collections.ConfigDict, entries: Mapping[str, Entry], homes: Mapping[int, Place], quick: bool
) -> dict[str, Any]:
    """What compare.json holds: of every model the measurements by seed, their mean, the least and the greatest."""
    results = {seed: read_results(home.path) for seed, home in homes.items()}
    first = next(iter(results.values()))
    shown = {name: entry for name, entry in entries.items() if entry.shown}
    rows = []
    for name in (TEACHER, *shown):
        by_seed = {
            seed: _measurements(results[seed].models[name]) | _training_cost(entries, home, name)
            for seed, home in homes.items()
        }
        rows.append(_describe_model(name, shown.get(name), first.models[name]) | _summarise_seeds(by_seed))
    return {
        "quick": flatten(plain(config)["compare"]["quick"]) if quick else {},
        "seeds": list(homes),
        "features": [result.features for result in results.values()],
        "measured_with": [result.measured_with for result in results.values()],
        "halves": _over_seeds([result.halves for result in results.values()], np.mean),
        "labels": first.labels,
        "samples": first.samples,
        "real_images": first.real_images,
        "budget": training_flops(config),
        "rows": rows,
        "config": plain(config),
    }


def _describe_model(name: str, entry: Entry | None, model: Measured) -> dict[str, Any]:
    """What a row says of its model beside the measurements."""
    if entry is None:
        return {"name": name, "kind": "teacher", "method": name, "title": "Teacher", "steps": model.steps}
    settings = entry.config[entry.stage]
    return {
        "name": name,
        "kind": "student",
        "method": entry.method,
        "title": entry.title,
        "steps": entry.steps,
        "start": entry.start,
        "training_steps": settings.steps,
        "batch_size": settings.batch_size,
    }


def _measurements(model: Measured) -> dict[str, Any]:
    """Of results.json's; a teacher has no PSNR to itself."""
    return {key: getattr(model, key) for key in MEASURED}


def _training_cost(entries: Mapping[str, Entry], home: Place, name: str) -> dict[str, Any]:
    """What a model's training took, with that of the students that it started from."""
    if name == TEACHER:
        made = [require_done(teacher_folder(home.config, home.path), "teacher")]
    else:
        made = []
        while name:
            made.append(require_done(home.path / "distill" / name, "distill"))
            name = entries[name].start
    # weights that were converted say nothing of their training
    known = {key: [one.get(key) for one in made] for key in TRAINED}
    return {f"training_{key}": None if None in values else sum(values) for key, values in known.items()}


def _summarise_seeds(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Measurements by seed, and over the seeds; None where a seed has none."""
    found = list(by_seed.values())
    return {
        "by_seed": {str(seed): dict(values) for seed, values in by_seed.items()},
        "mean": _over_seeds(found, np.mean),
        "least": _over_seeds(found, np.min),
        "greatest": _over_seeds(found, np.max),
    }


def _over_seeds(found: Sequence[Mapping[str, Any]], function: Callable[..., Any]) -> dict[str, Any]:
    """What a function of NumPy makes of each measurement, an interval's ends and the kinds of captions apart.

    None where a seed has none.
    """
    columns = {key: [values.get(key) for values in found] for key in found[0]}
    return {
        key: None if None in values else jax.tree.map(lambda *each: float(function(each)), *values)
        for key, values in columns.items()
    }
