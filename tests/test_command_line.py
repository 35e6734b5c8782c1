"""The command line: every mistake ends in one sentence, with status 2, and with nothing written."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import types

import pytest
from pipeline_fixtures import ROOT, SMOKE, STAGES, copy, done, files, key, run, sentence, smoke

from ard_jax import command_line
from ard_jax.__main__ import STAGES as ALL_STAGES
from ard_jax.__main__ import main
from ard_jax.results import read_results
from ard_jax.stages import evaluate

IMAGENET = str(ROOT / "configs" / "imagenet256.py")


def refused(stage, *arguments):
    """The sentence of a command without a workdir of its own."""
    return sentence(run(stage, *arguments), stage)


@pytest.fixture
def workdir(tmp_path):
    """A workdir that must not be there afterwards."""
    yield tmp_path / "run"
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_a_stage(stage, workdir):
    module = __import__(f"ard_jax.stages.{stage}", fromlist=["stages"])
    for arguments in (["--help"], ["--config", SMOKE, "--workdir", workdir, "-h"]):
        outcome = run(stage, *arguments)
        assert outcome.status == 0 and not outcome.err
        assert outcome.out.startswith(f"python -m ard_jax {stage} --config FILE")
        assert module.__doc__.strip() in outcome.out and len(module.__doc__.split()) > 15


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_stage(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"\n    {stage} " in out for stage in STAGES)


def test_a_stage_whose_requirements_are_not_installed(workdir, monkeypatch):
    """The base requirements are enough to open a model, not to train one."""
    monkeypatch.delitem(sys.modules, "ard_jax.stages.trajectories", raising=False)
    monkeypatch.delattr("ard_jax.stages.trajectories", raising=False)
    monkeypatch.setitem(sys.modules, "ard_jax.trajectories.store", None)
    for arguments in (["--config", SMOKE, "--workdir", workdir], ["--help"]):
        said = refused("trajectories", *arguments)
        assert "which is not installed: install ard_jax with its extra train" in said


def test_a_stage_that_does_not_exist(capsys):
    assert main(["teach", "--config", SMOKE]) == 2
    out, err = capsys.readouterr()
    assert err == f"ard_jax: there is no stage 'teach': choose one of {', '.join(ALL_STAGES)}.\n" and not out


def test_stages_in_turn_make_what_they_make_alone(pipeline, tmp_path):
    """In one process, where none may hear of another's config or programs."""
    workdir = copy(pipeline, tmp_path / "run", "teacher", "trajectories")
    common = ["--workdir", workdir, "--config.sample.models=('teacher', 'ard', 'other')"]
    first = ["distill,distill", "--config", SMOKE, *common]
    second = ["then", "distill", "--config", f"{SMOKE}:student=other", *common]
    outcome = run("run", *first, *second, "then", "sample,evaluate", "--config", SMOKE, *common)
    assert outcome.status == 0, outcome.err
    assert [line for line in outcome.out.splitlines() if line.startswith("==")] == [
        f"== {stage} ({number} of 5)"
        for number, stage in enumerate(["distill", "distill", "distill", "sample", "evaluate"], start=1)
    ]
    made, alone = done(workdir / "distill")["models"], done(pipeline / "distill")["models"]
    assert made["ard"]["sha256"] == alone["ard"]["sha256"] and set(made) == {"ard", "other"}
    measured = read_results(workdir).models  # of two students at once
    assert set(measured) == {"teacher", "ard", "other"}
    for name in ("mse_per_step", "forced_mse", "given_psnr", "attention_mass"):
        assert getattr(measured["ard"], name) == getattr(read_results(pipeline).models["ard"], name)


def test_what_is_left_of_an_evaluation_that_ends_early_is_not_begun():
    begun, first, rest = [], threading.Event(), threading.Event()

    def work(number):
        begun.append(number)
        first.set()
        rest.wait(60)

    with pytest.raises(KeyboardInterrupt), evaluate._threads(1) as pool:
        futures = [pool.submit(work, number) for number in range(2)]
        futures[1].add_done_callback(lambda _: rest.set())
        first.wait()
        raise KeyboardInterrupt
    assert begun == [0] and futures[1].cancelled()


def test_all_programs_are_kept(tmp_path):
    """Small ones too, which the stages of a run have in common."""
    code = "import jax, pathlib, sys; from ard_jax import command_line as c; c._set_up_jax(pathlib.Path(sys.argv[1]))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-c", f"{code}; jax.jit(lambda x: x + 1)(1.0)", tmp_path]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert [name for name in files(tmp_path) if name.startswith("compile_cache/") and "lambda" in name]


