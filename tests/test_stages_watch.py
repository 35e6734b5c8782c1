"""The stage watch: every checkpoint once, whatever happens, with the numbers that evaluate gives."""

import shutil

import jax
import numpy as np
import pytest
from pipeline_fixtures import copy, done, files, run, sentence, smoke
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from ard_jax import ARDPipeline
from ard_jax.curve import read_curve
from ard_jax.files import read_json, write_json
from ard_jax.parallel import make_mesh
from ard_jax.report import build_curve, build_report, checkpoints
from ard_jax.results import Results
from ard_jax.snapshots import at_checkpoint
from ard_jax.stages import watch
from ard_jax.training.checkpoints import load_parameters, read_wanted, seal, steps_in
from ard_jax.workdir import load_student, make_student, recorded_config

ARD, TEACHER = "sample.models=('ard',)", "sample.models=('teacher',)"


def look_on(workdir, *overrides, once=True):
    return smoke("watch", workdir, *overrides, flags=["--once"] if once else [])


def places(workdir):
    return [(line["model"], line["step"]) for line in read_curve(workdir)]


def without_times(line):
    return {key: value for key, value in line.items() if key != "seconds_per_image"}


@pytest.fixture(scope="module")
def watched(pipeline, tmp_path_factory):
    """A finished run of which all checkpoints have been measured; not to be written to."""
    workdir = copy(pipeline, tmp_path_factory.mktemp("watched"), "teacher", "distill")
    outcome = look_on(workdir, ARD)
    assert outcome.status == 0, outcome.err
    assert outcome.out == f"done: {workdir / 'evaluate' / 'curve.jsonl'}\n"
    return workdir


# ------------------------------------------------------------------------------------------------- really measured


def test_every_checkpoint_has_its_line_and_the_last_one_is_what_evaluate_measures(watched, pipeline):
    assert places(watched) == [("ard", 15), ("ard", 20)]
    first, last = read_curve(watched)
    expected = read_json(pipeline / "evaluate" / "results.json")
    model = expected["models"]["ard"]
    for key in ("fd", "precision", "recall", "psnr", "ema_sha256", "steps", "mask", "objective"):
        assert last[key] == model[key], key
    for key in ("features", "real_images", "samples"):
        assert last[key] == expected[key]
    assert first["ema_sha256"] != last["ema_sha256"] and first["fd"] != last["fd"]


def test_nothing_is_left_of_the_snapshots_and_the_run_is_as_it_was(watched, pipeline):
    assert files(watched / "evaluate") == ["curve.html", "curve.jsonl", "watch/config.json"]
    assert [path.name for path in (watched / "evaluate" / "watch").iterdir()] == ["config.json"]
    added = set(files(watched / "distill")) - set(files(pipeline / "distill"))
    assert added == {"ard/wanted.json"}
    assert done(watched / "distill" / "ard") == done(pipeline / "distill" / "ard")


def test_what_is_measured_is_not_measured_again(watched, tmp_path, monkeypatch):
    workdir = copy(watched, tmp_path, "teacher", "distill", "evaluate")
    before = (workdir / "evaluate" / "curve.jsonl").read_bytes()
    monkeypatch.setattr(watch, "take_snapshot", lambda *args: 1 / 0)
    assert look_on(workdir, ARD).status == 0
    assert (workdir / "evaluate" / "curve.jsonl").read_bytes() == before


@pytest.mark.slow
def test_it_measures_what_it_draws_and_keeps_no_samples(watched, tmp_path, monkeypatch):
    """The lines of those that the stage `sample` wrote."""
    workdir, run_stage, ran = copy(watched, tmp_path, "teacher", "distill"), watch._run_stage, []

    def noted(job):
        run_stage(job)
        ran.append((job.stage, (job.place.path / "sample").exists()))

    monkeypatch.setattr(watch, "_run_stage", noted)
    outcome = look_on(workdir, ARD, "evaluate.draw=True")
    assert outcome.status == 0, outcome.err
    assert ran == [("evaluate", False)] * 2
    assert [*map(dict, read_curve(workdir))] == [*map(without_times, read_curve(watched))]


