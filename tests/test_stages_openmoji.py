"""OpenMoji from its captions to the report, as docs/OPENMOJI.md has it, and the pipelines that are shipped."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from pipeline_fixtures import ROOT, run, sentence

from ard_jax import ARDPipeline
from ard_jax.errors import UserError
from ard_jax.files import file_sha256, read_json, read_npz
from ard_jax.pipeline.files import WEIGHTS
from configs.openmoji import SHIPPED

DOCUMENT = (ROOT / "docs" / "OPENMOJI.md").read_text()
SMALL = ("model.hidden_size=24", "model.depth=2", "model.num_heads=2")
FEWER = {  # settings that make a command short, by stage
    "teacher": ("teacher.steps=3", "teacher.batch_size=8", "teacher.optimizer.warmup_steps=0"),
    "trajectories": ("trajectories.count=16", "trajectories.batch_size=8"),
    "distill": ("distill.steps=3", "distill.batch_size=4", "distill.optimizer.warmup_steps=0"),
    "sample": ("sample.count=90", "sample.held_out=10"),
    "evaluate": ("evaluate.paired=8", "evaluate.pictures=4", "evaluate.judge_steps=3", "evaluate.feature_steps=3"),
}
EVERY = [f"--config.{setting}" for settings in (SMALL, *FEWER.values()) for setting in settings]


def run_documented(name, workdir, monkeypatch, settings):
    """Runs the page's commands whose workdir is runs/`name` in `workdir`; returns their stages."""
    monkeypatch.chdir(ROOT)
    ran = []
    for line in re.findall(rf"^python -m ard_jax (.* --workdir runs/{name}(?: .*)?)$", DOCUMENT, re.MULTILINE):
        stage, *flags = shlex.split(line)
        flags[flags.index("--workdir") + 1] = str(workdir)
        outcome = run(stage, *flags, *(settings if stage != "convert" else ()))
        assert outcome.status == 0, outcome.err
        ran.append(stage)
    return ran


@pytest.mark.slow
def test_the_stages_run_as_documented(tmp_path, monkeypatch):
    ran = run_documented("openmoji", tmp_path, monkeypatch, EVERY)
    assert ran == ["captions", "teacher", "trajectories", "distill", "distill", "sample", "evaluate", "report"]
    labels = read_npz(tmp_path / "sample" / "ard" / "samples.npz")["labels"]
    assert labels[:80].max() < 3749 and labels[80:].tolist() == [*range(3749, 3759)]
    found = read_json(tmp_path / "report" / "results.json")
    assert found["real_images"] == 3749 and found["samples"] == 80
    for name in ("teacher", "ard", "step"):
        assert set(found[name]["recall_at_5"]) == {"trained", "held_out"}
        assert found[name]["fd"] > found[name]["fd_least"] == found["teacher"]["fd_least"] > 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Captions held out of training" in page
    drawn = [f'alt="{title} after step {step}"' for title in ("Teacher", "ARD", "Step distillation") for step in (0, 3)]
    assert all(page.count(picture) == 1 for picture in drawn)  # while they were trained
    gallery = read_npz(tmp_path / "evaluate" / "gallery.npz")
    assert gallery["real"].shape == gallery["ard"].shape == (8, 32, 32, 3)


@pytest.mark.slow
def test_students_of_the_shipped_teacher_are_trained_as_documented(tmp_path, monkeypatch):
    few = [f"--config.{setting}" for stage in ("trajectories", "distill") for setting in FEWER[stage]]
    ran = run_documented("openmoji_cpu", tmp_path, monkeypatch, few)
    assert ran == ["convert", "captions", "trajectories", "distill", "distill"]
    masks = [read_json(tmp_path / "distill" / name / "config.json")["student"]["mask"] for name in ("ard", "step")]
    assert masks == ["causal", "diagonal"]


