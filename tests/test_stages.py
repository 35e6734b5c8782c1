"""The whole pipeline on configs/smoke.py: what every stage leaves behind, and that its numbers are what they say."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import draw_noise_and_labels
from PIL import Image
from pipeline_fixtures import STAGES, copy, done, files, sentence, smoke

from ard_jax import drawing
from ard_jax.build import make_solve, make_student, make_teacher
from ard_jax.completion import is_complete
from ard_jax.conditions import Labels
from ard_jax.data import image_source, labels_and_images, to_uint8
from ard_jax.data.stream import stream
from ard_jax.diffusion.solvers import Solution
from ard_jax.drawing import to_levels
from ard_jax.errors import UserError
from ard_jax.evaluation import feature_statistics, frechet_distance, precision_recall, train_feature_net
from ard_jax.files import file_sha256, join_npz, read_json, read_npz, tree_sha256, write_json, write_npz
from ard_jax.models import init_from_teacher
from ard_jax.objectives.ard import ard, online_ard, teacher_forcing
from ard_jax.parallel import make_mesh
from ard_jax.results import read_results
from ard_jax.sampled import are_drawn
from ard_jax.sampling import sample_student, sample_teacher, sampling_key
from ard_jax.stages import sample
from ard_jax.training.checkpoints import load_parameters
from ard_jax.trajectories import store
from ard_jax.workdir import load_student, load_teacher
from configs import smoke as smoke_config

CONFIG = smoke_config.get_config()
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def teacher(pipeline):
    """(model, averaged parameters)."""
    return load_teacher(CONFIG, pipeline, make_mesh())[:2]


@pytest.fixture(scope="module")
def student(pipeline):
    return load_student(pipeline / "distill" / "ard", make_mesh())[:2]


@pytest.fixture(scope="module")
def trajectories(pipeline):
    """The store's records by index, as arrays (record, …)."""
    source = store.Store(pipeline / "trajectories", store.read_manifest(pipeline / "trajectories"))
    rows = sorted((source[row] for row in range(len(source))), key=lambda record: record["index"])
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------- what stages leave


def test_every_stage_ends_by_saying_where_its_results_lie(pipeline):
    for stage in STAGES:
        log = (pipeline / f"{stage}.log").read_text()
        assert log.endswith(f"done: {pipeline / stage}\n") and "Traceback" not in log
        assert (pipeline / stage / "done.json").exists()
    assert not [name for name in files(pipeline) if ".partial" in name or "orbax-checkpoint-tmp" in name]
    assert read_json(pipeline / "teacher" / "labels.json") == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("folder", ["teacher", "distill/ard"])
def test_done_names_the_hashes_of_the_parameters(pipeline, folder, teacher, student):
    params, _ = (teacher if folder == "teacher" else student)[1], None
    hashes = done(pipeline / folder)["sha256"]
    assert hashes["ema"] == tree_sha256(params)
    raw = load_parameters(pipeline / folder / "checkpoints", "params", params)
    assert hashes["params"] == tree_sha256(raw) != hashes["ema"]
    assert done(pipeline / folder)["step"] == 20


def test_done_of_distill_lists_every_student(pipeline):
    whole, one = done(pipeline / "distill"), done(pipeline / "distill" / "ard")
    assert whole["sha256"] == {f"ard/{name}": sha for name, sha in one["sha256"].items()}
    assert whole["models"]["ard"]["step"] == 20 and whole["seconds"] == one["seconds"] > 0


@pytest.mark.parametrize("stage", ["trajectories", "sample", "evaluate", "report"])
def test_done_names_the_hashes_of_the_files(pipeline, stage):
    folder = pipeline / stage / "1.0.0" if stage == "trajectories" else pipeline / stage
    hashes = done(pipeline / stage)["sha256"]
    expected = {
        "trajectories": [f"trajectories-train.array_record-0000{shard}-of-00003" for shard in range(3)],
        "sample": [f"{name}/{file}" for name in ("ard", "teacher") for file in ("grid.png", "samples.npz")],
        "evaluate": ["edits.npz", "pictures.npz", "results.json"],
        "report": ["index.html", "results.json", "teaser.png"],
    }
    assert sorted(hashes) == expected[stage]
    assert hashes == {file: file_sha256(folder / file) for file in hashes}


@pytest.mark.parametrize("folder", ["teacher", "trajectories", "distill/ard", "sample/ard", "sample/teacher"])
def test_the_resolved_config_lies_beside_what_it_made(pipeline, folder):
    config = read_json(pipeline / folder / "config.json")
    inputs = config.pop("inputs")
    assert config == json.loads(json.dumps(CONFIG.to_dict()))
    made_by = {"sample/ard": ("ema", "distill/ard"), "sample/teacher": ("ema", "teacher")}
    if folder != "teacher":
        name, source = made_by.get(folder, ("teacher", "teacher"))
        assert inputs[name] == done(pipeline / source)["sha256"]["ema"]