def test_stages_in_turn_end_at_the_first_that_fails(workdir):
    outcome = run("run", "teacher,sample", "--config", SMOKE, "--workdir", workdir, "--config.teacher.steps=0")
    assert outcome.status == 2 and outcome.err.startswith("ard_jax teacher: teacher.steps is 0")
    assert "sample" not in outcome.out
    for words in (["teacher,plan", "--config", SMOKE], ["teacher", "--config", SMOKE, "then"], []):
        assert " to run: choose some of captions,encode,teacher," in sentence(run("run", *words), "run")


def test_python_m_ard_jax(tmp_path):
    """The real thing: a mistake, from a folder that is not the repository's."""
    command = [sys.executable, "-m", "ard_jax", "sample", "--config", SMOKE, "--workdir", tmp_path / "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and not ended.stdout
    teacher = tmp_path / "run" / "teacher"
    assert ended.stderr == (
        f"ard_jax sample: {teacher} has no done.json: run the stage 'teacher' to its end first, with this config.\n"
    )
    assert files(tmp_path) == []


# --------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("stage", STAGES)
def test_flags_that_are_missing(stage, workdir):
    assert refused(stage) == f"ard_jax {stage}: --config is missing: give --config FILE and --workdir DIR."
    assert "--config is missing" in refused(stage, "--workdir", workdir)
    assert "--workdir is missing" in refused(stage, "--config", SMOKE)
    assert "--workdir is missing" in refused(stage, "--config", SMOKE, "--workdir")
    assert "--config is missing" in refused(stage, "--config=", "--workdir", workdir)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (
            "--config.student.histry_layers=1",
            "there is no flag --config.student.histry_layers: did you mean --config.stu",
        ),
        ("--config.studnt.history_layers=1", "did you mean --config.student.history_layers"),
        ("--config.techer.steps=5", "did you mean --config.teacher.steps"),
        ("--config.sede=5", "did you mean --config.seed"),
        ("--config.student=3", "there is no flag --config.student:"),
        ("--wrokdir=x", "did you mean --workdir"),
        ("--verbose", "there is no flag --verbose: ard_jax/config.py lists the settings."),
        ("surplus", "'surplus' is not understood: settings are given as --config.key=value."),
        ("--config.teacher.steps=many", "--config.teacher.steps=many: invalid literal for int() with base 10: 'many'."),
        ("--config.teacher.steps=1.5", "--config.teacher.steps=1.5: invalid literal for int()"),
        ("--config.teacher.optimizer.ema=high", "could not convert string to float: 'high'."),
        ("--config.trajectories.keep_noisy=maybe", "Non-boolean argument to boolean flag"),
        ("--config.teacher.steps", "Missing value for flag --config.teacher.steps."),
        ("--process-id=0", "--coordinator, --num-processes, --process-id belong together: give all of them, or none."),
        ("--process-id", "Missing value for flag --process-id."),
    ],
)
def test_flags_that_are_wrong(flag, said, workdir):
    assert said in refused("teacher", "--config", SMOKE, "--workdir", workdir, flag)


def test_every_setting_can_be_overridden():
    """A value of each key's own type is taken, on the command line that a shell would give."""
    keys = ["seed=3", "data.split=train[:9]", "model.mlp_ratio=2", "student.points=(3,0)", "run.loggers=()",
            "sample.models=('teacher',)", "noconfig.trajectories.keep_noisy"]  # fmt: skip
    flags = [f"--{key}" if key.startswith("noconfig") else f"--config.{key}" for key in keys]
    config, workdir = command_line.parse_config(["--config", SMOKE, "--workdir", "here", *flags])
    assert (config.seed, config.data.split, config.model.mlp_ratio) == (3, "train[:9]", 2.0)
    assert tuple(config.student.points) == (3, 0) and tuple(config.sample.models) == ("teacher",)
    assert config.run.loggers == () and config.trajectories.keep_noisy is False
    assert workdir == pathlib.Path("here")


