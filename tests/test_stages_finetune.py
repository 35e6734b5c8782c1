"""The fine-tune stage on configs/smoke.py: what it leaves, that it resumes, and what it refuses."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from pipeline_fixtures import copy, done, finish, process, sentence, smoke

from ard_jax.data import check_real
from ard_jax.errors import UserError
from ard_jax.files import read_json
from ard_jax.parallel import make_mesh
from ard_jax.training import checkpoints, loop
from ard_jax.workdir import load_student
from configs import smoke as smoke_config

INPUTS = ("teacher", "trajectories", "distill")


@pytest.fixture(scope="module")
def finetuned(pipeline, tmp_path_factory):
    """The workdir of a fine-tune that was not interrupted; not to be written to."""
    workdir = copy(pipeline, tmp_path_factory.mktemp("finetuned"), *INPUTS)
    outcome = smoke("finetune", workdir)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[0] == f"done: {workdir / 'distill' / 'ard_adversarial'}"
    return workdir


def lines(workdir):
    path = workdir / "distill" / "ard_adversarial" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved(workdir, step):
    """Other networks, memory and optimiser's state of a checkpoint, as arrays."""
    with checkpoints.make_manager(workdir / "distill" / "ard_adversarial" / "checkpoints", 2) as manager:
        part = checkpoints.ocp.args.Composite(optimizer=checkpoints.ocp.args.StandardRestore())
        return jax.tree.map(np.asarray, manager.restore(step, args=part)["optimizer"])


def test_it_leaves_a_student_like_any_other(finetuned, pipeline):
    assert set(done(finetuned / "distill")["models"]) == {"ard", "ard_adversarial"}
    before, _, sha256, _ = load_student(finetuned / "distill" / "ard", make_mesh())
    model, _, _, config = load_student(finetuned / "distill" / "ard_adversarial", make_mesh())
    assert model == before
    assert config.student.name == "ard_adversarial" and config.distill.objective == "adversarial"
    inputs = read_json(finetuned / "distill" / "ard_adversarial" / "config.json")["inputs"]
    assert inputs["start"] == sha256 and inputs["teacher"] == done(pipeline / "teacher")["sha256"]["ema"]
    assert done(finetuned / "teacher") == done(pipeline / "teacher")  # whose weights it has not touched
    assert load_student(pipeline / "distill" / "ard", make_mesh())[2] == sha256


def test_the_weight_is_nothing_until_the_warm_up_is_over(finetuned):
    logged = lines(finetuned)
    assert [line["step"] for line in logged] == [5, 10, 15, 20]  # means of five steps, the warm-up's first
    assert logged[0]["adaptive_weight"] == 0 and all(line["adaptive_weight"] > 0 for line in logged[1:])
    assert all(0 <= line[name] <= 1 for line in logged for name in ("right_real", "right_fake"))
    assert logged[-1]["loss_discriminator"] < logged[0]["loss_discriminator"]


def test_every_parameter_of_the_discriminator_moves_and_is_saved(finetuned):
    early, late = (saved(finetuned, step) for step in (15, 20))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), early["others"], late["others"])
    assert set(moved) == {"discriminator"} and min(jax.tree.leaves(moved)) > 0
    vectors = jax.tree.map(lambda a, b: np.abs(a - b).max(), early["memory"], late["memory"])
    assert len(jax.tree.leaves(vectors)) == 6 and min(jax.tree.leaves(vectors)) > 0
    lengths = jax.tree.map(lambda vector: np.linalg.norm(vector, axis=-1), late["memory"])
    jax.tree.map(lambda length: np.testing.assert_allclose(length, 1, rtol=1e-5), lengths)


@pytest.mark.parametrize("step", [4, 13])  # before there is a checkpoint, and between two
def test_a_run_that_was_killed_ends_like_one_that_was_not(finetuned, pipeline, tmp_path, monkeypatch, step):
    workdir = copy(pipeline, tmp_path, *INPUTS)
    put = loop.put_batch

    def put_batch(batch, mesh):
        assert set(batch) == {"trajectory", "real"}
        if batch["real"]["position"][0] == (step - 1) * 8:
            raise KeyboardInterrupt
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put_batch)
    assert smoke("finetune", workdir).status == 130
    monkeypatch.setattr(loop, "put_batch", put)
    resumed = smoke("finetune", workdir)
    assert resumed.status == 0 and ("resuming at step 10 of 20." in resumed.err) == (step == 13)
    assert done(workdir / "distill")["sha256"] == done(finetuned / "distill")["sha256"]
    jax.tree.map(np.testing.assert_array_equal, saved(workdir, 20), saved(finetuned, 20))


def test_it_is_sampled_and_evaluated_as_any_other(finetuned, tmp_path):
    workdir = copy(finetuned, tmp_path, *INPUTS)
    models = "sample.models=('teacher','ard','ard_adversarial')"
    for stage in ("sample", "evaluate"):
        outcome = smoke(stage, workdir, models)
        assert outcome.status == 0, outcome.err
    results = read_json(workdir / "evaluate" / "results.json")["models"]
    assert results["ard_adversarial"]["objective"] == "adversarial" and results["ard"]["objective"] == "ard"
    assert results["ard_adversarial"]["network_calls"] == 3
    assert results["ard_adversarial"]["mse_per_step"] != results["ard"]["mse_per_step"]