@pytest.mark.slow
def test_groups_are_classes_of_a_run(tmp_path):
    def stage(name):
        flags = [flag for flag in EVERY if "held_out" not in flag]
        return run(name, "--config", "configs/openmoji.py:told=groups", "--workdir", str(tmp_path), *flags)

    for name in ("teacher", "trajectories", "distill", "sample", "evaluate"):
        outcome = stage(name)
        assert outcome.status == 0, outcome.err
    assert read_json(tmp_path / "teacher" / "data.json")["classes"][9] == "Flags"
    results = read_json(tmp_path / "evaluate" / "results.json")
    assert "small classifier" in results["features"] and "judge" not in results


# ------------------------------------------------------------------------------------------------------ shipped


def test_what_is_shipped_is_what_the_config_says():
    assert len(SHIPPED) == 2
    for name, sha256 in SHIPPED.items():
        path = ROOT / name / WEIGHTS
        assert file_sha256(path) == sha256
        folder = path.parents[1]
        assert read_json(folder / "done.json")["sha256"][str(path.relative_to(folder))] == sha256
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlicense: cc-by-sa-4.0\n") and "OpenMoji (openmoji.org), under CC BY-SA 4.0" in card
    everything = [path for path in (ROOT / "pipelines").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in everything) < 24e6


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_that_were_altered_are_refused(name, tmp_path):
    path = pathlib.Path(name) / WEIGHTS
    folder = tmp_path / path.parts[1]
    shutil.copytree(ROOT / path.parent.parent, folder)
    weights = folder.joinpath(*path.parts[2:])
    altered = bytearray(weights.read_bytes())
    altered[-1000] ^= 1
    weights.write_bytes(altered)
    with pytest.raises(UserError, match=r"is not the file that was exported \(its SHA-256 is not [0-9a-f]{12}…\)"):
        ARDPipeline.from_pretrained(folder)
    said = sentence(run("convert", "--source", str(folder), "--workdir", str(tmp_path / "run")), "convert")
    assert "is not the file that was exported" in said and not (tmp_path / "run").exists()


def test_both_join_one_workdir(tmp_path):
    """A student of noisy points wants a store that keeps them, and the config that convert writes says so."""
    for name, flags in (("openmoji-teacher", ()), ("openmoji-ard", ("--name", "shipped"))):
        outcome = run("convert", "--source", str(ROOT / "pipelines" / name), "--workdir", str(tmp_path), *flags)
        assert outcome.status == 0, outcome.err
    assert read_json(tmp_path / "distill" / "shipped" / "config.json")["student"]["target"] == "xt"
    assert "keep_noisy=True," in (tmp_path / "config.py").read_text()


@pytest.mark.slow
def test_words_that_no_caption_has_are_refused_and_others_drawn(tmp_path):
    def draw(*flags):
        script = [sys.executable, "-m", "examples.draw_emoji", "--out", str(tmp_path / "drawn.png"), *flags]
        return subprocess.run(script, cwd=ROOT, capture_output=True, text=True)

    outcome = draw("--prompt", "red heart", "--prompt", "qwxzt")
    assert outcome.returncode == 1 and not (tmp_path / "drawn.png").exists()
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert "no word of the prompt 'qwxzt' is in any of OpenMoji's captions" in line
    outcome = draw("--prompt", "Red heart")
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "drawn.png").exists()


@pytest.mark.slow
def test_the_shipped_pipelines_heed_their_captions():
    """The student of four calls draws close to its teacher, and nearer to it than to pictures of other captions."""
    captions = ["red heart", "blue square", "grinning face", "flag of Japan", "woman astronaut dark skin tone"]
    drawn = [
        ARDPipeline.from_pretrained(ROOT / "pipelines" / name)(captions, seed=0, output_type="np").images
        for name in ("openmoji-teacher", "openmoji-ard")
    ]
    apart = np.square(drawn[0][:, None] - drawn[1][None]).mean(axis=(2, 3, 4))
    assert (apart.argmin(axis=0) == np.arange(len(captions))).all()
