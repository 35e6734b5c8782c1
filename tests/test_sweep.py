"""Sweeps: all is checked before anything runs, what is finished is not run again, and the table holds the results."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from pipeline_fixtures import ROOT, SMOKE, run

from ard_jax import sweep
from ard_jax.command_line import parse_config
from ard_jax.config import flatten
from ard_jax.files import read_json, write_json
from ard_jax.report import words
from ard_jax.runner import Job, with_settings

TUNED = ("teacher", "trajectories", "distill", "finetune", "sample", "evaluate")
FILES = sorted(path.name for path in (ROOT / "configs" / "sweeps").glob("*.py"))


def write_sweep(folder: pathlib.Path, entries: dict, **rest) -> str:
    path = folder / "some.py"
    path.write_text(
        f'"""Some entries\n\nFor a test."""\n\nSWEEP = { ({"config": SMOKE, "entries": entries} | rest)!r}\n'
    )
    return str(path)


@pytest.fixture
def started(monkeypatch):
    """The commands that a sweep would have run, which all seem to succeed."""
    found = []
    monkeypatch.setattr(sweep, "run_command", lambda words, job: found.append(words))
    return found


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("entries", "rest", "said"),
    [
        (
            {"a": {}, "b": {"student.mas": "window"}},
            {},
            "entry 'b': there is no flag --config.student.mas: did you mean",
        ),
        ({"a": {"student.history_layers": "two"}}, {}, "entry 'a': the command line cannot be used: .*history_layers"),
        (
            {"a": {"student.history_layers": 3}},
            {},
            "entry 'a': student.history_layers is 3, but the model has 2 layers",
        ),
        ({"a": {"distill.online": "perhaps"}}, {}, "entry 'a': the command line cannot be used: .*online"),
        ({"a": {"student.points": (4, 0)}}, {}, r"entry 'a': student.points has \[4\], which the store does not keep"),
        ({"a": {"student.name": "b"}}, {}, "entry 'a' sets student.name, which the sweep itself sets"),
        ({"a": {}}, {"settings": {"sample.models": ("b",)}}, "entry 'a' sets sample.models, which the sweep itself"),
        ({"teacher": {}}, {}, "entry 'teacher' cannot name a student's folder"),
        ({"source": {}}, {}, "entry 'source' cannot name a student's folder"),
        ({"a/b": {}}, {}, "entry 'a/b' cannot name a student's folder"),
        ({}, {}, "lacks config or entries"),
        ({"a": {}}, {"overrides": {}}, "has the key 'overrides': its keys are config, settings, entries, over, stages"),
        ({"a": {}}, {"over": "student.layers"}, "over of .* is 'student.layers', which is no setting"),
        (
            {"a": {}, "b": {"student.mask": "window"}},
            {"over": "student.mask"},
            "over of .* is 'student.mask', which is 'causal' for entry 'a', but the axis has numbers: name",
        ),
        ({"a": {"distill.online": True}}, {"over": "distill.online"}, "over of .* is True for entry 'a', but"),
        (
            {"a": {}},
            {"stages": ("distill", "teacher")},
            "give some of captions, teacher, trajectories, distill, finetune, sample, evaluate",
        ),
        ({"a": {"finetune.weight": 1.0}}, {}, "entry 'a' sets finetune.weight, but runs no fine-tune"),
        (
            {"a": {"student.mask": "window"}},
            {"stages": TUNED},
            "entry 'a' sets student.mask, but all fine-tunes of a sweep start from one student",
        ),
        ({"a": {"finetune.layers": (2,)}}, {"stages": TUNED}, r"entry 'a': finetune.layers is \(2,\), but the teacher"),
        ({"a": {"finetune.name": "b"}}, {"stages": TUNED}, "entry 'a' sets finetune.name, which the sweep itself"),
        ({"a": {}}, {"config": "configs/none.py"}, "the config file 'configs/none.py' is not there"),
    ],
)
def test_every_entry_is_checked_before_anything_runs(tmp_path, capsys, started, entries, rest, said):
    workdir = tmp_path / "run"
    assert sweep.main([write_sweep(tmp_path, entries, **rest), "--workdir", str(workdir)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sweep: ") and error.endswith(".") and "\n" not in error
    assert re.search(said, error), error
    assert not started and not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workdir", "x", "--only", "b"], "has no entry 'b': its entries are a."),
        (["--workdir", "gs://bucket/x"], "gs://bucket/x is no path on this machine"),
        (["--workdir", "x", "--olny", "a"], "there is no flag --olny: did you mean --only."),
        (["--workdir", "x", "--config.seed", "1"], "each in one word"),
        ([], "the command line cannot be used"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, capsys, started, arguments, said):
    assert sweep.main([write_sweep(tmp_path, {"a": {}}), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not started


def test_a_file_that_is_no_sweep_is_named(tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("SWEEP = {'config': 1 / 0}")
    for file, said in ((str(broken), "ZeroDivisionError"), (str(tmp_path / "none.py"), "is not there")):
        assert sweep.main([file, "--workdir", str(tmp_path / "run")]) == 2
        assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- what is planned


def printed(capsys, *arguments) -> list[list[str]]:
    assert sweep.main([str(argument) for argument in arguments]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def parsed(command: list[str]):
    """A printed command's stage, config and workdir."""
    config, _ = parse_config(command[1:])
    return command[0], config, command[command.index("--workdir") + 1]


