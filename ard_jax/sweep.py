"""Runs the stages of many configs that differ in a few settings, and puts their results into one table.

A sweep file has a docstring, which says what it is about and what it costs, and SWEEP, a dict:
    config    the config file that all entries start from, with its arguments
    settings  dotted keys and values for all entries (optional)
    entries   name → dotted keys and values; the name is that of the entry's student, or of its fine-tune
    over      a key of numbers that the entries differ in, along which the page draws Fréchet distances (optional)
    stages    which of the stages are run (optional, all but finetune)

With finetune among the stages, the entries are fine-tunes of one student, that of the settings. Entries that differ in
student.*, distill.* and finetune.* alone share a workdir: one teacher, one store, one evaluation. An entry that differs
in anything else has a workdir of its own in that one, and still reads the captions, the autoencoder, the teacher and
the store, each if nothing differs that it depends on. A stage whose `dir` (such as teacher.dir) is set is not run.

Each stage runs in a process of its own, by the very words that --print prints: what a person would type is what is run,
no stage sees what another has left behind in JAX, and a stage that is killed takes nothing with it.

Writes WORKDIR/sweep/: table.md, results.json, index.html.
"""

import pathlib
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections

from ard_jax import runner
from ard_jax.checks import is_student_name, validate
from ard_jax.command_line import Flags, known_keys, make_parser, parse_config, parse_flags
from ard_jax.config import OF_STUDENTS, ROWS, config_differences, flatten, plain
from ard_jax.errors import UserError, first_line
from ard_jax.files import local_path
from ard_jax.report import measures, words
from ard_jax.report.page import build_sweep
from ard_jax.report.pieces import markdown_table
from ard_jax.results import read_results
from ard_jax.runner import TEACHER, Entry, Job, Place
from ard_jax.workdir import FREE, SECTIONS, network_settings, vae_folder

STAGES = ("captions", "teacher", "trajectories", "distill", "finetune", "sample", "evaluate")
UNASKED = tuple(stage for stage in STAGES if stage != "finetune")  # what a sweep runs that does not say
KEYS = ("config", "settings", "entries", "over", "stages")
SET_BY_SWEEP = ("student.name", "finetune.name", "sample.models")
# Sections that a teacher depends on by more than what `network_settings` compares.
OF_TEACHERS = {
    key.split(".")[0] for key, _row in ROWS.items() if "teacher" in _row.changes and "network" not in _row.changes
}
MEASURED = ("fd", "fid", "degradation", "precision", "recall", "psnr", "recall_at_5")

Words = tuple[str, ...]  # a stage and its flags


class Sweep(NamedTuple):
    """A sweep file that has been read; see the module."""

    file: str
    about: str
    config: str
    settings: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, Any]]
    over: str | None = None
    stages: tuple[str, ...] = UNASKED

    @property
    def trained(self) -> str:
        """The stage whose settings the entries differ in."""
        return "finetune" if "finetune" in self.stages else "distill"


# ------------------------------------------------------------------------------------------------- reading and planning


def read_sweep(file: str) -> Sweep:
    """Reads a sweep file.

    Raises:
        UserError: it is not there, does not run, or SWEEP is not as the module says.
    """
    if not pathlib.Path(file).is_file():
        raise UserError(f"the sweep file {file!r} is not there: name one, such as configs/sweeps/masks.py.")
    try:
        found = runpy.run_path(file)
        about, sweep = found["__doc__"] or "", dict(found["SWEEP"])
    except Exception as error:  # a sweep file is code, which may raise anything
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{file} is no sweep ({said}): ard_jax/sweep.py says what one is.") from None
    _check_sweep(file, sweep)
    return Sweep(file, about, **{"settings": {}, **sweep})