@pytest.mark.slow
def test_killed_while_it_measures_it_goes_on(watched, tmp_path, monkeypatch):
    """Killed when the first checkpoint has been sampled: its samples are taken, and the lines are the same."""
    workdir = copy(watched, tmp_path, "teacher", "distill")
    run_stage, ran = watch._run_stage, []

    def interrupted(job):
        if job.stage == "evaluate" and len(ran) < 2:
            raise KeyboardInterrupt
        ran.append((job.stage, job.place.path.name.rpartition("-")[0]))
        run_stage(job)

    monkeypatch.setattr(watch, "_run_stage", interrupted)
    assert look_on(workdir, ARD).status == 130
    assert ran == [("sample", "ard-15")] and not places(workdir)
    ran.append("killed")
    assert look_on(workdir, ARD).status == 0
    assert ran[2:] == [("evaluate", "ard-15"), ("sample", "ard-20"), ("evaluate", "ard-20")]
    assert list(map(without_times, read_curve(workdir))) == list(map(without_times, read_curve(watched)))


def test_other_settings_are_another_curve(watched, tmp_path):
    workdir = copy(watched, tmp_path, "evaluate")
    for change in ("sample.count=80", "evaluate.feature_steps=21"):
        said = sentence(look_on(workdir, ARD, change), "watch")
        assert f"{workdir / 'evaluate' / 'watch'} holds what was measured with other settings ({change[:10]}" in said
    assert look_on(workdir, ARD, "sample.batch_size=8", "run.poll=1").err.count("other settings") == 0


@pytest.mark.parametrize(("checkpoint", "step"), [("best", 20), ("15", 15)])
def test_a_checkpoint_is_exported(watched, tmp_path, checkpoint, step):
    """Of a training that goes on, too: done.json is not needed."""
    workdir = copy(watched, tmp_path / "run", "teacher", "distill", "evaluate")
    (workdir / "distill" / "ard" / "done.json").unlink()
    best = min(read_curve(workdir), key=lambda line: line["fd"])["step"]
    asked = ["--model", "ard", "--format", "pipeline", "--checkpoint", checkpoint]
    outcome = run("export", "--workdir", workdir, *asked)
    assert outcome.status == 0, outcome.err
    assert step == (best if checkpoint == "best" else 15)
    folder = workdir / "distill" / "ard"
    model = make_student(recorded_config(folder))
    for other in set(steps_in(folder / "checkpoints")) - {step}:
        shutil.rmtree(folder / "checkpoints" / str(other))
    shapes = load_student(watched / "distill" / "ard", make_mesh()).params
    expected = load_parameters(folder / "checkpoints", "ema", shapes)
    given = ARDPipeline.from_pretrained(workdir / "export" / "ard" / "pipeline")
    assert given.model.steps == model.steps
    jax.tree.map(np.testing.assert_array_equal, given.params, expected)
    assert not [name for name in files(workdir) if ".partial" in name]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            ["--checkpoint", "17"],
            "ard has no checkpoint 17: it has 15, 20, and run.keep_checkpoints=0 keeps all",
        ),
        (["--checkpoint", "last"], "--checkpoint is 'last': give a step, or best."),
        (["--checkpoint", "best", "--metric", "beauty"], "--metric is 'beauty': choose one of frechet, fid"),
        (["--checkpoint", "best", "--metric", "fid"], "curve.jsonl says nothing of 'ard' by 'fid'"),
    ],
)
def test_checkpoints_that_cannot_be_exported(watched, asked, said):
    told = sentence(run("export", "--workdir", watched, "--model", "ard", "--format", "pipeline", *asked), "export")
    assert said in told and not (watched / "export").exists()
    assert not [name for name in files(watched) if ".partial" in name]


def train_anew(folder, step):
    """Puts a checkpoint of another training in the place of that of a step, and its hashes."""
    (folder / "checkpoints" / str(step) / "more").write_text("of another training")
    (folder / "checksums" / f"{step}.json").unlink()
    seal(folder / "checkpoints", last=step)


def test_the_best_of_an_earlier_training_is_not_exported(watched, tmp_path):
    """The lines stay where a training was moved away and another one begun under its name."""
    workdir = copy(watched, tmp_path, "teacher", "distill", "evaluate")
    folder = workdir / "distill" / "ard"
    assert min(read_curve(workdir), key=lambda line: line["fd"])["step"] == 20
    train_anew(folder, 20)
    with at_checkpoint(folder, workdir, "best", "fd", "ema") as view:
        assert steps_in(view / "distill" / "ard" / "checkpoints") == [15]
    train_anew(folder, 15)
    asked = ["--workdir", workdir, "--model", "ard", "--format", "pipeline", "--checkpoint", "best"]
    said = "says nothing of 'ard' by 'frechet' that is of a checkpoint which is there now, so none of these is the best"
    assert said in sentence(run("export", *asked), "export")