def test_some_layers_and_a_student_by_name(finetuned, pipeline, tmp_path):
    """It starts from the named student and has that one's form, whatever the config says of students."""
    workdir = copy(finetuned, tmp_path, *INPUTS)
    overrides = ["finetune.start=ard", "finetune.name=few", "finetune.layers=(1,)", "finetune.steps=6"]
    outcome = smoke("finetune", workdir, *overrides, "student.name=other", "student.mask=window")
    assert outcome.status == 0, outcome.err
    model, _, _, config = load_student(workdir / "distill" / "few", make_mesh())
    assert model.mask == "causal" and config.student.points == (3, 1, 0)
    with checkpoints.make_manager(workdir / "distill" / "few" / "checkpoints", 2) as manager:
        part = checkpoints.ocp.args.Composite(optimizer=checkpoints.ocp.args.StandardRestore())
        heads = manager.restore(6, args=part)["optimizer"]["others"]["discriminator"]["heads"]
    assert heads["pointwise"]["kernel"].shape == (1, 16, 16)


@pytest.mark.slow
def test_four_devices_compute_what_one_does(finetuned, pipeline, tmp_path):
    """The batch norm's groups and the adaptive weight are of the whole batch, however many devices share it."""
    workdir = copy(pipeline, tmp_path, *INPUTS)
    four = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    outcome = finish(process("finetune", workdir, XLA_FLAGS=four))
    assert outcome.status == 0, outcome.err
    for name in ("loss", "adaptive_weight", "loss_discriminator"):
        there, here = ([line[name] for line in lines(root)] for root in (finetuned, workdir))
        np.testing.assert_allclose(here, there, rtol=2e-2)


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("finetune.accumulate=2", "finetune.accumulate is 2, but the discriminator's batch norm"),
        ("finetune.layers=(0,2)", "finetune.layers is (0, 2), but the teacher has 2 blocks: give different numbers"),
        ("finetune.layers=(1,1)", "finetune.layers is (1, 1), but the teacher has 2 blocks"),
        ("finetune.name=ard", "finetune.name is 'ard', which must name a student's folder"),
        ("finetune.name=teacher", "finetune.name is 'teacher', which must name"),
        ("finetune.start=ard_adversarial", "another name than that of the student that it starts from"),
        ("finetune.warmup=-1", "finetune.warmup is"),
        ("finetune.feature_time=1.5", "finetune.feature_time is"),
        ("finetune.spectral_rounds=0", "finetune.spectral_rounds is"),
        ("finetune.discriminator_optimizer.name=adamm", "finetune.discriminator_optimizer.name is"),
        ("finetune.start=nobody", "distill/nobody has no done.json: run the stage 'distill' to its end first"),
    ],
)
def test_bad_settings_are_refused(pipeline, tmp_path, override, said):
    workdir = copy(pipeline, tmp_path, *INPUTS)
    assert said in sentence(smoke("finetune", workdir, override), "finetune")
    assert sorted(path.name for path in (workdir / "distill").iterdir()) == ["ard", "done.json"]


class Images:
    """Real data of a given shape and scale."""

    def __init__(self, shape=(8, 8, 1), scale=0.7):
        self.shape, self.scale = shape, scale

    def __len__(self):
        return 5

    def __getitem__(self, row):
        image = np.random.default_rng(row).normal(size=self.shape) * self.scale
        return {"image": image.astype(np.float32), "label": np.int32(0)}


class Trajectories(Images):
    def __getitem__(self, row):
        return {"x0": super().__getitem__(row)["image"][None], "label": np.int64(row)}


@pytest.mark.parametrize(
    ("real", "trajectories", "said"),
    [
        (Images((4, 4, 1)), Trajectories(), "the real data are (4, 4, 1) and the store's trajectories (8, 8, 1)"),
        (Images(scale=5.0), Trajectories(), "so they are not of one scale: use the data that the teacher was"),
        (Images(scale=np.nan), Trajectories(), "so they are not of one scale"),
        (Images(), Trajectories(), "the store has the label 4, but data.num_classes is 3"),
    ],
)
def test_real_data_that_do_not_fit_are_refused(real, trajectories, said):
    config = smoke_config.get_config()
    if "label" in said:
        config.data.num_classes = 3
    with pytest.raises(UserError) as error:
        check_real(real, trajectories, config)
    assert said in str(error.value)


@pytest.mark.parametrize(("scale", "warned"), [(0.1, True), (0.4, False)])
def test_a_teacher_out_of_scale_is_warned_of(caplog, scale, warned):
    """An untrained one puts out large numbers, so that is no error."""
    check_real(Images(scale=scale), Trajectories(), smoke_config.get_config())
    assert ("if the teacher is good, they are not of one scale" in caplog.text) == warned


def test_another_config_is_refused(finetuned, tmp_path):
    workdir = copy(finetuned, tmp_path, *INPUTS)
    outcome = smoke("finetune", workdir, "finetune.warmup=6")
    assert outcome.status == 2 and "finetune.warmup 5 there, 6 here" in outcome.err.splitlines()[-1]
    shutil.rmtree(workdir / "trajectories")
    said = sentence(smoke("finetune", workdir), "finetune")
    assert "there is no whole trajectory store" in said


def test_a_loss_that_is_not_finite_stops_the_run(finetuned, pipeline, tmp_path, monkeypatch):
    """The discriminator's is a metric as any other, and the last good checkpoint stays."""
    workdir = copy(pipeline, tmp_path, *INPUTS)
    put = loop.put_batch

    def put_batch(batch, mesh):
        if batch["real"]["position"][0] == 7 * 8:
            batch["real"]["image"] = np.full_like(batch["real"]["image"], np.inf)
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put_batch)
    outcome = smoke("finetune", workdir)
    assert outcome.status == 2 and "loss_discriminator is nan at step 8, so the run stopped" in outcome.err
    folder = workdir / "distill" / "ard_adversarial"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["5"] and not (folder / "done.json").exists()
    monkeypatch.setattr(loop, "put_batch", put)
    assert smoke("finetune", workdir).status == 0
    assert done(workdir / "distill")["sha256"] == done(finetuned / "distill")["sha256"]