def test_printed_commands_parse_back_to_the_settings_of_the_entries(tmp_path, capsys):
    entries = {
        "one": {"student.points": (3, 0), "student.mask": "window"},
        "two": {"distill.optimizer.learning_rate": 3e-4, "distill.online": True},
        "three": {"diffusion.guidance_scale": 2.5},
        "four": {"teacher.steps": 7},
        "five": {"run.log_every": 3, "distill.accumulate": 2},
    }
    file = write_sweep(tmp_path, entries, settings={"distill.steps": 9})
    lines = printed(capsys, file, "--workdir", "gs://bucket/a b", "--print", "tpu_pod", "--config.seed=4")
    assert {line[0] for line in lines} == {"launch/tpu_pod.sh"}
    commands = [parsed(line[1:]) for line in lines]
    assert {(config.seed, config.distill.steps) for _, config, _ in commands} == {(4, 9)}
    students = {config.student.name: (config, workdir) for stage, config, workdir in commands if stage == "distill"}
    assert list(students) == list(entries)
    for name, settings in entries.items():
        flat = flatten(students[name][0].to_dict())
        assert {key: flat[key] for key in settings} == settings
    root = "gs://bucket/a b"
    assert [workdir for _, workdir in students.values()] == [root, root, f"{root}/three", f"{root}/four", root]
    # who differs in guidance alone has the shared teacher and its own store, who differs in the teacher has neither
    assert (students["three"][0].teacher.dir, students["three"][0].trajectories.dir) == (f"{root}/teacher", "")
    assert (students["four"][0].teacher.dir, students["four"][0].trajectories.dir) == ("", "")
    made = [(stage, workdir) for stage, _, workdir in commands if stage in ("teacher", "trajectories", "evaluate")]
    own = [(stage, f"{root}/{name}") for name in ("three", "four") for stage in ("trajectories", "evaluate")]
    shared = [(stage, root) for stage in ("teacher", "trajectories", "evaluate")]
    assert sorted(made) == sorted([*shared, *own, ("teacher", f"{root}/four")])
    drawn = {(workdir, *config.sample.models) for stage, config, workdir in commands if stage == "sample"}
    assert {models for place, *models in drawn if place == root for models in models} == {
        *("teacher", "one", "two", "five")
    }
    assert len(drawn) == 8
    order = {command: number for number, command in enumerate(stage for stage, *_ in commands)}
    assert order["evaluate"] > order["sample"] > order["distill"]
    here = printed(capsys, file, "--workdir", "x", "--print", "python", "--only", "one")
    assert [line[:4] for line in here] == [
        ["python", "-m", "ard_jax", stage]
        for stage in ("teacher", "trajectories", "distill", "sample", "sample", "evaluate")
    ]


