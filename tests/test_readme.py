"""What the README and the pages that it leads to tell people to type works as it stands there, with smaller numbers
where it says so here."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import ROOT, copy, done, run, smoke
from test_stages_latents import write_vae

from ard_jax.__main__ import STAGES
from ard_jax.command_line import FLAGS, known_keys, parse_config
from ard_jax.files import read_json
from ard_jax.plan.topology import SHAPES

PAGES = ("README.md", *(f"docs/{name}.md" for name in ("STAGES", "RIVALS", "RECIPES", "OWN_TEACHER", "PLAN", "PODS")))
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
TRAINED = ("distill", "finetune")
FEWER = {  # settings that make a command of the README short, by stage
    "trajectories": ("trajectories.count=16", "trajectories.batch_size=16"),
    "distill": ("distill.steps=3", "distill.batch_size=4"),
    "sample": ("sample.count=8", "sample.batch_size=8"),
}


def blocks(language: str, *pages: str) -> list[str]:
    """Blocks of code of some pages, or of all."""
    text = "\n".join(TEXTS[page] for page in pages or PAGES)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(start: str, *pages: str) -> list[list[str]]:
    """The lines of shell that start so, without that start and what is said of them."""
    lines = [line for block in blocks("bash", *pages) for line in block.splitlines()]
    return [shlex.split(line.removeprefix(start), comments=True) for line in lines if line.startswith(start)]


def stage_commands(workdir: str, *pages: str) -> list[list[str]]:
    found = commands("python -m ard_jax ", *pages)
    return [words for words in found if ["--workdir", workdir] in map(list, pairwise(words))]


@pytest.mark.slow
def test_the_stages_run_as_written(pipeline, tmp_path, monkeypatch):
    """Those that the shared run has finished start again on a copy of it; the baseline and its report are new."""
    monkeypatch.chdir(ROOT)
    workdir = copy(pipeline, tmp_path / "smoke", "teacher", "trajectories", "distill")
    written = stage_commands("runs/smoke")
    assert [command[0] for command in written] == [
        "teacher", "trajectories", "distill", "distill", "sample", "evaluate", "report", "finetune"
    ]  # fmt: skip
    for stage, *flags in written:
        flags[flags.index("--workdir") + 1] = workdir
        outcome = run(stage, *flags)
        assert outcome.status == 0, outcome.err
    assert set(done(workdir / "distill")["models"]) == {"ard", "step", "ard_adversarial"}
    assert read_json(workdir / "distill" / "step" / "config.json")["student"]["mask"] == "diagonal"
    assert {"teacher", "ard", "step", "degradation_ratio"} <= read_json(workdir / "report" / "results.json").keys()


@pytest.mark.slow
def test_bringing_ones_own_teacher_as_written(tmp_path, monkeypatch):
    """The whole section, from a small teacher in the quickstart's place to pictures of its student."""
    assert smoke("teacher", tmp_path / "runs" / "quickstart", "diffusion.steps=25").status == 0
    monkeypatch.chdir(tmp_path)
    said = []
    page = "docs/OWN_TEACHER.md"
    for stage, *flags in stage_commands("runs/quickstart", page) + stage_commands("runs/mine", page):
        fewer = [f"--config.{setting}" for setting in FEWER.get(stage, ())]
        outcome = run(stage, *flags, *fewer)
        assert outcome.status == 0, outcome.err
        said.append((stage, outcome.out))
    assert [stage for stage, _ in said] == [
        "export", "convert", "convert", "trajectories", "distill", "sample", "export", "export"
    ]  # fmt: skip
    assert "a teacher that ard_jax exported" in said[1][1] and "8×8×1 (pixel), 10 classes" in said[1][1]
    mine, quickstart = tmp_path / "runs" / "mine", tmp_path / "runs" / "quickstart"
    assert done(mine / "teacher")["sha256"]["ema"] == done(quickstart / "teacher")["sha256"]["ema"]
    assert set(done(mine / "sample")["models"]) == {"teacher", "ard"}

    examples = {}
    exec(blocks("python", page)[0], examples)
    student, teacher, images, edited = (examples[name] for name in ("student", "teacher", "images", "edited"))
    assert student.model.steps == 4 and not teacher.is_student
    assert len(images) == 8 and len(edited) == 1 and {image.size for image in [*images, *edited]} == {(8, 8)}
    again = student([3, "7"], num_images_per_label=4, seed=0, output_type="np").images

    (arguments,) = commands("python runs/")
    environment = os.environ | {"PYTHONPATH": ""}
    outcome = subprocess.run(
        [sys.executable, f"runs/{arguments[0]}", *arguments[1:]], env=environment, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr
    drawn = np.asarray(Image.open("digits.png"), np.float32) / 255  # a three, then a seven, side by side or stacked
    assert drawn.size == 2 * 64
    first = drawn[:8, :8].reshape(8, 8, -1)[..., :1]
    np.testing.assert_allclose(first, again[0], atol=0.5 / 255 + 1e-6)  # image 0 of the seed, and of class 3


def test_the_short_way_to_ones_own_teacher_is_the_long_one():
    """But for what makes a small run of it."""
    long = stage_commands("runs/mine", "docs/OWN_TEACHER.md")
    short = stage_commands("runs/mine", "README.md")
    assert [command[0] for command in short] == ["convert", "trajectories", "distill"]
    for command in short:
        words = [word.replace("WEIGHTS", "runs/published/teacher.safetensors") for word in command]
        assert words in [[word for word in other if not word.startswith("--config.")] for other in long]


@pytest.mark.slow
def test_the_shipped_student_draws_as_written(monkeypatch):
    """A red heart is red where it is, and its teacher's is in the same place."""
    monkeypatch.chdir(ROOT)
    examples = {}
    exec(blocks("python", "README.md")[0], examples)
    teacher = examples["ARDPipeline"].from_pretrained("pipelines/openmoji-teacher")
    for picture in (examples["picture"], teacher("red heart").images[0]):
        pixels = np.asarray(picture).astype(int)
        assert pixels.shape == (32, 32, 3) and pixels[:3].min() > 200  # on white
        red, green, blue = pixels[10:16, 11:21].reshape(-1, 3).mean(axis=0)
        assert red > 180 and max(green, blue) < 110


@pytest.mark.slow
def test_encoding_as_written(tmp_path, monkeypatch):
    """Two pictures of two classes, through a small autoencoder of Stable Diffusion's shape."""
    monkeypatch.chdir(ROOT)
    write_vae(tmp_path / "vae", channels=3, latent_channels=4, widths=(4, 4, 4, 4))
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.fromarray(np.zeros((256, 300, 3), np.uint8)).save(tmp_path / "images" / label / "0.png")
    (words,) = stage_commands("runs/in256")
    stage, *flags = [str(word).replace("=DIR", f"={tmp_path / 'images'}") for word in words]
    flags[flags.index("--workdir") + 1] = str(tmp_path)
    outcome = run(stage, *flags, "--config.data.num_classes=2", "--config.encode.batch_size=2")
    assert outcome.status == 0, outcome.err
    assert done(tmp_path / "latents")["records"] == 4


@pytest.mark.slow
def test_planning_as_written(tmp_path, monkeypatch):
    """The laptop's own plan; of a slice's, for which libtpu takes minutes (see test_plan.py), the words alone."""
    monkeypatch.chdir(ROOT)
    laptop, pod = [words[1:] for words in commands("python -m ard_jax ") if words[0] == "plan"]
    outcome = run("plan", *laptop)
    assert outcome.status == 0 and "chip-hours" in outcome.out, outcome.err
    config, topology, file, *asked = parse_config(pod, FLAGS["plan"])
    assert config.model.name == "DiT-XL/2" and (topology, str(file), asked) == ("v5e:4x4", "plan.json", [False, False])
    chip, shape = topology.split(":")
    assert shape in SHAPES[chip]


def test_comparing_and_sweeping_as_written(monkeypatch):
    """All take minutes, so of the comparison the words alone, and of the sweeps what they would run."""
    monkeypatch.chdir(ROOT)
    (words,) = [words[1:] for words in commands("python -m ard_jax ") if words[0] == "compare"]
    config, workdir, quick = parse_config(words, FLAGS["compare"])
    assert len(config.compare.methods) == 9 and (str(workdir), quick) == ("runs/compare", True)
    trained = []
    for words in commands("python launch/sweep.py "):
        said = subprocess.run(
            [sys.executable, "launch/sweep.py", *words, "--print", "python"], capture_output=True, text=True, check=True
        ).stdout
        trained.append([stage for line in said.splitlines() if (stage := shlex.split(line)[3]) in TRAINED])
    assert trained == [["distill"] * 4, ["distill"] + ["finetune"] * 6]  # the masks', and the default recipe's


def test_the_maps_of_names_work_as_written(golden):
    names = golden("dit_tiny")
    examples = {
        "state_dict": names.state_dict(),
        "noise": np.zeros((1, 8, 8, 4), np.float32),
        "labels": np.zeros(1, np.int32),
    }
    (code,) = [block for block in blocks("python") if "from_torch" in block]
    exec(code, examples)
    assert examples["solution"].x0.shape == examples["solution"].xt.shape == (1, 25, 8, 8, 4)


@pytest.mark.parametrize("page", PAGES)
def test_what_it_names_exists(page):
    text, folder = TEXTS[page], (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (folder / link).exists(), link
    for script in re.findall(r"\b(?:launch|configs|ard_jax)/[\w/]+\.(?:sh|py)\b", text):
        assert (ROOT / script).exists(), script
    for key in re.findall(r"--config\.([\w.]+)=", text):
        assert key in known_keys(), key


def test_it_is_a_screen_and_a_half():
    assert len(TEXTS["README.md"].splitlines()) <= 115


@pytest.mark.parametrize("script", ["emoji.sh", "quickstart.sh", "test.sh"])
def test_the_commands_are_those_of_ci(script):
    assert f"launch/{script}" in blocks("bash", "README.md")[0]
    assert f"launch/{script}" in (pathlib.Path(ROOT) / ".ci" / "run").read_text()


@pytest.mark.slow
def test_a_pod_on_one_machine_as_written(pipeline, tmp_path):
    """Two processes draw from the models that one has trained."""
    ((count, *words),) = commands("launch/local_pod.sh ")
    words[words.index("--workdir") + 1] = str(copy(pipeline, tmp_path, "teacher", "trajectories", "distill"))
    subprocess.run(["launch/local_pod.sh", count, *words], cwd=ROOT, check=True)
    assert set(done(tmp_path / "sample")["models"]) == {"teacher", "ard"}


def test_the_demo_is_installed_and_started_as_written():
    """What benchmarks/first_minutes.py times; the page itself is in test_demo_page.py."""
    (line,) = [line for line in "".join(blocks("bash", "README.md")).splitlines() if line.startswith("pip install ")]
    extras, command, stage = re.fullmatch(r"pip install '\.\[([\w,]+)\]' && (\S+) (\w+)", line).groups()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(extras.split(",")) <= project["tool"]["setuptools"]["dynamic"]["optional-dependencies"].keys()
    assert command in project["project"]["scripts"] and stage in STAGES


def test_a_cloud_tpu_as_written():
    """Its rehearsal prints the commands, the stage's among them."""
    (words,) = commands("launch/tpu_pod.sh ")
    said = subprocess.run(["launch/tpu_pod.sh", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in said.splitlines() if line.startswith("gcloud compute tpus tpu-vm ")]
    assert any("create" in line for line in lines) and any("distill" in line for line in lines)