def test_a_flag_that_is_there_or_not():
    table = command_line.FLAGS["compare"]
    for given, expected in (([], False), (["--quick"], True), (["--quick=false"], False), (["--noquick"], False)):
        _, workdir, quick = command_line.parse_config(["--config", SMOKE, "--workdir", "here", *given], table)
        assert quick is expected and workdir == pathlib.Path("here")
    assert command_line.usage(table) == "--workdir DIR [--quick]"
    assert "did you mean --quick" in refused("compare", "--config", SMOKE, "--workdir", "here", "--quik")
    assert "--workdir is missing: give --config FILE and --workdir DIR." in refused(
        "compare", "--config", SMOKE, "--quick"
    )
    assert "compare.methods is empty" in refused("compare", "--config", SMOKE, "--workdir", "here")
    assert "there is no flag --quick" in refused("teacher", "--config", SMOKE, "--workdir", "here", "--quick")


# -------------------------------------------------------------------------------------------------- config files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:", "the config file cannot be used (SyntaxError: "),
        ("import nothing_of_that_name", "builds on nothing_of_that_name, which is not found from here"),
        ("x = 1", "AttributeError: module 'config_config' has no attribute 'get_config'"),
        ("def get_config(): return 1 + ''", "TypeError: unsupported operand type"),
        ("def get_config(): return None", "the config file leaves settings out"),
        (
            "import ml_collections\ndef get_config(): return ml_collections.ConfigDict({'seed': 0})",
            "leaves settings out",
        ),
    ],
)
def test_config_files_that_do_not_work(text, said, tmp_path, workdir):
    (tmp_path / "broken.py").write_text(text)
    assert said in refused("teacher", "--config", tmp_path / "broken.py", "--workdir", workdir)


@pytest.mark.parametrize("file", ["configs/nothing.py", "/", "configs/nothing.py:student=ard"])
def test_config_files_that_are_not_there(file, workdir):
    said = refused("teacher", "--config", file, "--workdir", workdir)
    assert f"the config file {file.split(':')[0]!r} is not there: name one, such as configs/digits.py." in said


def test_a_copied_config_that_builds_on_another_says_so(tmp_path):
    (tmp_path / "mine.py").write_text("from configs_of_mine import base\n\n\ndef get_config():\n    return base\n")
    said = refused("teacher", "--config", tmp_path / "mine.py", "--workdir", tmp_path / "run")
    assert (
        "the config file builds on configs_of_mine, which is not found from here: run in the folder that has it" in said
    )


@pytest.mark.parametrize(
    ("file", "argument", "said"),
    [
        (
            SMOKE,
            "studnet=ard",
            "config argument 'studnet' does not exist: this config has student, mask, target, process.",
        ),
        (
            SMOKE,
            "mask=diagonl",
            "mask is 'diagonl', which does not exist: choose one of diagonal, window, noise_and_own",
        ),
        (SMOKE, "process=heat", "diffusion.process is 'heat', which does not exist: choose vp or flow."),
        (SMOKE, "target=x1", "student.target is 'x1': choose x0"),
        (SMOKE, "student=../ard", "student.name is '../ard', which cannot name a student's folder"),
        (SMOKE, "student=teacher", "student.name is 'teacher', which cannot name a student's folder"),
        (SMOKE, "student=seconds", "student.name is 'seconds', which cannot name a student's folder"),
        (IMAGENET, "steps=3", "config argument steps is 3: choose one of 4, 2, 1."),
        (IMAGENET, "steps=four", "config argument steps is 'four', which is no int: give one."),
    ],
)
def test_config_arguments_that_are_wrong(file, argument, said, workdir):
    assert said in refused("distill", "--config", f"{file}:{argument}", "--workdir", workdir)


# -------------------------------------------------------------------------------------------------------- values