# -------------------------------------------------------------------------------------------------- what it waits for


@pytest.fixture
def quick(monkeypatch):
    """Measures nothing: the distance of a checkpoint is how far its step is from 10, and it is a student's."""

    def run_missing(jobs, _):
        view, (name,) = jobs[0].place.path, jobs[0].models
        (step,) = steps_in(view / ("teacher" if name == "teacher" else f"distill/{name}") / "checkpoints")
        model = {"fd": abs(step - 10.0), "kind": "student", "precision": step / 100}
        write_json(view / "evaluate" / "results.json", {"features": "none", "models": {name: model}})

    monkeypatch.setattr(watch, "run_missing", run_missing)


@pytest.fixture
def training(pipeline, tmp_path):
    """A student of which just the checkpoint 15 is whole; the next one is still being written."""
    workdir = copy(pipeline, tmp_path, "teacher", "distill")
    (workdir / "distill" / "ard" / "done.json").unlink()
    (workdir / "distill" / "ard" / "checksums" / "20.json").unlink()
    return workdir


def test_it_waits_for_checkpoints_that_are_whole_and_ends_with_the_training(quick, training, monkeypatch):
    folder, seen = training / "distill" / "ard", []

    def sleep(seconds):
        seen.append((seconds, places(training), read_wanted(folder)))
        if len(seen) == 2:
            seal(folder / "checkpoints")
        if len(seen) == 3:
            write_json(folder / "done.json", {"sha256": {}})

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert look_on(training, ARD, "run.poll=7", once=False).status == 0
    one = (7.0, [("ard", 15)], [15])
    assert seen == [one, one, (7.0, [("ard", 15), ("ard", 20)], [15])]  # 5 and 10 from the best distance


def test_once_takes_what_is_there(quick, training, monkeypatch):
    monkeypatch.setattr(watch.time, "sleep", lambda _: 1 / 0)
    assert look_on(training, ARD).status == 0
    assert places(training) == [("ard", 15)]


@pytest.mark.parametrize(("metric", "best"), [("frechet", 15), ("precision", 20)])
def test_the_best_by_the_metric_and_what_is_to_be_measured_are_asked_for(quick, training, monkeypatch, metric, best):
    folder, wanted = training / "distill" / "ard", []
    seal(folder / "checkpoints")
    take = watch.take_snapshot
    monkeypatch.setattr(watch, "take_snapshot", lambda *args: (wanted.append(read_wanted(folder)), take(*args)))
    assert look_on(training, ARD, f"run.keep_best={metric}").status == 0
    assert wanted == [[15, 20], [15, 20]] and read_wanted(folder) == [best]


@pytest.mark.parametrize(("metric", "there"), [("fd", ["15"]), ("precision", ["15", "20"])])
def test_the_best_is_there_even_if_it_is_deleted_while_it_is_measured(quick, training, monkeypatch, metric, there):
    """Bit for bit; what is not the best when it has been measured stays deleted."""
    folder, take = training / "distill" / "ard" / "checkpoints", watch.take_snapshot
    seal(folder)
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    monkeypatch.setattr(watch, "take_snapshot", lambda *args: (take(*args), shutil.rmtree(folder / str(args[2]))))
    assert look_on(training, ARD, f"run.keep_best={metric}").status == 0
    assert sorted(path.name for path in folder.iterdir()) == there
    expected = {name: found for name, found in before.items() if name.split("/")[0] in there}
    assert {name: (folder / name).read_bytes() for name in files(folder)} == expected


def test_a_damaged_checkpoint_is_passed_over_and_named(quick, training):
    folder = training / "distill" / "ard"
    seal(folder / "checkpoints")
    largest = max((folder / "checkpoints" / "15").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"\0\0")
    outcome = look_on(training, ARD)
    assert outcome.status == 0 and places(training) == [("ard", 20)]
    assert "ard at step 15 is passed over: checkpoint 15 of" in outcome.err
    assert "is damaged (1 of its files were altered or lost" in outcome.err