def test_the_log_shows_config_parameters_and_speed(pipeline):
    log = (pipeline / "teacher.log").read_text()
    said = log.partition("besides the defaults")[2].partition("\n")[2].partition("\n0")[0].splitlines()
    of_optimizer = {f"  teacher.optimizer.{setting}" for setting in ("learning_rate=0.002", "schedule='cosine'")}
    assert of_optimizer | {"  model.depth=2", "  model.learn_sigma=False"} <= set(said)
    assert not {"  teacher.optimizer.name='adamw'", "  distill.batch_size=8"} & set(said)  # the default, and not asked
    assert "blocks/qkv/kernel" in log and "(2, 16, 48)" in log and "Total: 14,948" in log
    assert all(word in log for word in ("step 20/20", "steps_per_s", "samples_per_s", "utilisation"))
    log = (pipeline / "trajectories.log").read_text()
    assert "shard 3 of 3 written" in log and "trajectories/s" in log and "24 trajectories kept, 0 dropped." in log


@pytest.mark.parametrize(
    ("folder", "own"), [("teacher", set()), ("distill/ard", {"loss_step_1", "loss_step_2", "loss_step_3"})]
)
def test_metrics_are_logged(pipeline, folder, own):
    logged = lines(pipeline / folder)
    assert [line["step"] for line in logged] == [5, 10, 15, 20]
    fields = {"step", "loss", "gradient_norm", "parameter_norm"} | own
    fields |= {"steps_per_s", "samples_per_s", "utilisation", "input_wait"}
    assert all(set(line) == fields for line in logged)
    if own:
        for line in logged:
            assert line["loss"] == pytest.approx(np.mean([line[name] for name in own]), rel=1e-5)


def test_the_teacher_learns(pipeline):
    losses = [line["loss"] for line in lines(pipeline / "teacher")]
    assert losses[-1] < 0.9 * losses[0]


# ----------------------------------------------------------------------------------------------------- sampling


def test_samples_are_pictures(pipeline):
    for name in ("teacher", "ard"):
        with np.load(pipeline / "sample" / name / "samples.npz", allow_pickle=False) as file:
            images, labels = file["arr_0"], file["labels"]
        assert images.shape == (72, 8, 8, 1) and images.dtype == np.uint8 and len(np.unique(images)) > 2
        assert labels.shape == (72,) and set(labels) == set(range(10))
        grid = np.asarray(Image.open(pipeline / "sample" / name / "grid.png"))
        assert grid.shape == (4 * 64 + 3 * 2, 4 * 64 + 3 * 2)  # 16 pictures, enlarged 8 times, gutters of 2
        for row, column in ((0, 0), (1, 2), (3, 3)):  # picture 4·row + column, enlarged by whole pixels
            top, left = row * 66, column * 66
            shown = grid[top : top + 64 : 8, left : left + 64 : 8]
            np.testing.assert_array_equal(shown, images[4 * row + column, ..., 0])


def test_teacher_and_student_start_from_the_same_noise_and_label(pipeline, teacher, student):
    """Image i is what the samplers give for noise and label i of the sampling seed, in every batch."""
    noise, label = draw_noise_and_labels(sampling_key(1), np.arange(72), SHAPE, 10)
    expected = {
        "teacher": jax.jit(lambda: sample_teacher(*teacher, noise, label, make_solve(CONFIG)).xt[:, -1])(),
        "ard": jax.jit(lambda: sample_student(*student, noise, label)[:, -1])(),
    }
    for name, images in expected.items():
        with np.load(pipeline / "sample" / name / "samples.npz") as file:
            np.testing.assert_array_equal(file["labels"], label)
            different = np.abs(file["arr_0"].astype(int) - to_uint8(images))
        assert different.max() <= 1 and (different > 0).mean() < 0.01  # rounding at the edge of a grey level