# One sentence of each family.
WRONG = [
    ("mesh.fsdp=-1", "mesh.data and mesh.fsdp are both -1: only one of them can take"),
    ("teacher.steps=0", "teacher.steps is 0: give a number of at least 1."),
    ("diffusion.beta_end=2.0", "diffusion.beta_end is 2.0: give a number from 0 to 1."),
    ("diffusion.guidance_scale=nan", "diffusion.guidance_scale is nan: give a number from 0 to 1000."),
    ("model.mlp_ratio=-1", "model.mlp_ratio is -1.0: give a number above 0."),
    ("trajectories.dtype=float8", "trajectories.dtype is 'float8': choose float16, bfloat16 or float32."),
    (
        "student.points=(3,3,0)",
        "student.points is (3, 3, 0): give strictly falling indices below the teacher's 5 steps, the last one 0",
    ),
    (
        "student.points=(4,0)",
        "student.points has [4], which the store does not keep (trajectories.points is (3, 2, 1, 0))",
    ),
    ("student.mask=M1", "student.mask is 'M1', which does not exist: choose one of diagonal"),
    (
        "student.target=xt --config.trajectories.keep_noisy=False",
        "the store keeps no noisy points: set trajectories.keep",
    ),
    ("sample.labels=(3,-1)", "sample.labels has -1, but there are 10 classes: give labels from 0 to 9."),
    ("sample.models=('../x',)", "sample.models is ('../x',): name the teacher"),
    ("model.num_heads=3", "model.hidden_size 16 with 3 heads does not work"),
    ("data.channels=3", "data.source=digits holds 8×8 images of 1 channel in 10 classes"),
]
# Of the others, what the sentence is about: the first setting.
REFUSED = [
    "student.history_layers=3",
    "student.history_layers=-1",
    "student.points=(0,1,3)",
    "student.points=(3,1)",
    "student.points=()",
    "student.points=(5,0)",
    "student.points=(3,'a',0)",
    "student.points=(3.5,0)",
    "trajectories.points=(3,1)",
    "student.block_times=(9.0,)",
    "student.heads=three",
    "sample.labels=(10,)",
    "sample.labels=10",
    "sample.labels=even",
    "sample.labels=(1,'a')",
    "sample.models=()",
    "data.image_size=9",
    "data.image_size=0",
    "data.num_classes=-3",
    "model.name=DiT-XXL/2",
    "model.patch_size=-2",
    "model.depth=0",
    "model.dtype=int8",
    "model.remat=some",
    "diffusion.solver=euler",
    "diffusion.steps=1001",
    "diffusion.guidance_interval=(0.8,0.2)",
    "diffusion.guidance_interval=(0.8,)",
    "diffusion.guided_channels=-1",
    "teacher.batch_size=-16",
    "teacher.label_dropout=1.5",
    "teacher.optimizer.name=adamv",
    "teacher.optimizer.name=apply_updates",
    "teacher.optimizer.schedule=linear",
    "teacher.optimizer.warmup_steps=20",
    "teacher.optimizer.learning_rate=-0.1",
    "teacher.optimizer.learning_rate=1e30",
    "teacher.optimizer.clip=-1",
    "distill.optimizer.ema=1.1",
    "distill.checkpoint_every=0",
    "trajectories.count=-1",
    "trajectories.max_abs=-4",
    "sample.count=0",
    "evaluate.paired=0",
    "run.log_every=0",
    "run.workers=0",
    "seed=-1",
    "seed=99999999999999999999",
    "data.source=cifar",
    "data.split=test",
]


@pytest.mark.parametrize(("override", "said"), WRONG, ids=[override.split(" ")[0] for override, _ in WRONG])
def test_values_that_are_wrong(override, said, workdir):
    assert said in sentence(smoke("teacher", workdir, *override.split(" --config.")), "teacher")


@pytest.mark.parametrize("override", REFUSED)
def test_settings_that_are_wrong_are_named(override, workdir):
    assert key(smoke("teacher", workdir, override), "teacher") == override.split("=")[0]


@pytest.mark.parametrize(("stage", "key"), [("teacher", "teacher.batch_size 16"), ("distill", "distill.batch_size 8")])
def test_batches_that_the_devices_cannot_share(stage, key, workdir, monkeypatch):
    monkeypatch.setattr(
        f"ard_jax.stages.{stage}.make_run_mesh", lambda *_: types.SimpleNamespace(shape={"data": 1, "fsdp": 3})
    )
    said = sentence(smoke(stage, workdir), stage)
    assert f"{key} cannot be split evenly over 3 parts (mesh.data × mesh.fsdp): choose a multiple of 3." in said


def test_settings_of_latents_do_not_go_with_digits(workdir):
    said = sentence(smoke("teacher", workdir, "data.space=latent"), "teacher")
    assert "data.space=latent needs data.source=tfds" in said
    said = sentence(smoke("evaluate", workdir, "data.space=latent"), "evaluate")
    assert f"evaluate compares images, but there is no VAE in {workdir / 'vae'} to decode latents with" in said


# ------------------------------------------------------------------------------------------------------- workdirs


