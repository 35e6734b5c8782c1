"""Trains, samples and measures many methods of distillation, and puts them side by side.

`compare.methods` of the config names them; configs/compare_digits.py has all that there are here. Every method has the
same teacher, trajectories, noises, labels and training FLOPs. Runs the other stages in a folder a seed, WORKDIR/seed0/
and so on, each with a config derived from the one given, and writes `compare/compare.json`, `table.md` and
`index.html`. Started again, it makes only what is missing. With --quick, a look at all of it in WORKDIR/quick/: the
first seed alone, with the changes of `compare.quick`.
"""

import importlib
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from ard_jax.completion import is_complete
from ard_jax.config import flatten, plain
from ard_jax.entries import TEACHER, Entry, about, changed, entries_of
from ard_jax.errors import UserError
from ard_jax.files import atomic_write, file_sha256, read_json, read_npz, write_json
from ard_jax.methods import training_flops
from ard_jax.report import build_comparison, markdown
from ard_jax.workdir import Stopwatch, finished, teacher_folder, write_done

log = logging.getLogger("ard_jax")

MEASURED = ("fd", "precision", "recall", "psnr", "network_calls", "gmac_per_image", "seconds_per_image")
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
    configs = {seed: changed(config, {"seed": seed}) for seed in seeds}
    entries = {seed: entries_of(config, training_flops) for seed, config in configs.items()}
    for seed in seeds:
        make(configs[seed], entries[seed], workdir / f"seed{seed}")
    folders = {seed: workdir / f"seed{seed}" for seed in seeds}
    comparison = compared(config, entries[seeds[0]], folders, quick)
    pictures = read_npz(folders[seeds[0]] / "evaluate" / "pictures.npz")
    write(workdir / "compare", config, comparison, pictures, watch)


def quick_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of a quick run.

    Raises:
        UserError: `compare.quick` is empty, or changes what there is not.
    """
    changes = config.compare.quick.to_dict()
    if not flatten(changes):
        raise UserError("compare.quick is empty: say there what --quick makes smaller, or leave --quick out.")
    with about("compare.quick"):
        return changed(config, changes)


# --- making what is missing -------------------------------------------------------------------------------------------


def make(config: ml_collections.ConfigDict, entries: Mapping[str, Entry], workdir: pathlib.Path) -> None:
    """Everything of one seed that is not there yet, ending with its measurements."""
    if not config.teacher.dir and not is_complete("teacher", config, workdir):
        run_stage("teacher", config, workdir)
    if not config.trajectories.dir and not is_complete("trajectories", config, workdir):
        run_stage("trajectories", config, workdir)
    for place, entry in enumerate(entries.values(), start=1):
        if not is_complete(entry.stage, entry.config, workdir):
            log.info("%s: student %d of %d, %s.", workdir.name, place, len(entries), entry.name)
            run_stage(entry.stage, entry.config, workdir)
    models = (TEACHER, *(entry.name for entry in entries.values() if entry.shown))
    for name in models:
        alone = changed(config, {"sample.models": (name,)})
        if not is_complete("sample", alone, workdir):
            run_stage("sample", alone, workdir)
    if not is_complete("evaluate", config, workdir, models):
        run_stage("evaluate", config, workdir, models)


def run_stage(stage: str, *arguments: Any) -> None:
    """Runs a stage, which is imported when it is its turn, as the command line does."""
    importlib.import_module(f"ard_jax.stages.{stage}").run(*arguments)


# --- gathering --------------------------------------------------------------------------------------------------------


def compared(
    config: ml_collections.ConfigDict, entries: Mapping[str, Entry], folders: Mapping[int, pathlib.Path], quick: bool
) -> dict[str, Any]:
    """What compare.json holds: of every model the measurements by seed, their mean, the least and the greatest."""
    results = {seed: read_json(folder / "evaluate" / "results.json") for seed, folder in folders.items()}
    first = next(iter(results.values()))
    shown = {name: entry for name, entry in entries.items() if entry.shown}
    rows = []
    for name in (TEACHER, *shown):
        by_seed = {
            seed: measurements(results[seed]["models"][name]) | training(config, entries, folder, name)
            for seed, folder in folders.items()
        }
        rows.append(described(name, shown.get(name), first["models"][name]) | summarised(by_seed))
    return {
        "quick": flatten(plain(config)["compare"]["quick"]) if quick else {},
        "seeds": list(folders),
        "features": [result["features"] for result in results.values()],
        "samples": first["samples"],
        "real_images": first["real_images"],
        "budget": training_flops(config),
        "rows": rows,
        "config": plain(config),
    }


def described(name: str, entry: Entry | None, model: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of its model beside the measurements."""
    if entry is None:
        return {"name": name, "kind": "teacher", "method": name, "title": "Teacher", "steps": model["steps"]}
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


def measurements(model: Mapping[str, Any]) -> dict[str, Any]:
    """Of results.json's; a teacher has no PSNR to itself."""
    return {key: model.get(key) for key in MEASURED}


def training(
    config: ml_collections.ConfigDict, entries: Mapping[str, Entry], workdir: pathlib.Path, name: str
) -> dict[str, Any]:
    """What a model's training took, with that of the students that it started from."""
    if name == TEACHER:
        made = [finished(teacher_folder(config, workdir), "teacher")]
    else:
        made = []
        while name:
            made.append(finished(workdir / "distill" / name, "distill"))
            name = entries[name].start
    # weights that were converted say nothing of their training
    known = {key: [one.get(key) for one in made] for key in TRAINED}
    return {f"training_{key}": None if None in values else sum(values) for key, values in known.items()}


def summarised(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Measurements by seed, and over the seeds; None where a seed has none."""
    keys = next(iter(by_seed.values()))
    columns = {key: [values[key] for values in by_seed.values()] for key in keys}

    def over(function):
        return {key: None if None in values else function(values) for key, values in columns.items()}

    return {
        "by_seed": {str(seed): dict(values) for seed, values in by_seed.items()},
        "mean": over(lambda values: float(np.mean(values))),
        "least": over(min),
        "greatest": over(max),
    }


def write(
    directory: pathlib.Path,
    config: ml_collections.ConfigDict,
    comparison: Mapping[str, Any],
    pictures: Mapping[str, np.ndarray],
    watch: Stopwatch,
) -> None:
    """Writes the three files and `done.json`."""
    title = f"{config.report.title}: methods of distillation compared"
    html = build_comparison(title, comparison, pictures)
    write_json(directory / "compare.json", comparison)
    atomic_write(directory / "table.md", lambda temporary: temporary.write_text(markdown(comparison), encoding="utf-8"))
    atomic_write(directory / "index.html", lambda temporary: temporary.write_text(html, encoding="utf-8"))
    files = ("compare.json", "table.md", "index.html")
    write_done(directory, {file: file_sha256(directory / file) for file in files}, watch())