def test_a_store_is_shared_where_only_the_sampling_differs_and_made_elsewhere_is_not_made_here(tmp_path, capsys):
    file = write_sweep(tmp_path, {"few": {"sample.count": 80}}, settings={"teacher.dir": "/elsewhere/teacher"})
    commands = [parsed(line[3:]) for line in printed(capsys, file, "--workdir", "x", "--print", "python")]
    assert [stage for stage, *_ in commands] == ["trajectories", "distill", "sample", "sample", "evaluate"]
    assert [workdir for *_, workdir in commands] == ["x", *["x/few"] * 4]
    assert {config.teacher.dir for _, config, _ in commands} == {"/elsewhere/teacher"}
    assert commands[1][1].trajectories.dir == "x/trajectories"


def test_captions_and_the_autoencoder_are_shared_where_nothing_differs_that_they_depend_on(tmp_path, capsys):
    """Or each entry would encode them again, and an autoencoder that lies in the shared workdir would be missed."""
    entries = {
        "scale": {"diffusion.guidance_scale": 1.5},
        "long": {"captions.length": 20},
        "fewer": {"vae.batch_size": 4},
    }
    captions = {"config": "configs/smoke_captions.py", "settings": {"data.channels": 4, "data.space": "latent"}}
    file, workdir = write_sweep(tmp_path, entries, **captions), tmp_path / "x"
    (workdir / "vae").mkdir(parents=True)
    commands = [parsed(line[3:]) for line in printed(capsys, file, "--workdir", workdir, "--print", "python")]
    made = [(stage, place) for stage, _, place in commands if stage in ("captions", "teacher")]
    assert made == [(stage, f"{workdir}{own}") for own in ("", "/long") for stage in ("captions", "teacher")]
    read = {place: (config.captions.dir, config.vae.dir) for stage, config, place in commands if stage == "distill"}
    assert read == {
        f"{workdir}/scale": (f"{workdir}/captions", f"{workdir}/vae"),
        f"{workdir}/long": ("", f"{workdir}/vae"),
        f"{workdir}/fewer": (f"{workdir}/captions", f"{workdir}/vae"),
    }
    workdir = "gs://bucket/x"
    commands = [parsed(line[1:]) for line in printed(capsys, file, "--workdir", workdir, "--print", "tpu_pod")]
    assert {config.vae.dir for stage, config, place in commands if place != workdir} == {f"{workdir}/vae"}


def test_evaluate_draws_the_models_of_the_entries_where_it_draws(tmp_path, capsys):
    """By the command that is printed, whose config names a student that no entry trains."""
    entries = {"one": {}, "two": {"student.mask": "window"}, "far": {"diffusion.guidance_scale": 2.5}}
    file = write_sweep(tmp_path, entries, settings={"evaluate.draw": True})
    commands = [parsed(line[3:]) for line in printed(capsys, file, "--workdir", "x", "--print", "python")]
    drawn = {workdir: config.sample.models for stage, config, workdir in commands if stage == "evaluate"}
    assert drawn == {"x": ("teacher", "one", "two"), "x/far": ("teacher", "far")}
    assert "sample" not in {stage for stage, *_ in commands}