def test_samples_do_not_depend_on_the_batch(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher")
    assert smoke("sample", workdir, "sample.models=('teacher',)", "sample.count=30").status == 0
    few, many = (np.load(folder / "sample" / "teacher" / "samples.npz") for folder in (workdir, pipeline))
    for name in ("arr_0", "labels"):  # 30 is no multiple of the batch of 24
        np.testing.assert_array_equal(few[name], many[name][:30])


def test_students_that_are_alike_are_drawn_by_one_program(pipeline, tmp_path, compilations):
    workdir = copy(pipeline, tmp_path, "teacher", "distill")
    shutil.copytree(workdir / "distill" / "ard", workdir / "distill" / "twin")
    assert smoke("sample", workdir, "sample.models=('ard', 'twin')").status == 0
    assert compilations.names.count("jit(drawn)") == 1
    first, twin = (read_npz(workdir / "sample" / name / "samples.npz") for name in ("ard", "twin"))
    np.testing.assert_array_equal(first["arr_0"], twin["arr_0"])


def test_labels_are_drawn_in_turn_where_they_are_given(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher")
    overrides = ["sample.models=('teacher',)", "sample.count=7", "sample.labels=(3,1,4)", "sample.batch_size=4"]
    assert smoke("sample", workdir, *overrides).status == 0
    with np.load(workdir / "sample" / "teacher" / "samples.npz") as file:
        assert file["labels"].tolist() == [3, 1, 4, 3, 1, 4, 3]
        assert file["arr_0"].shape == (7, 8, 8, 1)
    assert Image.open(workdir / "sample" / "teacher" / "grid.png").size == (3 * 64 + 2 * 2, 3 * 64 + 2 * 2)


def test_labels_are_drawn_uniformly_or_each_as_often():
    index, classes = np.arange(1000), Labels(10)

    def drawn(labels):
        config = smoke_config.get_config()
        config.sample.labels = labels
        return sample.choose_numbers(config.sample, index, classes).tolist()

    assert drawn("balanced") == drawn(tuple(range(10))) == 100 * list(range(10))
    assert drawn("uniform") == drawn(()) != drawn("balanced")
    assert drawn(3) == [3] * 1000


def test_levels_on_the_device_are_those_on_the_host():
    images = np.random.default_rng(0).uniform(-1.2, 1.2, (3, 8, 8, 3)).astype(np.float32)
    images[1, 0, :3, 0] = np.arange(3) * 2 / 255 - 1 + 1 / 255  # half-way between two levels
    levels, bad = jax.device_get(to_levels(images))
    np.testing.assert_array_equal(levels, to_uint8(images))
    assert levels.dtype == np.uint8 and bad.tolist() == [0, 0, 0]
    images[2, 0, :2, 1] = np.nan
    assert jax.device_get(to_levels(images))[1].tolist() == [0, 0, 2]


TEACHER_ALONE = "sample.models=('teacher',)"


def test_sampling_goes_on_from_the_last_part(pipeline, tmp_path, monkeypatch):
    """Killed in its third part of four, whatever batch it goes on with, it ends with the same bytes."""
    workdir = copy(pipeline, tmp_path, "teacher")
    monkeypatch.setattr(sample, "PART", 24)
    write, written = sample.write_npz, []

    def interrupted(path, **arrays):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, **arrays)

    monkeypatch.setattr(sample, "write_npz", interrupted)
    assert smoke("sample", workdir, TEACHER_ALONE).status == 130
    folder = workdir / "sample" / "teacher"
    assert files(folder) == ["config.json", "parts/000000000.npz", "parts/000000024.npz"]
    monkeypatch.setattr(sample, "write_npz", write)
    resumed = smoke("sample", workdir, TEACHER_ALONE, "sample.batch_size=8")
    assert resumed.status == 0 and "going on from image 48 of 72." in resumed.err
    assert files(folder) == ["config.json", "grid.png", "samples.npz"]
    for file in ("samples.npz", "grid.png"):
        assert file_sha256(folder / file) == file_sha256(pipeline / "sample" / "teacher" / file)


def test_what_is_sampled_is_left_alone_and_never_replaced(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher", "distill", "sample")
    file = workdir / "sample" / "teacher" / "samples.npz"
    before = file.stat().st_mtime_ns, file.stat().st_ino
    assert "teacher has been sampled already." in smoke("sample", workdir).err
    for change in ("sample.count=4", "sample.seed=2", "diffusion.guidance_scale=2.0"):
        said = sentence(smoke("sample", workdir, TEACHER_ALONE, change), "sample")
        assert f"{workdir / 'sample' / 'teacher'} holds samples of other settings ({change.split('=')[0]} " in said
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before


def test_an_online_student_of_other_bounds_is_not_complete(pipeline, tmp_path):
    """Which the stage would refuse too; one that was made before they were noted may have had these."""
    workdir, config = copy(pipeline, tmp_path, "teacher", "distill"), smoke_config.get_config()
    config.distill.online = True
    path = workdir / "distill" / "ard" / "config.json"
    made = read_json(path, dict)
    made["distill"]["online"] = True
    assert made["inputs"].pop("max_abs") == ""
    write_json(path, made)
    assert is_complete("distill", config, workdir)
    made["inputs"]["max_abs"] = str(config.trajectories.max_abs)
    write_json(path, made)
    assert is_complete("distill", config, workdir)
    config.trajectories.max_abs = 1.5
    with pytest.raises(UserError, match=r"belongs to another config \(inputs.max_abs '.*' there, '1.5' here\)"):
        is_complete("distill", config, workdir)


def test_what_sample_would_draw_again_is_not_complete(pipeline, tmp_path):
    """Else a comparison would go on to 'evaluate', which sends it back to 'sample'."""
    workdir, config = copy(pipeline, tmp_path, "teacher", "distill", "sample"), smoke_config.get_config()
    assert is_complete("sample", config, workdir)
    folder, away = workdir / "sample" / "ard", tmp_path / "away"
    folder.rename(away)  # as the refusal of samples of other settings says
    assert not is_complete("sample", config, workdir)
    away.rename(folder)
    (folder / "samples.npz").rename(away)  # which takes the most room
    assert not is_complete("sample", config, workdir)
    away.rename(folder / "samples.npz")
    assert is_complete("sample", config, workdir)
    # latents are no samples where there is a VAE to decode them with
    facts = {"ema_sha256": "same", "sha256": {"samples.npz": ""}}
    assert are_drawn(folder, facts, "same", decodes=False) and not are_drawn(folder, facts, "same", decodes=True)
    assert not are_drawn(folder, facts, "other", decodes=False) and not are_drawn(folder, None, "same", decodes=False)


def test_parts_of_other_settings_are_not_joined(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher", "sample")
    (workdir / "sample" / "done.json").unlink()
    said = sentence(smoke("sample", workdir, TEACHER_ALONE, "sample.count=4"), "sample")
    assert "holds samples of other settings (sample.count 72 there, 4 here)" in said


def test_samples_of_other_settings_are_not_evaluated(pipeline, tmp_path):
    """The degradation's interval is of pairs of one noise and condition, and the page says what was asked for."""
    workdir = copy(pipeline, tmp_path, "teacher", "distill", "sample")
    shutil.rmtree(workdir / "sample" / "ard")
    assert smoke("sample", workdir, "sample.models=('ard',)", "sample.seed=2").status == 0
    said = sentence(smoke("evaluate", workdir), "evaluate")
    assert f"{workdir / 'sample' / 'ard'} holds samples of other settings (sample.seed 2 there, " in said
    said = sentence(smoke("evaluate", workdir, "sample.labels=balanced", "sample.seed=2"), "evaluate")
    assert f"{workdir / 'sample' / 'teacher'} holds samples of other settings (sample.labels" in said
    assert not (workdir / "evaluate").exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("inputs", "teacher", "0" * 64, "a teacher of hash 00000000 there, "),
        ("diffusion", "guidance_scale", 9.0, "diffusion.guidance_scale 9.0 there, "),
        ("diffusion", "steps", 11, "diffusion.steps 11 there, 5 here"),
    ],
)
def test_students_of_another_teacher_are_not_evaluated_beside_this_one(pipeline, tmp_path, section, key, value, said):
    workdir = copy(pipeline, tmp_path, "teacher", "distill", "sample")
    path = workdir / "distill" / "ard" / "config.json"
    config = read_json(path)
    config[section][key] = value
    write_json(path, config)
    found = sentence(smoke("evaluate", workdir), "evaluate")
    assert f"ard was distilled from another teacher or solver than this config's ({said}" in found
    assert not (workdir / "evaluate").exists()
    (workdir / "distill" / "ard").rename(tmp_path / "away")  # as that sentence says
    outcome = smoke("evaluate", workdir)
    assert outcome.status == 0 and "ard: sampled, but no longer in distill/, so left out." in outcome.err
    assert set(read_results(workdir).models) == {"teacher"}


def test_parts_are_joined_to_what_one_file_would_be(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (7, 4, 4, 1), dtype=np.uint8), np.arange(7, dtype=np.int32)
    parts = [tmp_path / f"{number}.npz" for number in range(3)]
    for part, rows in zip(parts, (slice(0, 3), slice(3, 6), slice(6, 7)), strict=True):
        write_npz(part, arr_0=images[rows], labels=labels[rows], more=np.zeros(1))
    join_npz(tmp_path / "joined.npz", parts, {"arr_0": images.shape, "labels": labels.shape})
    write_npz(tmp_path / "whole.npz", arr_0=images, labels=labels)
    assert (tmp_path / "joined.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_samplers_take_parameters_as_numpy_arrays(teacher, student):
    """Outside jit too: what is read from a file need not be put on a device first."""
    noise, label = map(np.asarray, draw_noise_and_labels(sampling_key(1), np.arange(2), SHAPE, 10))
    for model, params in (teacher, student):
        host = jax.tree.map(np.asarray, params)
        given = [(noise, label), (jnp.asarray(noise), jnp.asarray(label))]
        made = [
            sample_teacher(model, tree, *pair, make_solve(CONFIG)).x0
            if (model, params) == tuple(teacher)
            else sample_student(model, tree, *pair)
            for tree, pair in zip((host, params), given, strict=True)
        ]
        np.testing.assert_array_equal(*made)


def test_a_model_that_has_diverged_is_not_sampled(pipeline, tmp_path, monkeypatch):
    workdir = copy(pipeline, tmp_path, "teacher")
    monkeypatch.setattr(drawing, "sample_teacher", lambda *args: Solution(*[jnp.full((24, 1, *SHAPE), jnp.nan)] * 2))
    assert "pixels are NaN" in sentence(smoke("sample", workdir, TEACHER_ALONE), "sample")
    assert not (workdir / "sample" / "done.json").exists()


@pytest.mark.parametrize("broken", ["absent", "cut", "empty", "text", "objects"])
def test_arrays_that_cannot_be_read_are_named_in_a_sentence(tmp_path, broken):
    path = tmp_path / "samples.npz"
    write_npz(path, arr_0=np.arange(1000))
    assert read_npz(path)["arr_0"].tolist() == list(range(1000))
    if broken == "objects":
        np.savez(path, arr_0=np.array([{}], dtype=object))
    else:
        path.write_bytes({"cut": path.read_bytes()[:600], "text": b"no arrays"}.get(broken, b""))
    if broken == "absent":
        path.unlink()
    with pytest.raises(
        UserError, match=r"samples.npz cannot be read \(.+\), since it was altered or lost: move its folder"
    ):
        read_npz(path)


# ------------------------------------------------------------------------------------------ evaluation and report


def test_results_are_those_of_the_samples(pipeline):
    """Computed again from the files with the evaluation functions."""
    results = read_json(pipeline / "evaluate" / "results.json")
    images, labels = labels_and_images(image_source(CONFIG.data))
    net = train_feature_net(images, labels, 10, steps=20)
    real = net(images)
    for name in ("teacher", "ard"):
        with np.load(pipeline / "sample" / name / "samples.npz") as file:
            features = net(file["arr_0"])
        model = results["models"][name]
        assert model["fd"] == pytest.approx(frechet_distance(feature_statistics(real), feature_statistics(features)))
        spread = real[[row * 1796 // 71 for row in range(72)]]  # 72 of the 1797, evenly
        assert (model["precision"], model["recall"]) == precision_recall(spread, features, k=3)
    assert results["models"]["ard"]["degradation"] == pytest.approx(
        results["models"]["ard"]["fd"] - results["models"]["teacher"]["fd"]
    )
    assert results["real_images"] == 1797 and results["samples"] == 72 and results["paired"] == 8
    assert f"{net.held_out_accuracy:.3f}" in results["features"] and "not comparable" in results["features"]


def test_errors_are_paired_with_the_teacher(pipeline, teacher, student):
    """Per step, from the same noise: on the teacher's history, and on the student's own."""
    model = read_json(pipeline / "evaluate" / "results.json")["models"]["ard"]
    noise, label = draw_noise_and_labels(sampling_key(1), np.arange(8), SHAPE, 10)
    solved = jax.jit(lambda: sample_teacher(*teacher, noise, label, make_solve(CONFIG)).x0)()
    points = np.asarray(solved, np.float64)[:, [1, 3, 4]]  # respaced 3, 1, 0 of steps 4 … 0
    rollout = np.asarray(jax.jit(lambda: sample_student(*student, noise, label))(), np.float64)
    forced = np.asarray(jax.jit(lambda: teacher_forcing(*student, noise, jnp.asarray(points, jnp.float32), label))())
    mse = ((rollout - points) ** 2).mean(axis=(0, 2, 3, 4))
    assert model["mse_per_step"] == pytest.approx(mse, rel=1e-4) == model["rollout_mse"]
    assert model["forced_mse"] == pytest.approx(((forced - points) ** 2).mean(axis=(0, 2, 3, 4)), rel=1e-4)
    assert model["forced_mse"][0] == pytest.approx(model["rollout_mse"][0], rel=1e-5)  # the first step has no history
    assert model["psnr_per_step"] == pytest.approx(10 * np.log10(4 / mse), abs=1e-3)  # images span [-1, 1]
    assert model["psnr"] == model["psnr_per_step"][-1]


def test_errors_on_trajectories_of_the_training_stand_beside_those_on_fresh_noise(pipeline, student):
    """Of as many of the store's records as trajectories are solved, evenly spread over it."""
    model = read_json(pipeline / "evaluate" / "results.json")["models"]["ard"]
    source = store.Store(pipeline / "trajectories", store.read_manifest(pipeline / "trajectories"))
    records = [source[row * (len(source) - 1) // 7] for row in range(8)]
    noise, x0, label = (jnp.asarray(np.stack([record[key] for record in records])) for key in ("noise", "x0", "label"))
    points = x0[:, jnp.array([0, 2, 3])].astype(jnp.float32)  # 3, 1, 0 of the stored 3, 2, 1, 0
    forced = jax.jit(lambda: teacher_forcing(*student, noise.astype(jnp.float32), points, label))()
    mse = np.mean((np.asarray(forced, np.float64) - np.asarray(points)) ** 2, axis=(0, 2, 3, 4))
    assert model["trained_mse"] == pytest.approx(mse, rel=1e-6)  # another point would be 1e-5 off
    assert model["times_seen"] == done(pipeline / "distill" / "ard")["examples"] / len(source)


def test_a_snapshot_which_does_not_say_what_it_took_has_errors_on_trajectories_too(pipeline, tmp_path):
    """As `watch` measures one, of a store that lies elsewhere."""
    workdir = copy(pipeline, tmp_path, "teacher", "distill", "sample")
    path = workdir / "distill" / "ard" / "done.json"
    path.write_text(json.dumps({key: value for key, value in read_json(path).items() if key != "examples"}))
    assert smoke("evaluate", workdir, f"trajectories.dir={pipeline / 'trajectories'}").status == 0
    before, after = (read_json(at / "evaluate" / "results.json")["models"]["ard"] for at in (pipeline, workdir))
    assert after["trained_mse"] == before["trained_mse"] and "times_seen" not in after


@pytest.mark.parametrize("store_is", ["removed", "another"])
def test_a_run_is_measured_without_the_trajectories_of_its_training(pipeline, tmp_path, store_is):
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories", "distill", "sample")
    if store_is == "removed":
        shutil.rmtree(workdir / "trajectories")
    else:
        path = workdir / "trajectories" / "manifest.json"
        manifest = read_json(path)
        manifest["shards"][0]["sha256"] = "0" * 64
        path.write_text(json.dumps(manifest))
    assert smoke("evaluate", workdir).status == 0
    before, after = (read_json(at / "evaluate" / "results.json")["models"] for at in (pipeline, workdir))
    assert before["ard"].pop("trained_mse") and before["ard"].pop("times_seen")
    assert after == before


def test_the_first_points_of_the_teacher_help_the_last(pipeline, teacher, student):
    """PSNR of the final image when the first k points are the teacher's: the plain rollout, …, the forced last step."""
    model = read_json(pipeline / "evaluate" / "results.json")["models"]["ard"]
    assert len(model["given_psnr"]) == 3
    assert model["given_psnr"][0] == pytest.approx(model["psnr"], abs=1e-4)
    assert model["given_psnr"][-1] == pytest.approx(10 * np.log10(4 / model["forced_mse"][-1]), abs=1e-4)
    noise, label = draw_noise_and_labels(sampling_key(1), np.arange(8), SHAPE, 10)
    solved = jax.jit(lambda: sample_teacher(*teacher, noise, label, make_solve(CONFIG)).x0)()
    points = solved[:, jnp.asarray([1, 3, 4])]
    final = jax.jit(lambda: sample_student(*student, noise, label, {1: points[:, 0]}))()[:, -1]
    mse = np.mean((np.asarray(final, np.float64) - points[:, -1]) ** 2)
    assert model["given_psnr"][1] == pytest.approx(10 * np.log10(4 / mse), abs=1e-3)


def test_attention_mass_is_that_on_the_students_own_points(pipeline, student):
    mass = np.asarray(read_json(pipeline / "evaluate" / "results.json")["models"]["ard"]["attention_mass"])
    assert mass.shape == (1, 3, 3)
    np.testing.assert_allclose(mass.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_array_equal(mass[0] > 0, np.tril(np.ones((3, 3), bool)))
    model, params = student
    noise, label = draw_noise_and_labels(sampling_key(1), np.arange(8), SHAPE, 10)
    rollout = jax.jit(lambda: sample_student(model, params, noise, label))()
    inputs = jnp.concatenate([noise[:, None], rollout[:, :-1]], axis=1)
    expected = jax.jit(lambda: model.apply({"params": params}, inputs, label, method="attention_mass"))()
    np.testing.assert_allclose(mass, np.asarray(expected).mean(axis=0), atol=1e-5)


def test_edits_put_the_source_in_place_of_a_step(pipeline, teacher, student):
    with np.load(pipeline / "evaluate" / "edits.npz", allow_pickle=False) as file:
        edits = dict(file)
    noise, label = draw_noise_and_labels(sampling_key(1), np.arange(8), SHAPE, 10)
    source = jax.jit(lambda: sample_teacher(*teacher, noise, label, make_solve(CONFIG)).xt[:4, -1])()
    np.testing.assert_array_equal(edits["label"], (label[:4] + 5) % 10)
    assert np.abs(edits["source"].astype(int) - to_uint8(source)).max() <= 1
    other = jnp.roll(noise, 1, axis=0)[:4]
    for step, given in enumerate([{}, {1: source}, {2: source}]):
        final = jax.jit(lambda given=given: sample_student(*student, other, edits["label"], given))()[:, -1]
        assert np.abs(edits["ard"][:, step].astype(int) - to_uint8(final)).max() <= 1
    assert edits["ard"].shape == (4, 3, 8, 8, 1) and (edits["ard"][:, 0] != edits["ard"][:, 2]).any()


def test_the_report_holds_what_outside_checks_use(pipeline):
    results = read_json(pipeline / "report" / "results.json")
    evaluated = read_json(pipeline / "evaluate" / "results.json")
    assert results["teacher"]["fd"] == evaluated["models"]["teacher"]["fd"]
    assert {"fd", "psnr", "degradation", "precision", "recall"} <= set(results["ard"])
    assert results["degradation_ratio"] is None  # there is no student without history here
    seconds = {"teacher", "trajectories", "distill/ard", "sample/teacher", "sample/ard", "evaluate"}
    assert set(results["seconds"]) == seconds and min(results["seconds"].values()) > 0
    assert results["seconds"]["teacher"] == done(pipeline / "teacher")["seconds"]
    assert results["ard"]["parameters"] == 16172 and results["teacher"]["parameters"] == 14948
    assert results["teacher"]["network_calls"] == 10 and results["ard"]["network_calls"] == 3
    page = (pipeline / "report" / "index.html").read_text()
    assert "Smoke test" in page and "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page
    assert Image.open(pipeline / "report" / "teaser.png").size[0] > 100


def test_few_samples_or_other_ones_are_refused(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher", "distill", "sample")
    said = sentence(smoke("evaluate", workdir, "sample.count=80"), "evaluate")
    assert "sample/teacher holds 72 images, but sample.count is 80: run 'sample' again" in said
    assert not (workdir / "evaluate").exists()


# ---------------------------------------------------------------------------------------------- other settings


def test_what_was_begun_before_a_setting_came_goes_on_as_by_its_default(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories", "distill", "sample")
    for folder in ("distill/ard", "sample/ard", "sample/teacher"):
        path = workdir / folder / "config.json"
        config = read_json(path)
        del config["distill"]["ard"]["own_history"], config["sample"]["held_out"]
        write_json(path, config)
    assert smoke("distill", workdir).status == 0
    said = sentence(smoke("distill", workdir, "distill.ard.own_history=True"), "distill")
    assert "belongs to another config (distill.ard.own_history False there, True here)" in said
    assert "ard has been sampled already." in smoke("sample", workdir).err


@pytest.mark.parametrize("solver", ["heun", "dpm++2m"])
def test_every_solver_makes_trajectories(pipeline, tmp_path, trajectories, solver):
    workdir = copy(pipeline, tmp_path, "teacher")
    assert smoke("trajectories", workdir, f"diffusion.solver={solver}", "trajectories.count=4").status == 0
    made = store.Store(workdir / "trajectories", store.read_manifest(workdir / "trajectories"))
    for index in range(4):
        record = made[index]
        np.testing.assert_array_equal(record["noise"], trajectories["noise"][index])  # the same start
        np.testing.assert_array_equal(record["x0"][-1], record["xt"][-1])  # index 0 is the sample, in both
        assert np.isfinite(record["x0"]).all()
        assert np.abs(record["xt"][0].astype(float) - trajectories["xt"][index][0]).max() > 0.01  # another way


def first_loss(workdir, config, student_name):
    """Loss per step of the untrained student on the first batch, from the store's records, by index."""
    directory = workdir / "trajectories"
    source = store.Store(directory, store.read_manifest(directory))
    stored = store.read_manifest(directory)["points"]
    batch = next(stream(source, batch_size=config.distill.batch_size, seed=config.seed))
    model = make_student(config)
    teacher_params = load_teacher(config, workdir, make_mesh())[1]
    columns = [stored.index(point) for point in config.student.points]
    points = batch[config.student.target][:, columns].astype(np.float32)
    params = init_from_teacher(teacher_params, model)
    predicted = teacher_forcing(model, params, batch["noise"].astype(np.float32), points, batch["label"])
    return ((np.asarray(predicted) - points) ** 2).mean(axis=(0, 2, 3, 4))


def test_one_store_serves_other_steps_and_noisy_targets(pipeline, tmp_path):
    """A student of two steps with noisy points as its target, from the store that served three steps and x0."""
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories")
    overrides = ["student.points=(2,0)", "distill.steps=1", "student.history_layers=2"]
    assert smoke("distill", workdir, *overrides, arguments="student=two,target=xt,mask=window").status == 0
    config = smoke_config.get_config("student=two,target=xt,mask=window")
    config.student.update(points=(2, 0), history_layers=2)
    (line,) = lines(workdir / "distill" / "two")
    expected = first_loss(workdir, config, "two")
    assert [line["loss_step_1"], line["loss_step_2"]] == pytest.approx(expected, rel=2e-3)
    assert "loss_step_3" not in line and line["loss"] == pytest.approx(expected.mean(), rel=2e-3)
    assert list(done(workdir / "distill")["models"]) == ["two"]


def test_the_first_loss_of_a_run_is_that_of_its_first_batch(pipeline):
    """The mean of five steps is logged, and this student hardly moves in five steps: to a few percent."""
    expected = first_loss(pipeline, CONFIG, "ard")
    line = lines(pipeline / "distill" / "ard")[0]
    assert line["loss"] == pytest.approx(expected.mean(), rel=0.3)


def test_online_distillation_sees_the_trajectories_that_the_job_stores(teacher, trajectories):
    """Position i is record i: the same loss, from the teacher inside the step or from the store."""
    model = make_student(CONFIG)
    params = init_from_teacher(teacher[1], model)
    settings = dict(points=(3, 1, 0), shape=SHAPE, seed=0, max_abs=0.0, how=make_solve(CONFIG))
    online = online_ard(model, teacher[0], target="x0", **settings)
    stored = ard(model, target="x0", columns=(0, 2, 3))
    key = jax.random.key(0)
    rows = np.array([3, 17, 4, 0])
    batch = {name: jnp.asarray(trajectories[name][rows]) for name in ("noise", "x0")}
    batch["condition"] = label = jnp.asarray(trajectories["label"][rows], jnp.int32)
    ours, own = jax.jit(lambda: online(params, teacher[1], {"position": jnp.asarray(rows), "condition": label}, key))()
    theirs, other = jax.jit(lambda: stored(params, None, batch, key))()
    assert float(ours) == pytest.approx(float(theirs), rel=2e-3)  # the store is float16
    for name in other:
        assert float(own[name]) == pytest.approx(float(other[name]), rel=2e-3)


@pytest.mark.slow
def test_online_distillation_of_a_flow_matching_teacher(tmp_path):
    """No store at all, and the other process, from training to samples."""
    few = ["teacher.steps=10", "distill.online=True", "distill.steps=2", "trajectories.max_abs=100.0"]
    few.append("run.log_every=1")
    for stage in ("teacher", "distill"):
        outcome = smoke(stage, tmp_path, *few, arguments="process=flow")
        assert outcome.status == 0, outcome.err
    assert not (tmp_path / "trajectories").exists()
    assert read_json(tmp_path / "distill" / "ard" / "config.json")["inputs"]["store"] == ""
    config = smoke_config.get_config("process=flow")
    model, params, *_ = load_teacher(config, tmp_path, make_mesh())
    noise, label = draw_noise_and_labels(jax.random.fold_in(jax.random.key(0), 0), np.arange(8), SHAPE, 10)
    solved = sample_teacher(make_teacher(config), params, noise, label, make_solve(config))
    points = np.asarray(solved.x0)[:, [1, 3, 4]]
    student = make_student(config)
    assert student.noise_time == 1000.0
    predicted = teacher_forcing(student, init_from_teacher(params, student), noise, points, label)
    expected = ((np.asarray(predicted) - points) ** 2).mean(axis=(0, 2, 3, 4))
    first, second = lines(tmp_path / "distill" / "ard")
    assert [first[f"loss_step_{step}"] for step in (1, 2, 3)] == pytest.approx(expected, rel=1e-3)
    assert second["loss"] != first["loss"]
    assert model.num_classes == 10


def test_step_distillation_is_ard_without_history(pipeline, teacher, trajectories):
    """The diagonal mask gives what no history layers give, and what the teacher's own layers give block by block."""
    diagonal = smoke_config.get_config("mask=diagonal")
    none = smoke_config.get_config()
    none.student.history_layers = 0
    points = trajectories["x0"][:4, [0, 2, 3]].astype(np.float32)
    noise, label = trajectories["noise"][:4].astype(np.float32), trajectories["label"][:4]
    made = [
        np.asarray(teacher_forcing(model, init_from_teacher(teacher[1], model), noise, points, label))
        for model in (make_student(diagonal), make_student(none))
    ]
    np.testing.assert_allclose(made[0], made[1], rtol=1e-5, atol=1e-5)
    alone = make_teacher(CONFIG).apply({"params": teacher[1]}, noise, np.full(4, 999.0, np.float32), label)
    np.testing.assert_allclose(made[0][:, 0], alone, rtol=1e-4, atol=1e-4)


def test_a_folder_of_images_trains_a_teacher(tmp_path):
    """As the README says: a sub-folder a class."""
    for label in ("left", "right"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(4):
            image = np.zeros((12, 10), np.uint8)
            image[:, :5] = 255 if label == "left" else 16 * number
            Image.fromarray(image).save(tmp_path / "images" / label / f"{number}.png")
    data = [f"data.{key}" for key in ("source=folder", f"dir={tmp_path / 'images'}", "num_classes=2")]
    outcome = smoke("teacher", tmp_path / "run", *data, "teacher.steps=2", "data.horizontal_flip=True")
    assert outcome.status == 0, outcome.err
    assert done(tmp_path / "run" / "teacher")["step"] == 2
    said = sentence(smoke("teacher", tmp_path / "other", *data[:2], "data.num_classes=3"), "teacher")
    assert "num_classes" in said
