"""docs/EVALUATION.md: every command as it stands there, on tiny random files with the published names and formats."""

import re
import shlex

import numpy as np
import pytest
from pipeline_fixtures import ROOT, run
from pixart_fixtures import write_pixart
from test_needs_weights import NEEDED
from test_prompted import TEXTS, write_clip
from test_stages_captions import SMALL as SMALL_PIXART

from ard_jax.evaluation import adm
from ard_jax.files import read_json
from ard_jax.measuring import inception

DOCUMENT = (ROOT / "docs" / "EVALUATION.md").read_text()
OF_PROMPTS = ("sample.models=('teacher',)", "sample.per_prompt=2", "sample.batch_size=4", "diffusion.steps=34")


def lines():
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.oracle  # the published files are PyTorch's
def test_the_way_to_the_table_runs_as_written(tmp_path, monkeypatch):
    """And finds the same in three ways: drawn by watch, read by evaluate, of a file alone."""
    toy_imagenet = pytest.importorskip("benchmarks.toy_imagenet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # a root and an interval of thousands of features, which take half a minute each
    monkeypatch.setattr(adm, "_square_root", lambda product: np.diag(np.sqrt(np.abs(np.diagonal(product)))))
    monkeypatch.setattr(inception, "batch_size", lambda: 6)
    monkeypatch.setattr(inception, "influence", lambda real, own, features: np.zeros(len(features)))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "toy"
    seconds = toy_imagenet.run_all(folder, toy_imagenet.Size(6, 8), kill=False)
    assert [name.split()[1] for name in seconds] == [
        "evaluate", "convert", "convert", "trajectories", "distill", "distill", "watch", "export", "sample", "evaluate",
        "report", "evaluate",
    ]  # fmt: skip
    found = toy_imagenet.found(folder)
    assert found.keys() == {
        "teacher",
        "ard",
        "step",
        "ard at step 2, by watch",
        "ard at step 4, by watch",
        "ard's file",
    }
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        of = [found[key][name] for key in ("ard", "ard at step 4, by watch", "ard's file")]
        assert of == pytest.approx([of[0]] * 3, rel=1e-4) and np.isfinite(of).all(), name
    assert found["ard"]["fid"] != found["ard at step 2, by watch"]["fid"] != found["teacher"]["fid"]
    results = read_json(folder / "runs" / "in256" / "evaluate" / "results.json")
    assert results["labels"] == "balanced" and results["measured_with"]["features"] == "inception-2015-12-05"
    page = (folder / "runs" / "in256" / "report" / "index.html").read_text()
    assert "Paper: ARD" not in page  # random weights compare with nothing
    for said in ("sFID", "IS", "95 % interval", "balanced"):
        assert said in page, said


@pytest.mark.slow
def test_lists_of_prompts_are_drawn_and_judged_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_pixart(tmp_path / "pixart")
    assert run("convert", "--source", "pixart", "--workdir", "runs/sigma").status == 0
    (tmp_path / "color_val.txt").write_text("\n".join(TEXTS))
    told = ("captions.source=file", "captions.path=color_val.txt", "captions.encoder=pixart", *SMALL_PIXART)
    settings = [f"--config.{setting}" for setting in told]
    outcome = run("captions", "--config", "configs/pixart_sigma_1024.py", "--workdir", "runs/sigma", *settings)
    assert outcome.status == 0, outcome.err
    (tmp_path / "clip-vit-base-patch32").mkdir()
    write_clip(tmp_path / "clip-vit-base-patch32")
    shorter = [f"--config.{setting}" for setting in (*SMALL_PIXART, *OF_PROMPTS)]
    others = {flag.partition("=")[0] for flag in shorter}
    asked = [words for words in lines() if "runs/sigma" in words]
    assert [words[3] for words in asked] == ["sample", "evaluate"]
    for words in asked:
        outcome = run(*[word for word in words[3:] if word.partition("=")[0] not in others], *shorter)
        assert outcome.status == 0, outcome.err
    adherence = read_json(tmp_path / "runs" / "sigma" / "prompts" / "color_val" / "evaluate" / "adherence.json")
    assert adherence["models"]["teacher"].keys() == {"clip_score", "compbench_non_spatial", "ema_sha256"}


def test_the_published_row_is_asked_for_as_its_test_wants():
    (words,) = (words for words in lines() if words[0] != "python")
    named = dict(word.split("=", 1) for word in words[: words.index("python")])
    assert named.keys() == NEEDED.keys() and all(named[key] in NEEDED[key] for key in named)
    assert words[len(named) :] == ["python", "-m", "pytest", "-m", "needs_weights"]


def test_what_it_names_is_there():
    from ard_jax.captions.layouts import LAYOUTS
    from ard_jax.command_line import known_keys
    from ard_jax.prompted import SCORES

    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in DOCUMENT.splitlines() if line.startswith("| `")]
    first = {names[0] for names in rows}
    assert LAYOUTS.keys() <= first and SCORES.keys() <= first
    for layout, number in re.findall(r"^\| `(\w+)` \|[^|]+\| (\d+) \|", DOCUMENT, re.MULTILINE):
        assert LAYOUTS[layout].each == int(number), layout
    for key in re.findall(r"`((?:sample|evaluate|run)\.\w+)", DOCUMENT):
        assert key in known_keys(), key