def _check_sweep(file: str, sweep: Mapping[str, Any]) -> None:
    """Raises UserError for the first thing in SWEEP that is not as the module says."""
    unknown = [key for key in sweep if key not in KEYS]
    if unknown or not sweep.get("config") or not sweep.get("entries"):
        what = f"has the key {unknown[0]!r}" if unknown else "lacks config or entries"
        raise UserError(f"SWEEP of {file} {what}: its keys are {', '.join(KEYS)}.")
    for name in sweep["entries"]:
        if not is_student_name(name) or name in ("sweep", "vae", *STAGES):
            raise UserError(f"sweep entry {name!r} cannot name a student's folder: use letters, digits, '-' and '_'.")
    stages = sweep.get("stages", ())
    if [stage for stage in STAGES if stage in stages] != list(stages):
        raise UserError(f"the stages of {file} are {stages}: give some of {', '.join(STAGES)}, in this order.")
    if sweep.get("over") is not None and sweep["over"] not in known_keys():
        raise UserError(f"over of {file} is {sweep['over']!r}, which is no setting: name one such as distill.steps.")


def _command_words(sweep: Sweep, stage: str, workdir: str, settings: Mapping[str, Any]) -> Words:
    """A stage and its flags, what a person would type after `python -m ard_jax`."""
    flags = (f"--config.{key}={value}" for key, value in settings.items())
    return stage, "--config", sweep.config, "--workdir", workdir, *flags


def command(sweep: Sweep, job: Job) -> Words:
    """The words of a job."""
    return _command_words(sweep, job.stage, job.place.workdir, job.place.settings)


def _resolve(sweep: Sweep, workdir: str, settings: Mapping[str, Any]) -> Place:
    """A workdir with the config that its stages get by these settings.

    Raises:
        UserError: the stage that the sweep is about would refuse it.
    """
    config, _ = parse_config(list(_command_words(sweep, sweep.trained, workdir, settings)[1:]))
    checked = config.copy_and_resolve_references()
    checked.model.attention = "auto"  # what the device can do is seen where the stage runs
    validate(checked)
    return Place(workdir, config, settings)


def plan(sweep: Sweep, workdir: str, only: list[str] | None = None) -> list[Entry]:
    """The entries, each checked as its stages would check it.

    Args:
        sweep: the sweep.
        workdir: of the whole sweep; a path or gs://….
        only: names of entries; None for all.

    Raises:
        UserError: an entry that there is not, a setting that a stage would refuse, or an `over` of no numbers.
    """
    missing = [name for name in only or () if name not in sweep.entries]
    if missing:
        raise UserError(f"{sweep.file} has no entry {missing[0]!r}: its entries are {', '.join(sweep.entries)}.")
    shared = _resolve(sweep, workdir, sweep.settings)
    entries = [
        _plan_entry(sweep, name, settings, shared)
        for name, settings in sweep.entries.items()
        if only is None or name in only
    ]
    for entry in entries:  # the page would fail on it once all is trained
        axis_position(sweep, entry)
    return entries


def _plan_entry(sweep: Sweep, name: str, settings: Mapping[str, Any], shared: Place) -> Entry:
    """An entry, and what of it lies in the `shared` workdir; see `plan`."""
    taken = [key for key in (*sweep.settings, *settings) if key in SET_BY_SWEEP]
    if taken:
        raise UserError(f"sweep entry {name!r} sets {taken[0]}, which the sweep itself sets: leave it out.")
    _check_section(name, settings, sweep)
    named = {"distill": "student.name", "finetune": "finetune.name"}[sweep.trained]
    with runner.prefix_errors(f"sweep entry {name!r}"):
        own = _resolve(sweep, shared.workdir, {**shared.settings, **settings, named: name})
    differs = {key.split(".")[0] for key in _differing_settings(shared.config, own.config)} - set(OF_STUDENTS)
    if not differs:
        return Entry(name, sweep.trained, own, home=shared, captions=shared, teacher=shared, store=shared)
    same_captions = not differs & {*SECTIONS["captions"], "data", "encode"}
    same_teacher = (
        same_captions and not differs & OF_TEACHERS and network_settings(shared.config) == network_settings(own.config)
    )
    same_store = same_teacher and not differs & set(SECTIONS["trajectories"])
    shares = {
        "captions": same_captions and not own.config.data.num_classes,
        "vae": _has_vae(shared) and not own.config.vae.dir,  # which no stage of a sweep makes
        "teacher": same_teacher,
        "trajectories": same_store,
    }
    elsewhere = {
        f"{section}.dir": f"{shared.workdir}/{section}"
        for section, same in shares.items()
        if same and not shared.config[section].dir
    }
    home = own.with_settings(elsewhere)._replace(workdir=f"{shared.workdir}/{name}")
    captions, teacher, store = (shared if same else home for same in (same_captions, same_teacher, same_store))
    return Entry(name, sweep.trained, home, home, captions, teacher, store)


