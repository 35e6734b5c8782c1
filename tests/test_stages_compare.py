"""The stage compare: what it derives from a config, what it makes, and that its numbers are those of the stages."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import ard_student
from pipeline_fixtures import ROOT, copy, done, files, run, sentence
from test_report import Page

from ard_jax import workdir
from ard_jax.config import flatten
from ard_jax.entries import entries_of
from ard_jax.errors import UserError
from ard_jax.files import file_sha256, read_json
from ard_jax.methods import training_flops
from ard_jax.models import parameter_shapes
from ard_jax.objectives import Given
from ard_jax.report import build_comparison, markdown, words
from ard_jax.runner import jobs_of, with_settings
from ard_jax.stages.compare import _over_seeds, quick_config
from configs import smoke

STEP = {"title": "Step distillation", "steps": (2,), "settings": {"student": {"mask": "diagonal"}}}
KNOWLEDGE = {"steps": (1,), "settings": {"distill": {"batch_size": 16}}}
ARD = {"title": "ARD", "steps": (3,)}
WORKDIR = pathlib.Path("runs/some")
METHODS = {"ard": ARD, "step": STEP, "knowledge": KNOWLEDGE}
CHANGES = {"points": ((0,), (1, 0), (3, 1, 0)), "steps": (1, 2, 3), "quick": {"distill": {"steps": 5}}}


def config_with(methods, **changes):
    """The smoke config that compares these methods; `changes` of its section compare."""
    config = smoke.get_config()
    with config.unlocked():
        config.compare.update(CHANGES | changes)
        config.compare.methods = methods
    return config


def write_config(folder, methods, changes=""):
    """The same as a config file, with more lines in its get_config."""
    lines = "from configs import smoke\n\n\ndef get_config(argument=''):\n    config = smoke.get_config()\n"
    lines += f"    config.unlock()\n    config.compare.update({CHANGES!r})\n    config.compare.methods = {methods!r}\n"
    file = folder / "small_base.py"
    file.write_text(f"{lines}    {changes}\n    return config\n")
    return file


def compare(file, workdir, *flags):
    return run("compare", "--config", file, "--workdir", workdir, *flags)


# ------------------------------------------------------------------------------------------------ what is derived


def test_every_method_gets_the_same_training_flops():
    config = config_with(METHODS)
    entries = entries_of(config, training_flops, WORKDIR)
    assert list(entries) == ["ard_3", "knowledge_1", "step_2"]
    budget = training_flops(config)
    for entry in entries.values():
        steps = entry.config.distill.steps
        assert training_flops(entry.config) == pytest.approx(budget, rel=0.51 / steps)
    # the base config's own student is ARD in three steps; with one block and twice the batch, a step costs about 2/3
    assert entries["ard_3"].config.distill.steps == config.distill.steps == 20
    assert entries["knowledge_1"].config.distill.steps in range(30, 34)
    assert entries["knowledge_1"].title == "knowledge" and entries["step_2"].title == "Step distillation"


def test_an_entry_changes_what_it_says_and_nothing_else():
    config = config_with(METHODS)
    entry = entries_of(config, training_flops, WORKDIR)["step_2"]
    before, after = flatten(config.to_dict()), flatten(entry.config.to_dict())
    assert {key for key in before if before[key] != after[key]} == {
        "student.name", "student.points", "student.mask", "distill.steps"
    }  # fmt: skip
    assert (entry.config.student.name, entry.config.student.points) == ("step_2", (1, 0))
    assert (entry.method, entry.steps, entry.stage, entry.start, entry.shown) == ("step", 2, "distill", "", True)


def test_settings_by_steps_come_last():
    settings = {"distill": {"batch_size": 4, "optimizer": {"learning_rate": 0.5}}}
    method = {"settings": settings, "settings_at": {"2": {"distill": {"batch_size": 10}}}}
    entries = entries_of(config_with({"ard": method}), training_flops, WORKDIR)
    assert [entry.config.distill.batch_size for entry in entries.values()] == [4, 10, 4]
    assert {entry.config.distill.optimizer.learning_rate for entry in entries.values()} == {0.5}


def test_a_chain_shares_one_budget_and_starts_from_itself():
    config = config_with({"ard": {"steps": (3, 2, 1), "chain": True}}, steps=(2, 3))
    entries = entries_of(config, training_flops, WORKDIR)
    assert [(entry.name, entry.start) for entry in entries.values()] == [("ard_3", ""), ("ard_2", "ard_3")]
    assert [entry.config.distill.start for entry in entries.values()] == ["", "ard_3"]
    halves = [training_flops(entry.config) for entry in entries.values()]
    assert sum(halves) == pytest.approx(training_flops(config), rel=0.06) and halves[0] == pytest.approx(halves[1], 0.1)
    hidden = entries_of(config_with({"ard": {"steps": (3, 2, 1), "chain": True}}, steps=(2,)), training_flops, WORKDIR)
    assert [(entry.name, entry.shown) for entry in hidden.values()] == [("ard_3", False), ("ard_2", True)]


def test_a_method_starts_from_another_and_a_fine_tune_keeps_its_form():
    tuned = {"stage": "finetune", "start": "wide", "steps": (2,), "settings": {"finetune": {"steps": 7}}}
    wide = {"steps": (2,), "settings": {"student": {"mask": "window"}}}
    config = config_with({"after": {"start": "wide", "steps": (2,)}, "tuned": tuned, "wide": wide})
    config.finetune.update(steps=9, batch_size=8)
    entries = entries_of(config, training_flops, WORKDIR)
    assert list(entries) == ["wide_2", "after_2", "tuned_2"]
    assert entries["after_2"].config.distill.start == "wide_2" and entries["after_2"].config.student.mask == "causal"
    settings, student = entries["tuned_2"].config.finetune, entries["tuned_2"].config.student
    assert (settings.name, settings.start, settings.steps) == ("tuned_2", "wide_2", 7)
    assert student.to_dict() == entries["wide_2"].config.student.to_dict() | {"name": "tuned_2"}


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({}, "compare.methods is empty: name methods"),
        ({"ard": {"stpes": (2,)}}, "compare.methods.ard has 'stpes', which it cannot: it may have title, stage, steps"),
        ({"ard": {"steps": 2}}, "compare.methods.ard.steps is 2, which is no tuple"),
        ({"ard": 3}, "compare.methods.ard is 3: give a dict of title, stage"),
        ({"teacher": {}}, "compare.methods has 'teacher', which cannot name a folder"),
        ({"ard": {"stage": "sample"}}, "compare.methods.ard.stage is 'sample': choose distill or finetune."),
        ({"ard": {"settings_at": {"one": {}}}}, "compare.methods.ard: settings_at has 'one', a number of steps that"),
        ({"ard": {"steps": (4,)}}, "no method has any of the steps (1, 2, 3): change compare.steps."),
        (
            {"ard": {"settings": {"student": {"masc": "window"}}}},
            "compare.methods.ard: there is no setting 'student.masc': did you mean student.mask.",
        ),
        (
            {"ard": {"settings": {"distill": {"batch_size": "many"}}}},
            "compare.methods.ard: distill.batch_size is 'many', which is no int: give one.",
        ),
        (
            {"ard": {"settings": {"data": {"source": "tfds"}}}},
            "compare.methods.ard: data.source is the same for all methods: a method may change student, distill",
        ),
        ({"ard": {"settings": {"distill": {"steps": 3}}}}, "compare.methods.ard: distill.steps follows from"),
        (
            {"ard": {"settings": {"distill": {"objective": "my_own"}}}},
            "compare.methods.ard: distill.objective 'my_own' cannot be used (No module named 'my_own')",
        ),
        ({"ard": {"settings": {"student": {"mask": "all"}}}}, "compare.methods.ard: student.mask is 'all'"),
        (
            {"ard": {"settings": {"student": {"kind": "stochastic"}}}},
            "compare.methods.ard: student.kind is 'stochastic', but this objective trains history",
        ),
        (
            {"ard": {"steps": (2,)}, "next": {"start": "ard", "steps": (3,)}},
            "compare.methods.next: it starts from 'ard', which has no 3 steps",
        ),
        ({"ard": {"start": "nobody"}}, "compare.methods.ard starts from 'nobody', which is no method that can be"),
        ({"a": {"start": "b"}, "b": {"start": "a"}}, "compare.methods.a starts from 'b', which is no method"),
        ({"ard": {"stage": "finetune"}}, "compare.methods.ard: a fine-tune starts from a student"),
        (
            {"ard": {"settings": {"distill": {"batch_size": 10**6}}}},
            "compare.methods.ard: a step of it takes 7.48e+11 FLOPs, but its budget is 3.83e+08: lower",
        ),
        (
            {"ard": {"settings": {"distill": {"batch_size": 80, "optimizer": {"warmup_steps": 9}}}}},
            "compare.methods.ard: distill.optimizer.warmup_steps is 9 of 6 steps",
        ),
    ],
)
def test_methods_that_cannot_be_compared(methods, said, tmp_path):
    """They are refused before anything is made, by the command too."""
    with pytest.raises(UserError, match=re.escape(said)):
        entries_of(config_with(methods), training_flops, WORKDIR)


def test_the_command_refuses_before_anything_is_made(tmp_path):
    wrong = METHODS | {"worse": {"settings": {"student": {"masc": "window"}}}}
    said = sentence(compare(write_config(tmp_path, wrong), tmp_path / "run"), "compare")
    assert "compare.methods.worse: there is no setting 'student.masc'" in said
    said = sentence(
        compare(write_config(tmp_path, {"ard": {}}, "config.compare.points = ((0,),)"), tmp_path / "run"), "compare"
    )
    assert "compare.methods.ard: it has 2 steps, for which compare.points has no points" in said
    for changes, expected in (
        ("config.compare.seeds = (1, 1)", "compare.seeds is (1, 1): give different whole numbers"),
        ("config.compare.steps = (0,)", "compare.steps is (0,): give numbers of steps"),
        ("config.compare.quick = {}", "compare.quick is empty"),
        ("config.compare.quick = {'distill': {'stepz': 3}}", "compare.quick: there is no setting 'distill.stepz'"),
    ):
        file = write_config(tmp_path, METHODS, changes)
        assert expected in sentence(compare(file, tmp_path / "run", "--quick"), "compare")
    assert not (tmp_path / "run").exists()


def test_a_quick_run_may_make_a_method_smaller():
    quick = {"compare": {"methods": {"ard": {"steps": (1,)}}}}
    config = quick_config(config_with({"ard": ARD, "step": STEP}, quick=quick))
    assert list(entries_of(config, training_flops, WORKDIR)) == ["ard_1", "step_2"]
    wrong = {"compare": {"methods": {"ard": {"steps": 1}}}}
    with pytest.raises(UserError, match="compare.quick: compare.methods.ard.steps is 1, which is no tuple: give one."):
        quick_config(config_with({"ard": ARD}, quick=wrong))


def test_evaluate_draws_what_it_measures_where_it_draws():
    config = with_settings(config_with(METHODS), {"evaluate.draw": True})
    *others, last = jobs_of(entries_of(config, training_flops, WORKDIR).values())
    assert last.stage == "evaluate" and "sample" not in {job.stage for job in others}
    assert last.place.config.sample.models == last.models == ("teacher", "ard_3", "knowledge_1", "step_2")


def test_labels_may_be_changed_into_a_word():
    assert with_settings(smoke.get_config(), {"sample.labels": "balanced"}).sample.labels == "balanced"
    with pytest.raises(UserError, match="sample.count is 'x', which is no int"):
        with_settings(smoke.get_config(), {"sample.count": "x"})


def test_a_changed_config_is_a_copy():
    config = smoke.get_config()
    other = with_settings(config, {"student": {"mask": "window"}, "distill.steps": 3})
    assert (other.student.mask, other.distill.steps) == ("window", 3)
    assert (config.student.mask, config.distill.steps) == ("causal", 20)


def test_a_student_does_not_depend_on_the_options_of_another_objective(tmp_path):
    trained = {"distill": {"objective": "my.huber", "huber": {"width": 0.03}, "optimizer": {"clip": 1.0}}}
    changes = {"other": {"decay": 0.5}, "huber": {"width": 0.1}, "optimizer": {"clip": 2.0}}
    now = [{"distill": trained["distill"] | {name: change}} for name, change in changes.items()]
    workdir.check_same_config(trained, now[0], ("distill",), tmp_path)
    for config, said in zip(now[1:], ("huber.width 0.03 there, 0.1 here", "optimizer.clip 1.0 there"), strict=True):
        with pytest.raises(UserError, match=said):
            workdir.check_same_config(trained, config, ("distill",), tmp_path)


# ------------------------------------------------------------------------------------------ the objective of the docs


def blocks(language):
    """Code of docs/ADD_YOUR_OWN.md."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "ADD_YOUR_OWN.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """The page's two files in a folder that Python finds, over the smoke config in place of the digits."""
    folder = tmp_path_factory.mktemp("documented")
    for block in blocks("python"):
        name = block.split("\n")[0].removeprefix("# ")
        text = block.replace("from configs import compare_digits as base", "import small_base as base")
        (folder / name).write_text(text)
    write_config(folder, {"ard": ARD, "step": STEP})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in ("huber", "small_base"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def documented_run(documented):
    """The workdir of the page's commands."""
    assert [stage for stage, _ in commands()] == ["compare", "compare", "distill"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(documented)
        for stage, flags in commands():
            outcome = run(stage, *flags)
            assert outcome.status == 0, outcome.err
    return documented / "runs" / "mine"


def commands():
    lines = [line.split() for block in blocks("bash") for line in block.splitlines()]
    return [(words[3], words[4:]) for words in lines if words[:3] == ["python", "-m", "ard_jax"]]


def test_the_documented_loss_is_what_the_page_says(documented):
    import huber

    student = ard_student(
        channels=1, patch_size=2, hidden_size=8, num_heads=2, num_classes=3, depth=1, steps=2, history_layers=1
    )
    rng = np.random.default_rng(0)
    batch = {
        "noise": rng.normal(size=(5, 4, 4, 1)).astype(np.float32),
        "x0": rng.normal(size=(5, 3, 4, 4, 1)).astype(np.float32),
        "condition": rng.integers(0, 3, 5),
    }
    shapes = parameter_shapes(student, jnp.zeros((1, 2, 4, 4, 1)), jnp.zeros(1, jnp.int32))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    fields = dict.fromkeys(Given._fields) | {"student": student, "kind": "history", "shape": (4, 4, 1), "target": "x0"}
    method = huber.build(Given(**fields | {"columns": (0, 2), "options": {"width": 0.03}}))
    loss, metrics = method.objective(params, None, batch, None)
    points = batch["x0"][:, [0, 2]]
    inputs = np.stack([batch["noise"], points[:, 0]], axis=1)
    errors = np.asarray(student.apply({"params": params}, inputs, batch["condition"]), np.float64) - points
    expected = (np.sqrt((errors**2).mean(axis=(2, 3, 4)) + 0.03**2) - 0.03).mean(axis=0)
    np.testing.assert_allclose([metrics["loss_step_1"], metrics["loss_step_2"]], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    with pytest.raises(UserError, match="huber learns from a trajectory store"):
        huber.build(Given(**fields))


@pytest.mark.slow
def test_the_documented_objective_beside_others(documented_run):
    """The numbers of compare.json are those of the stages, of a quick run too."""
    names = ["teacher", "ard_3", "huber_2", "step_2"]
    quick = documented_run / "quick"
    check_comparison(documented_run, names)
    check_comparison(quick, names)
    steps = [done(where / "seed0" / "distill" / "ard_3")["step"] for where in (documented_run, quick)]
    assert steps == [20, 5]
    assert read_json(quick / "compare" / "compare.json")["quick"] == {"distill.steps": 5}
    models = done(documented_run / "seed0" / "distill")["models"]
    assert models["huber"]["step"] == 20 and len({model["sha256"]["ema"] for model in models.values()}) == 4
    recorded = read_json(documented_run / "seed0" / "distill" / "huber_2" / "config.json")["distill"]
    assert recorded["objective"] == "huber" and recorded["huber"] == {"width": 0.03}


@pytest.mark.slow
def test_nothing_is_made_twice(documented_run, documented):
    before = stamps(documented_run)
    outcome = compare(documented / "my_digits.py", documented_run)
    assert outcome.status == 0, outcome.err
    after = stamps(documented_run)
    assert {name for name in after if after[name] != before.get(name)} == {
        f"compare/{name}" for name in ("compare.json", "done.json", "index.html", "table.md")
    }


def stamps(folder):
    return {name: (folder / name).stat().st_mtime_ns for name in files(folder) if "compile_cache" not in name}


def check_comparison(workdir, names):
    """compare.json of one seed against results.json and done.json of the stages; table and page against it."""
    comparison = read_json(workdir / "compare" / "compare.json")
    results = read_json(workdir / "seed0" / "evaluate" / "results.json")
    assert sorted(row["name"] for row in comparison["rows"]) == sorted(names)
    for row in comparison["rows"]:
        model, values = results["models"][row["name"]], row["by_seed"]["0"]
        folder = workdir / "seed0" / ("teacher" if row["name"] == "teacher" else f"distill/{row['name']}")
        made = done(folder)
        for key in ("fd", "precision", "recall", "network_calls", "gmac_per_image"):
            assert values[key] == model[key] == row["mean"][key] == row["least"][key] == row["greatest"][key]
        assert values["psnr"] == model.get("psnr")
        for key in ("examples", "flops", "seconds"):
            assert values[f"training_{key}"] == made[key]
        config = read_json(folder / "config.json")
        section = config["teacher" if row["name"] == "teacher" else "distill"]
        assert made["examples"] == section["steps"] * section["batch_size"] and made["step"] == section["steps"]
        if row["kind"] == "student":
            assert values["training_flops"] == pytest.approx(comparison["budget"], rel=0.6 / section["steps"])
            assert row["steps"] == len(config["student"]["points"]) == model["steps"]
    page = Page((workdir / "compare" / "index.html").read_text())
    shown = {row[0] for row in page.rows if row}
    assert {row["title"] for row in comparison["rows"]} <= shown
    assert (
        f"| Teacher | 5 | {results['models']['teacher']['fd']:.2f} |" in (workdir / "compare" / "table.md").read_text()
    )
    hashes = done(workdir / "compare")["sha256"]
    assert hashes == {
        name: file_sha256(workdir / "compare" / name) for name in ("compare.json", "table.md", "index.html")
    }


# -------------------------------------------------------------------------------------------------- interruptions


def started(file, workdir):
    command = [sys.executable, "-m", "ard_jax", "compare", "--config", file, "--workdir", workdir]
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_a_killed_comparison_is_completed_and_ends_like_another(pipeline, documented_run, tmp_path):
    """Two seeds, the first with a teacher and a store that are there; killed once a student is done."""
    file = write_config(tmp_path, {"ard": ARD, "step": STEP}, "config.compare.seeds = (0, 1)")
    workdir = tmp_path / "run"
    copy(pipeline, workdir / "seed0", "teacher", "trajectories")
    there = stamps(workdir)
    running = started(file, workdir)
    first = workdir / "seed0" / "distill" / "ard_3" / "done.json"
    while running.poll() is None and not first.exists():
        time.sleep(0.01)
    running.kill()
    running.communicate()
    assert running.returncode == -signal.SIGKILL and not (workdir / "compare").exists()
    there |= {name: stamp for name, stamp in stamps(workdir).items() if "distill/ard_3/" in name}
    outcome = compare(file, workdir)
    assert outcome.status == 0, outcome.err
    after = stamps(workdir)
    assert {name: after[name] for name in there} == there
    rows = read_json(workdir / "compare" / "compare.json")["rows"]
    assert [row["name"] for row in rows] == ["teacher", "ard_3", "step_2"]
    others = {row["name"]: row for row in read_json(documented_run / "compare" / "compare.json")["rows"]}
    for row in rows:
        first, second = row["by_seed"]["0"], row["by_seed"]["1"]
        for key in ("fd", "precision", "recall", "psnr", "training_flops"):
            assert first[key] == others[row["name"]]["by_seed"]["0"][key]
        fds = first["fd"], second["fd"]
        assert (row["least"]["fd"], row["greatest"]["fd"]) == (min(fds), max(fds)) and fds[0] != fds[1]
        assert row["mean"]["fd"] == pytest.approx(np.mean(fds))


@pytest.mark.slow
def test_other_samples_are_drawn_and_measured_anew_and_no_student_is_trained_again(documented_run, tmp_path):
    workdir = copy(documented_run, tmp_path / "run", "seed0", "compare")
    before = read_json(workdir / "compare" / "compare.json")
    trained = {name: stamp for name, stamp in stamps(workdir).items() if "/distill/" in name}
    methods = {"ard": ARD}  # others that are there have fewer samples, which is no matter
    file = write_config(tmp_path, methods, "config.sample.count = 66")
    said = sentence(compare(file, workdir), "compare")
    assert "sample/teacher holds samples of other settings (sample.count 72 there, 66 here)" in said
    (workdir / "seed0" / "sample").rename(tmp_path / "kept")  # as it says
    outcome = compare(file, workdir)
    assert outcome.status == 0, outcome.err
    after = read_json(workdir / "compare" / "compare.json")
    assert (before["samples"], after["samples"]) == (72, 66)
    assert [row["name"] for row in after["rows"]] == ["teacher", "ard_3"]
    assert all(
        now["mean"]["fd"] != then["mean"]["fd"] for now, then in zip(after["rows"], before["rows"], strict=False)
    )
    assert {name: stamp for name, stamp in stamps(workdir).items() if "/distill/" in name} == trained

    # another training: the folder belongs to the old one
    file = write_config(tmp_path, methods, "config.distill.optimizer.clip = 2.0")
    said = sentence(compare(file, workdir), "compare")
    assert "distill/ard_3 belongs to another config (distill.optimizer.clip 1.0 there, 2.0 here)" in said
    assert {name: stamp for name, stamp in stamps(workdir).items() if "/distill/" in name} == trained


@pytest.mark.slow
def test_a_fine_tune_stands_on_its_student_and_is_not_made_twice(documented_run, tmp_path):
    """Its training is counted with that of the student that it starts from."""
    workdir = copy(documented_run, tmp_path / "run", "seed0")
    tuned = {"stage": "finetune", "start": "ard", "steps": (3,), "settings": {"finetune": {"steps": 6}}}
    file = write_config(tmp_path, {"ard": ARD, "tuned": tuned})
    made = []
    for _ in range(2):
        outcome = compare(file, workdir)
        assert outcome.status == 0, outcome.err
        made.append(stamps(workdir)["seed0/distill/tuned_3/done.json"])
        before, start = done(workdir / "seed0" / "distill" / "tuned_3"), done(workdir / "seed0" / "distill" / "ard_3")
        rows = {row["name"]: row["mean"] for row in read_json(workdir / "compare" / "compare.json")["rows"]}
        assert list(rows) == ["teacher", "ard_3", "tuned_3"]
        assert rows["ard_3"]["training_flops"] == start["flops"]
        for key in ("examples", "flops", "seconds"):
            assert rows["tuned_3"][f"training_{key}"] == pytest.approx(start[key] + before[key])
        assert before["step"] == 6 and before["sha256"] != start["sha256"]
    assert made[0] == made[1]


# ----------------------------------------------------------------------------------------------------------- page


def values(fd, **more):
    measured = {"precision": 0.9, "recall": 0.7244, "psnr": 26.14, "network_calls": 4, "gmac_per_image": 0.0291}
    measured |= {"seconds_per_image": 1e-4, "training_examples": 38400, "training_flops": 6.7e12}
    return measured | {"training_seconds": 80.4, "fd": fd} | more


def row(name, title, steps, fds, kind="student", **more):
    by_seed = {str(seed): values(fd, **more) for seed, fd in enumerate(fds)}
    named = {"name": name, "kind": kind, "method": name.split("_")[0], "title": title, "steps": steps}
    over = {
        key: values(fd, **more) for key, fd in (("mean", np.mean(fds)), ("least", min(fds)), ("greatest", max(fds)))
    }
    return named | {"training_steps": 1200, "batch_size": 32, "by_seed": by_seed} | over


@pytest.fixture
def comparison():
    return {
        "quick": {},
        "seeds": [0, 1],
        "features": ["features of a small classifier; not comparable with ImageNet FID"] * 2,
        "samples": 3072,
        "real_images": 1797,
        "budget": 6.7e12,
        "rows": [
            row("teacher", "Teacher", 25, [7.0, 7.5], kind="teacher", psnr=None, network_calls=50),
            row("step_4", "Step distillation", 4, [15.6, 16.8]),
            row("ard_4", "ARD", 4, [8.36, 8.8]),
            row("one_1", "<b>One</b>", 1, [30.0, 31.0], recall=float("nan")),
        ],
        "config": {"seed": 0, "data": "<digits>"},
    }


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    drawn = {
        name: rng.integers(0, 256, (3, 2, 8, 8, 1), dtype=np.uint8) for name in ("teacher", "step_4", "ard_4", "one_1")
    }
    return drawn | {"label": np.arange(3)}


def test_the_page_ranks_models_and_shows_the_spread(comparison, pictures):
    page = Page(build_comparison("Digits", comparison, pictures))
    heads = [found[0] for found in page.rows]
    assert heads == ["Method", "Teacher", "<b>One</b>", "ARD", "Step distillation"]
    assert page.row("ARD") == [
        "ARD", "4", "8.58\n8.36–8.80", "0.900", "0.724", "26.1", "4", "0.0291", "38,400", "6.70", "1 min 20 s"
    ]  # fmt: skip
    assert page.row("<b>One</b>")[4] == "not a number" and page.row("Teacher")[5] == "–"
    assert "Nearest to the data: <b>One</b> in 1 step, ARD in 4 steps." in page.text["top"]
    assert "It ranks the models of this page and nothing else" in page.text["top"]
    assert "not measured here" in page.text["top"] and "ARD with a discriminator 1.84" in page.text["top"]
    assert "ARD (4): 1,200 × 32" in page.text["made"] and '"data": "<digits>"' in page.text["made"]
    assert "Teacher in 25 steps" in page.text["steps"] and "PSNR to the teacher" in page.text["steps"]
    assert [name for name in page.text if name != "top"] == ["measurements", "steps", "pictures", "made"]
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    alts = [image["alt"] for image in page.images]
    assert len(alts) == 3 * (2 + 3) and alts[3] == "<b>One</b>, sample 1" and alts[-1] == "Step distillation, sample 3"


def test_a_page_of_too_few_images_for_a_distance(comparison, pictures):
    for row_ in comparison["rows"]:
        for measured in (row_["mean"], row_["least"], row_["greatest"], *row_["by_seed"].values()):
            measured["fd"] = None
    page = Page(build_comparison("Digits", comparison, pictures))
    assert page.row("ARD")[2] == "–" and "PSNR to the teacher" in page.text["steps"]


def test_intervals_and_halves_stand_in_the_table(comparison):
    for row_ in comparison["rows"]:
        row_["mean"]["fd_interval"], row_["mean"]["fd_halves"] = [7.0, 9.5], 0.75
        row_["least"]["fd_interval"] = row_["greatest"]["fd_interval"] = [7.0, 9.5]
    comparison["halves"] = {"fd": 0.25}
    lines = markdown(comparison).splitlines()
    assert lines[0].startswith("| Method | Steps | FD ↓ | 95 % interval | Precision ↑ |")
    assert lines[4].startswith("| ARD | 4 | 8.58 (8.36–8.80) | 7.00–9.50 | 0.900 |")
    assert lines[6].startswith("| Two halves of the real images | – | 0.250 | – |")
    assert lines[7].startswith("| Two halves of the teacher’s samples | – | 0.750 | – |")
    assert "by bootstrap" in lines[-3] + lines[-5] + lines[-7]


def test_degradations_and_captions_stand_in_the_table_where_they_were_measured(comparison):
    for row_ in comparison["rows"][1:]:
        for kind, value in (("mean", 0.5), ("least", -0.25), ("greatest", 0.75)):
            row_[kind] |= {"degradation": value, "degradation_interval": [-0.125, 0.5]}
            row_[kind]["recall_at_5"] = {"trained": 0.5, "held_out": 1.0}
    lines = markdown(comparison).splitlines()
    assert lines[0].startswith("| Method | Steps | FD ↓ | Degradation ↓ | its 95 % interval | Precision ↑ |")
    assert "| PSNR to teacher, dB ↑ | Caption in first 5, trained / held out ↑ | Network calls |" in lines[0]
    assert lines[2].startswith("| Teacher | 25 | 7.25 (7.00–7.50) | – | – | 0.900 | 0.724 | – | – | 50 |")
    assert lines[4].startswith("| ARD | 4 | 8.58 (8.36–8.80) | 0.500 (−0.250 to 0.750) | −0.125 to 0.500 | 0.900 |")
    assert "| 26.1 | 50 % / 100 % | 4 |" in lines[4]
    assert "in pairs of the same noise" in markdown(comparison)


def test_measurements_over_seeds_keep_an_interval_s_ends_and_the_kinds_of_captions_apart():
    found = [
        {"fd": 1.0, "fd_interval": (0.5, 2.0), "psnr": None, "recall_at_5": {"trained": 0.5, "held_out": 0.75}},
        {"fd": 2.0, "fd_interval": (1.5, 3.0), "psnr": 1.0, "recall_at_5": {"trained": 0.75, "held_out": 0.25}},
    ]
    recall = {"trained": 0.625, "held_out": 0.5}
    assert _over_seeds(found, np.mean) == {"fd": 1.5, "fd_interval": (1.0, 2.5), "psnr": None, "recall_at_5": recall}
    assert _over_seeds(found, np.min)["fd_interval"] == (0.5, 2.0)
    assert _over_seeds(found, np.max)["recall_at_5"] == {"trained": 0.75, "held_out": 0.75}


def test_the_title_of_the_page_is_escaped(comparison, pictures):
    html = build_comparison('<b>&"x"</b>', comparison, pictures)
    assert "<h1>&lt;b&gt;&amp;&#34;x&#34;&lt;/b&gt;</h1>" in html and '<b>&"x"</b>' not in html


def test_the_page_says_what_a_quick_run_is(comparison, pictures):
    assert "quick" not in build_comparison("Digits", comparison, pictures)
    comparison |= {"quick": {"distill.steps": 120}, "seeds": [0]}
    page = Page(build_comparison("Digits", comparison, pictures))
    assert (
        "A quick run, which trains and measures too little to rank methods by: distill.steps 120." in page.text["top"]
    )
    assert "a quick look." in page.text["top"] and "Nearest" not in page.text["top"]
    assert "One seed, 0" in page.text["top"]


def test_the_page_names_students_that_are_worse_than_what_they_start_from(comparison, pictures):
    """Of as many steps: a chain's students have fewer than those that they start from."""

    def said():
        return Page(build_comparison("Digits", comparison, pictures)).text["top"]

    comparison["rows"] = [row | {"start": ""} for row in comparison["rows"]]
    assert "Farther from the real images" not in said()
    step, ard = (next(row for row in comparison["rows"] if row["name"] == name) for name in ("step_4", "ard_4"))
    ard["start"] = "step_4"  # which is worse, so that it has become better
    assert ard["mean"]["fd"] < step["mean"]["fd"] and "Farther from the real images" not in said()
    ard["start"], step["start"] = "", "ard_4"
    mean = words.number(step["mean"]["fd"])
    assert f"Step distillation in 4 steps ({mean}, from 8.58 of ARD)." in said()
    assert f"Step distillation in 4 steps ({mean}, from 8.58 of ARD)." in markdown(comparison)
    ard["steps"] = 8
    assert "Farther from the real images" not in said()


def test_the_table_is_markdown(comparison):
    comparison["rows"][1]["title"] = "Step | by | step"
    lines = markdown(comparison).splitlines()
    assert lines[5].startswith("| Step \\| by \\| step | 4 |")
    lines[5] = lines[5].replace("\\|", "")
    assert lines[0].startswith("| Method | Steps | FD ↓ | Precision ↑ |") and lines[1].startswith("| --- | ---: |")
    assert lines[4] == (
        "| ARD | 4 | 8.58 (8.36–8.80) | 0.900 | 0.724 | 26.1 | 4 | 0.0291 | 38,400 | 6.70 | 1 min 20 s |"
    )
    assert all(line.count("|") == 12 for line in lines[:6]) and "3,072 samples" in lines[7]