def test_fine_tunes_start_from_one_student_that_is_trained_before_them(tmp_path, capsys):
    entries = {"weak": {"finetune.weight": 0.5}, "first": {"finetune.layers": (0,)}}
    file = write_sweep(tmp_path, entries, stages=TUNED, settings={"student.mask": "window"})
    commands = [parsed(line[3:]) for line in printed(capsys, file, "--workdir", "x", "--print", "python")]
    assert stages_of(commands) == [
        *(("teacher", ""), ("trajectories", ""), ("distill", "ard")),
        *(("finetune", "weak"), ("sample", "teacher"), ("sample", "weak")),
        *(("finetune", "first"), ("sample", "first"), ("evaluate", "")),
    ]
    tuned = {config.finetune.name: config for stage, config, _ in commands if stage == "finetune"}
    assert [(c.student.name, c.student.mask, c.finetune.start) for c in tuned.values()] == [("ard", "window", "")] * 2
    assert (tuned["weak"].finetune.weight, tuple(tuned["first"].finetune.layers)) == (0.5, (0,))
    assert {workdir for *_, workdir in commands} == {"x"}


@pytest.mark.parametrize("file", FILES)
def test_every_sweep_of_the_repository_is_valid_and_says_what_it_costs(file):
    read = sweep.read_sweep(str(ROOT / "configs" / "sweeps" / file))
    entries = sweep.plan(read._replace(config=str(ROOT / read.config)), "runs/x")
    assert len(entries) == len(read.entries) > 1
    assert "minutes on two CPU cores" in read.about
    positions = [sweep.axis_position(read, entry) for entry in entries]
    assert (None in positions) == (read.over is None)


def test_the_ablations_of_the_paper_are_there():
    assert {"history_layers.py", "masks.py", "steps.py", "targets.py", "heads.py", "times.py"} <= set(FILES)
    assert {"online.py", "guidance.py", "lengths.py"} <= set(FILES)
    layers = sweep.read_sweep(str(ROOT / "configs" / "sweeps" / "history_layers.py"))
    assert [settings["student.history_layers"] for settings in layers.entries.values()] == list(range(7))


# ------------------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def workdir(pipeline, tmp_path):
    """A finished run of configs/smoke.py, its student "ard"; samples of both models were drawn in one go."""
    return shutil.copytree(pipeline, tmp_path / "run")


def stages(commands) -> list[tuple[str, str]]:
    return stages_of([parsed(list(words)) for words in commands])


def unfinished(read, workdir) -> list[Job]:
    """What is not there."""
    return [job for job in sweep.plan_jobs(read, sweep.plan(read, str(workdir))) if not sweep.is_finished(job)]


def stages_of(commands) -> list[tuple[str, str]]:
    """Stage and model of each parsed command."""
    named = {
        "distill": lambda config: config.student.name,
        "finetune": lambda config: config.finetune.name,
        "sample": lambda config: config.sample.models[0],
    }
    return [(stage, named.get(stage, lambda config: "")(config)) for stage, config, _ in commands]


def test_what_is_finished_is_not_run_again(workdir, tmp_path, capsys, started):
    file = write_sweep(tmp_path, {"ard": {}})
    assert sweep.main([file, "--workdir", str(workdir)]) == 0
    assert started == []
    table = capsys.readouterr().out
    model = read_json(workdir / "evaluate" / "results.json")["models"]["ard"]
    assert f"| ard | 3 | {words.number(model['fd'])} |" in table

    entries = {"ard": {}, "window": {"student.mask": "window"}}
    read = sweep.read_sweep(write_sweep(tmp_path, entries))
    assert stages(sweep.command(read, job) for job in unfinished(read, workdir)) == [
        ("distill", "window"), ("sample", "window"), ("evaluate", "")
    ]  # fmt: skip