def _has_vae(place: Place) -> bool:
    """Whether there is an autoencoder for others to read; on a bucket, where nobody looks, wherever one is needed."""
    if "://" in place.workdir:
        return place.config.data.space == "latent"
    return vae_folder(place.config, place.path).exists()


def _check_section(name: str, settings: Mapping[str, Any], sweep: Sweep) -> None:
    """Raises UserError if an entry sets what its student is not trained by, or what all fine-tunes start from."""
    section = {"distill": ("finetune",), "finetune": ("student", "distill")}[sweep.trained]
    wrong = [key for key in settings if key.split(".")[0] in section]
    if wrong and sweep.trained == "distill":
        raise UserError(f"sweep entry {name!r} sets {wrong[0]}, but runs no fine-tune: put finetune among the stages.")
    if wrong:
        raise UserError(
            f"sweep entry {name!r} sets {wrong[0]}, but all fine-tunes of a sweep start from one student: set it in "
            f"settings, or leave finetune out of the stages."
        )


def _differing_settings(base: ml_collections.ConfigDict, config: ml_collections.ConfigDict) -> list[str]:
    """Keys of two configs that differ, but for those that may differ between two starts of the same run."""
    # what lies elsewhere may be something else
    free = tuple(key for key in FREE if not key.endswith((".dir", ".path", ".encoder")))
    return [key for key in config_differences(plain(base), plain(config)) if not key.startswith(free)]


def plan_jobs(sweep: Sweep, entries: Iterable[Entry]) -> list[Job]:
    """What is to be run for the entries, in order."""
    every: list[Entry] = []
    for entry in entries:
        if entry.stage == "finetune":  # what it starts from
            name = entry.home.config.student.name
            every.append(entry._replace(name=name, stage="distill", trained=entry.home, shown=False))
        every.append(entry)
    return [job for job in runner.jobs_of(every) if job.stage in sweep.stages]


# -------------------------------------------------------------------------------------------------------------- running


def is_finished(job: Job) -> bool:
    """Whether what a stage would make is there; what was made otherwise is not, as its stage will say."""
    try:
        return runner.is_finished(job)
    except UserError:
        return False


def run_command(typed: Words, job: Job) -> None:
    """Runs a stage in a process of its own, to which SIGTERM is passed on.

    Raises:
        UserError: it did not end well, or was stopped; it has said why.
    """
    child = subprocess.Popen([sys.executable, "-m", "ard_jax", *typed])
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        status = child.wait()
    except KeyboardInterrupt:  # the child has had it too
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if status or not is_finished(job):
        raise UserError(
            f"the stage {job.stage!r} has not finished (status {status}): see above, and run the same command to go on "
            f"from there."
        )


# -------------------------------------------------------------------------------------------------------------- results


def _collect(sweep: Sweep, entries: Iterable[Entry]) -> dict[str, Any]:
    """results.json: of each entry its settings, its student's results, and those of its teacher."""
    found = {}
    for entry in entries:
        models = read_results(entry.home.path).models
        found[entry.name] = {
            "workdir": entry.home.workdir,
            "settings": dict(sweep.entries[entry.name]),
            "over": axis_position(sweep, entry),
            "teacher": models[TEACHER].to_json(),
            "results": models[entry.name].to_json(),
        }
    return {"sweep": sweep.file, "config": sweep.config, "settings": dict(sweep.settings), "entries": found}


def axis_position(sweep: Sweep, entry: Entry) -> float | None:
    """Where an entry stands along `over`: the value, or how many values where it is several, such as points.

    Raises:
        UserError: it is no number.
    """
    if sweep.over is None:
        return None
    value = flatten(plain(entry.config))[sweep.over]
    position = len(value) if isinstance(value, list) else value
    if isinstance(position, bool) or not isinstance(position, int | float):
        raise UserError(
            f"over of {sweep.file} is {sweep.over!r}, which is {value!r} for entry {entry.name!r}, but the axis has "
            f"numbers: name a setting that has them, such as distill.steps, or leave over out."
        )
    return position