def test_a_training_that_was_begun_anew_is_measured_anew(quick, training):
    assert look_on(training, ARD).status == 0
    (before,) = read_curve(training)
    train_anew(training / "distill" / "ard", 15)
    assert look_on(training, ARD).status == 0
    (after,) = read_curve(training)
    assert after["step"] == before["step"] == 15 and after["checkpoint"] != before["checkpoint"]


@pytest.mark.parametrize("there", [False, True])
def test_the_best_of_an_earlier_training_is_not_asked_for(quick, training, there):
    """Its step is not there, or is another training's that cannot be read: either way the best is another."""
    folder = training / "distill" / "ard"
    seal(folder / "checkpoints")
    assert look_on(training, ARD).status == 0
    assert read_wanted(folder) == [15]
    train_anew(folder, 20)
    if there:
        train_anew(folder, 15)
        (folder / "checkpoints" / "15" / "more").write_text("damaged")
    else:
        shutil.rmtree(folder / "checkpoints" / "15")
        (folder / "checksums" / "15.json").unlink()
    assert look_on(training, ARD).status == 0
    assert places(training) == [("ard", 15), ("ard", 20)] and read_wanted(folder) == [20]


def test_a_converted_model_that_has_no_hashes_is_measured(quick, training):
    shutil.rmtree(training / "teacher" / "checksums")
    assert look_on(training, TEACHER).status == 0
    assert places(training) == [("teacher", 15), ("teacher", 20)]


def test_where_there_is_no_checkpoint(tmp_path):
    said = sentence(look_on(tmp_path), "watch")
    assert f"there is no whole checkpoint of teacher or ard in {tmp_path}: train first, or leave --once out." in said
    assert "run.keep_best is 'beauty': choose one of" in sentence(look_on(tmp_path, "run.keep_best=beauty"), "watch")


# ------------------------------------------------------------------------------------------------------- what it shows


def line(model, step, **measured):
    kind = "teacher" if model == "teacher" else "student"
    return {"model": model, "step": step, "checkpoint": "", "kind": kind, "features": "small ones.", **measured}


LINES = [
    line("ard", 5, fd=3.0, mask="causal"),
    line("ard", 10, fd=2.0, mask="causal"),
    line("ard", 15, mask="causal"),  # of too few images
    line("ard", 20, fd=30.0, fid=30.0, mask="causal"),
    line("teacher", 50, fd=1.5),
    line("teacher", 100, fd=1.0),
    line("teacher", 150, fd=10.0, fid=10.0),
]


def test_the_figure_has_a_line_a_model_and_the_last_teacher_beside_its_students():
    drawn = checkpoints.charts(LINES, {"ard": "ard", "teacher": "teacher"})
    assert [chart.caption for chart in drawn] == [
        "Teacher, FID", "Students, FID", "Teacher, Fréchet distance", "Students, Fréchet distance"
    ]  # fmt: skip
    ard, teacher = drawn[3].legend
    assert (ard.label, list(ard.x), list(ard.y), ard.dashed) == ("ARD", [5, 10], [3.0, 2.0], False)
    assert (teacher.label, list(teacher.x), list(teacher.y), teacher.dashed) == ("Teacher", [5, 10], [1.0, 1.0], True)
    assert [(list(line.x), list(line.y)) for line in drawn[1].legend] == [([20], [30.0]), ([20, 20], [10.0, 10.0])]


def test_the_page_of_a_curve_and_the_report_show_it():
    page = build_curve("Mine: checkpoints", LINES)
    assert "Features: small ones." in page and page.count("<svg") == 4 and "http://" not in page
    reports = [build_report("Mine", Results(), {}, {}, curve=curve) for curve in (LINES, [])]
    assert [report.count("Students, Fréchet distance") for report in reports] == [1, 0]
    assert "No checkpoint has a Fréchet distance yet." in build_curve("Mine", LINES[2:3])


def test_tensorboard_has_each_checkpoint_once(tmp_path):
    """Two starts, the second of which finds what the first has written."""
    for lines in (LINES[:2], LINES):
        boards = watch.TensorBoards(tmp_path / "tensorboard")
        for given in lines:
            boards.write(given)
        boards.close()
    shown = {}
    for name in ("ard", "teacher"):
        events = EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()
        tensors = events.Tensors("fd")
        shown[name] = [(event.step, float(make_ndarray(event.tensor_proto))) for event in tensors]
    assert shown == {"ard": [(5, 3.0), (10, 2.0), (20, 30.0)], "teacher": [(50, 1.5), (100, 1.0), (150, 10.0)]}