@pytest.mark.parametrize("measured", ["fd", "fid"])
def test_the_table_has_the_columns_that_were_measured(measured):
    """Those of captions, and FID in the place of FD, where they were."""
    model = {"steps": 4, "fd": 2.5, measured: 2.5, "recall_at_5": {"trained": 0.5, "held_out": 0.25}}
    entries = {"a": {"workdir": "x", "teacher": model | {"steps": 24}, "results": model | {"degradation": 0.5}}}
    assert sweep._head({"entries": entries}) == (
        *("Entry", "Steps", f"{measured.upper()} ↓", "Degradation ↓", "Precision ↑", "Recall ↑"),
        *("PSNR to teacher, dB ↑", "Caption in first 5, trained / held out ↑"),
    )
    teacher, student = sweep._table_rows({"entries": entries})
    assert teacher == ["teacher", "24", "2.50", *["–"] * 4, "50 % / 25 %"]
    assert student == ["a", "4", "2.50", "0.500", *["–"] * 3, "50 % / 25 %"]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("--config.distill.steps=30", [("distill", "ard")]),
        ("--config.sample.count=80", [("sample", "teacher"), ("sample", "ard"), ("evaluate", "")]),
        ("--config.evaluate.neighbours=2", [("evaluate", "")]),
        ("--config.run.log_every=1", []),
        ("--config.trajectories.count=32", [("trajectories", "")]),
    ],
)
def test_what_was_made_with_other_settings_is_not_taken_for_finished(workdir, tmp_path, started, change, again):
    sweep.main([write_sweep(tmp_path, {"ard": {}}), "--workdir", str(workdir), change])
    assert stages(started) == again


def test_what_was_made_from_another_teacher_or_without_its_end_is_not_taken_for_finished(workdir, tmp_path, started):
    file = write_sweep(tmp_path, {"ard": {}})
    (workdir / "distill" / "ard" / "done.json").unlink()
    sweep.main([file, "--workdir", str(workdir)])
    assert stages(started) == [("distill", "ard"), ("sample", "ard")]
    started.clear()
    done = read_json(workdir / "teacher" / "done.json")
    write_json(workdir / "teacher" / "done.json", done | {"sha256": done["sha256"] | {"ema": "0" * 64}})
    sweep.main([file, "--workdir", str(workdir)])
    assert ("trajectories", "") in stages(started) and ("sample", "teacher") in stages(started)


def test_fine_tunes_are_finished_until_their_student_is_another(workdir, tmp_path):
    """The config of a fine-tuned student is not the one that was given, but that of the student it started from."""
    read = sweep.read_sweep(write_sweep(tmp_path, {"tuned": {}}, stages=TUNED))
    todo = unfinished(read, workdir)
    assert stages(sweep.command(read, job) for job in todo) == [
        ("finetune", "tuned"), ("sample", "tuned"), ("evaluate", "")
    ]  # fmt: skip
    job = todo[0]
    assert run(*sweep.command(read, job)).status == 0 and sweep.is_finished(job)
    other = job.place._replace(config=with_settings(job.place.config, {"finetune.weight": 2.0}))
    assert not sweep.is_finished(job._replace(place=other))
    store = workdir / "trajectories" / "manifest.json"
    manifest = read_json(store)
    first, *others = manifest["shards"]
    write_json(store, manifest | {"shards": [first | {"sha256": "0" * 64}, *others]})
    assert not sweep.is_finished(job)
    write_json(store, manifest)
    assert sweep.is_finished(job)
    done = read_json(workdir / "distill" / "ard" / "done.json")
    write_json(workdir / "distill" / "ard" / "done.json", done | {"sha256": done["sha256"] | {"ema": "0" * 64}})
    assert not sweep.is_finished(job)