def _columns(results: Mapping[str, Any]) -> tuple[str, ...]:
    """Of MEASURED those that the table has."""
    models = [entry[role] for entry in results["entries"].values() for role in ("teacher", "results")]
    return measures.columns(models, MEASURED)


def _head(results: Mapping[str, Any]) -> tuple[str, ...]:
    return ("Entry", "Steps", *words.headings(_columns(results)))


def _table_rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """The cells of the table, each teacher before the entries that have it."""
    columns = _columns(results)
    several = len({entry["workdir"] for entry in results["entries"].values()}) > 1
    shown = set()
    for name, entry in results["entries"].items():
        if entry["workdir"] not in shown:
            shown.add(entry["workdir"])
            yield _row(f"teacher of {name}" if several else "teacher", entry["teacher"], columns)
        yield _row(name, entry["results"], columns)


def _row(name: str, model: Mapping[str, Any], columns: tuple[str, ...]) -> list[str]:
    return [name, words.number(model.get("steps"), ",.0f"), *words.cells(model, columns)]


def _write_results(sweep: Sweep, entries: list[Entry], folder: pathlib.Path) -> None:
    """Writes the table, results.json and the page, and prints the table."""
    results = _collect(sweep, entries)
    head, rows = _head(results), list(_table_rows(results))
    homes = {entry.home.workdir: entry.home for entry in entries}
    pictures = {workdir: runner.pictures_of(home) for workdir, home in homes.items()}
    page = build_sweep(sweep.about, (head, rows), results, pictures, sweep.over)
    table = f"{markdown_table(head, rows)}\n"
    runner.write_page(folder, "results.json", results, table, page)
    print(f"{table}done: {folder}", flush=True)


# --------------------------------------------------------------------------------------------------------- command line


PRINTED = {"python": ("python", "-m", "ard_jax"), "tpu_pod": ("launch/tpu_pod.sh",)}
FLAGS: Flags = {
    "file": dict(metavar="FILE", help="such as configs/sweeps/masks.py"),
    "--workdir": dict(required=True, metavar="DIR", help="of the whole sweep; with --print, gs://… too"),
    "--only": dict(nargs="+", metavar="NAME", help="just these entries"),
    "--print": dict(choices=tuple(PRINTED), help="print the commands for this, and run none"),
}


def main(arguments: list[str]) -> int:
    """Runs a sweep; returns the exit status: 0 done, 2 a user's mistake or a stage that failed, 130 interrupted."""
    if {"-h", "--help"} & set(arguments):
        epilog = "Settings for all entries may follow: --config.key=value."
        make_parser(FLAGS, prog="python launch/sweep.py", description=__doc__, epilog=epilog).print_help()
        return 0
    try:
        run(arguments)
    except UserError as error:
        print(f"sweep: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\nsweep: interrupted; running the same command goes on from what is saved.", file=sys.stderr)
        return 130
    return 0


def run(arguments: list[str]) -> None:
    """Raises UserError for whatever is wrong, before anything runs where it can be known."""
    settings = [argument for argument in arguments if argument.startswith("--config.")]
    if not all("=" in setting for setting in settings):
        raise UserError("settings for all entries are given as --config.key=value, each in one word: join them by '='.")
    args = parse_flags(FLAGS, [argument for argument in arguments if argument not in settings])
    sweep = read_sweep(args.file)
    common = dict(setting.removeprefix("--config.").split("=", 1) for setting in settings)
    sweep = sweep._replace(settings={**sweep.settings, **common})
    jax.config.update("jax_platforms", "cpu")  # it computes nothing, so it takes no accelerator from the stages
    workdir = args.workdir if args.print else str(local_path(args.workdir))
    entries = plan(sweep, workdir.rstrip("/"), args.only)
    jobs = plan_jobs(sweep, entries)
    if args.print:
        lines = (shlex.join((*PRINTED[args.print], *command(sweep, job))) for job in jobs)
        print("\n".join(lines), flush=True)
        return

    def run_job(job: Job) -> None:
        typed = command(sweep, job)
        print(f"== {shlex.join(typed)}", flush=True)
        run_command(typed, job)

    runner.run_missing(jobs, run_job, is_finished)
    if "evaluate" in sweep.stages:
        _write_results(sweep, entries, pathlib.Path(workdir) / "sweep")