@pytest.mark.parametrize(
    ("stage", "there", "missing", "first"),
    [
        ("trajectories", (), "teacher", "teacher"),
        ("distill", (), "teacher", "teacher"),
        ("distill", ("teacher",), "trajectories", "trajectories"),
        ("sample", (), "teacher", "teacher"),
        ("sample", ("teacher",), "distill/ard", "distill"),
        ("evaluate", (), "sample", "sample"),
        ("report", (), "evaluate", "evaluate"),
    ],
)
def test_a_stage_before_the_one_that_it_stands_on(stage, there, missing, first, pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path / "run", *there)
    before = files(tmp_path)
    said = sentence(smoke(stage, workdir), stage)
    assert str(workdir / missing) in said and f"run the stage '{first}'" in said
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("stage", "folder", "overrides", "said"),
    [
        ("teacher", "teacher", ["teacher.steps=19"], ["teacher.steps 20 there, 19 here"]),
        ("teacher", "teacher", ["seed=1"], ["seed 0 there, 1 here"]),
        (
            "teacher",
            "teacher",
            ["teacher.batch_size=8", "teacher.optimizer.ema=0.5", "model.depth=1", "model.hidden_size=8", "seed=2"],
            ["model.depth 2 there, 1 here; model.hidden_size 16 there, 8 here; seed 0 there, 2 here and 2 more"],
        ),
        ("trajectories", "trajectories", ["trajectories.count=23"], ["trajectories.count 24 there, 23 here"]),
        ("trajectories", "teacher", ["model.depth=1"], ["model.depth 2 there, 1 here"]),
        ("distill", "distill/ard", ["student.mask=window"], ["student.mask 'causal' there, 'window' here"]),
        ("sample", "teacher", ["model.mlp_ratio=2.0"], ["model.mlp_ratio 4.0 there, 2.0 here"]),
    ],
)
def test_a_workdir_that_belongs_to_another_config(stage, folder, overrides, said, pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path / "run", "teacher", "trajectories", "distill")
    before = {name: (workdir / name).stat().st_mtime_ns for name in files(workdir)}
    told = sentence(smoke(stage, workdir, *overrides), stage)
    assert f"{workdir / folder} belongs to another config" in told and all(part in told for part in said)
    assert "use that config, or another --workdir, or move the folder away." in told
    assert {name: (workdir / name).stat().st_mtime_ns for name in files(workdir)} == before


def test_what_shows_a_run_may_change_between_starts(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path / "run", "teacher")
    assert smoke("teacher", workdir, "run.log_every=3", "run.workers=1", "report.title=Other").status == 0


def test_a_teacher_trained_anew_orphans_its_store(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path / "run", "teacher", "trajectories")
    config = json.loads((workdir / "trajectories" / "config.json").read_text())
    config["inputs"]["teacher"] = "another"
    (workdir / "trajectories" / "config.json").write_text(json.dumps(config))
    said = sentence(smoke("trajectories", workdir), "trajectories")
    assert "inputs.teacher 'another' there" in said


def test_samples_of_older_weights_are_not_evaluated(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path / "run", "teacher", "distill", "sample")
    done = json.loads((workdir / "sample" / "done.json").read_text())
    done["models"]["ard"]["ema_sha256"] = "older"
    (workdir / "sample" / "done.json").write_text(json.dumps(done))
    outcome = smoke("evaluate", workdir)
    said = sentence(outcome, "evaluate")
    assert f"the samples in {workdir / 'sample' / 'ard'} are of older weights: run 'sample' again." in said
    assert not (workdir / "evaluate").exists()


def test_of_few_images_there_is_no_frechet_distance_and_everything_else(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path / "run", "teacher", "distill", "trajectories")
    for stage in ("sample", "evaluate", "report"):
        outcome = smoke(stage, workdir, "sample.count=16", "sample.models=('teacher', 'ard')")
        assert outcome.status == 0, outcome.err
        if stage == "evaluate":
            assert "16 images are too few for a Fréchet distance, which wants 65: left out." in outcome.err
    results = read_results(workdir)
    for model in results.models.values():
        assert model.fd is None and 0 <= model.precision <= 1
    assert results.models["ard"].psnr is not None and results.degradation_ratio is None
    page = (workdir / "report" / "index.html").read_text()
    assert "no Fréchet distance, which 16 images are too few for" in page


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    said = sentence(smoke("teacher", tmp_path / "file"), "teacher")
    assert "a file or folder cannot be used" in said and str(tmp_path / "file") in said
    assert files(tmp_path) == ["file"]


def test_an_interrupt_ends_in_a_sentence(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ard_jax.stages.teacher.image_source", interrupted)
    outcome = smoke("teacher", tmp_path)
    assert outcome.status == 130
    assert outcome.err.strip().endswith(
        "ard_jax teacher: interrupted; running the same command goes on from what is saved."
    )


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    """A defect of ours keeps its traceback; it is no user's mistake."""
    monkeypatch.setattr("ard_jax.stages.teacher.image_source", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        smoke("teacher", tmp_path / "run")