def test_a_stage_that_fails_ends_the_sweep_in_a_sentence(tmp_path, capfd):
    """How many devices there are is known only where the stage runs."""
    file = write_sweep(tmp_path, {"ard": {}}, settings={"mesh.data": 3})
    assert sweep.main([file, "--workdir", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert "ard_jax teacher: " in error and "the stage 'teacher' has not finished (status 2)" in error
    assert not (tmp_path / "run" / "sweep").exists()


# ------------------------------------------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_the_script_passes_sigterm_on_and_goes_on_where_it_stopped(workdir, tmp_path):
    """From any folder; the student's training saves its state and stops, and no process is left behind."""
    entries = {"ard": {}, "long": {"distill.steps": 100_000, "distill.checkpoint_every": 100_000}}
    words = [ROOT / "launch" / "sweep.py", write_sweep(tmp_path, entries), "--workdir", workdir]
    student = workdir / "distill" / "long"
    running = subprocess.Popen([sys.executable, *words], cwd=tmp_path, text=True, stderr=subprocess.PIPE)
    while not ((student / "metrics.jsonl").exists() and (student / "metrics.jsonl").stat().st_size):
        assert running.poll() is None
        time.sleep(0.1)
    running.terminate()
    error = running.communicate()[1]
    assert running.returncode == 2 and "the stage 'distill' has not finished (status 0)" in error
    saved = [int(path.name) for path in (student / "checkpoints").iterdir()]
    assert len(saved) == 1 and 5 <= saved[0] < 100_000
    assert not (workdir / "sweep").exists()
    again = subprocess.run([sys.executable, *words, "--only", "ard"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "== " not in again.stdout, again.stderr  # its own entry was finished


@pytest.mark.slow
def test_a_sweep_from_nothing_to_its_table_interrupted_on_the_way(tmp_path, capsys, monkeypatch):
    entries = {
        "none": {"student.history_layers": 0},
        "all": {"student.history_layers": 2},
        "strong": {"diffusion.guidance_scale": 3.0},
    }
    file = write_sweep(tmp_path, entries, over="student.history_layers")
    workdir = tmp_path / "run"
    real, ran = sweep.run_command, []

    def limited(words, job):
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(words)
        real(words, job)

    monkeypatch.setattr(sweep, "run_command", limited)
    assert sweep.main([file, "--workdir", str(workdir)]) == 130
    assert "running the same command goes on" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("checkpoints")}
    assert not (workdir / "sweep").exists() and len(before) == 2

    first, ran[:] = list(ran), []
    monkeypatch.setattr(sweep, "run_command", lambda words, job: (ran.append(words), real(words, job)))
    assert sweep.main([file, "--workdir", str(workdir)]) == 0
    assert not set(first) & set(ran) and {path: path.stat().st_mtime_ns for path in before} == before
    read = sweep.read_sweep(file)
    every = sweep.plan_jobs(read, sweep.plan(read, str(workdir)))
    assert {*first, *ran} == {sweep.command(read, job) for job in every}

    out = capsys.readouterr().out
    table = (workdir / "sweep" / "table.md").read_text()
    results = json.loads((workdir / "sweep" / "results.json").read_text())
    assert table in out and out.endswith(f"done: {workdir / 'sweep'}\n")
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    assert [row[0] for row in rows[2:]] == ["teacher of none", "none", "all", "teacher of strong", "strong"]
    for name, folder in {"none": workdir, "all": workdir, "strong": workdir / "strong"}.items():
        evaluated = read_json(folder / "evaluate" / "results.json")["models"]
        assert results["entries"][name]["results"] == evaluated[name]
        assert results["entries"][name]["teacher"] == evaluated["teacher"]
        assert results["entries"][name]["over"] == {"none": 0, "all": 2, "strong": 1}[name]
        row = next(row for row in rows if row[0] == name)
        assert row[1:3] == ["3", words.number(evaluated[name]["fd"])]
        assert row[4:] == [words.number(evaluated[name][key], spec) for key, spec in
                           (("precision", ".3f"), ("recall", ".3f"), ("psnr", ".1f"))]  # fmt: skip
    page = (workdir / "sweep" / "index.html").read_text()
    assert page.count("<h1>Some entries</h1>") == 1 and "Along student.history_layers" in page
    assert not (workdir / "strong" / "teacher").exists()  # it read the shared one

    ran.clear()
    assert sweep.main([file, "--workdir", str(workdir)]) == 0
    assert not ran and (workdir / "sweep" / "table.md").read_text() == table
    assert run("report", "--config", SMOKE, "--workdir", workdir).status == 0  # a sweep's workdir is a workdir
