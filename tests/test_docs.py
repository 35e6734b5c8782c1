"""The documentation: every setting is in its table, what troubleshooting quotes is in the code, links lead somewhere,
the commands run, and the site builds and asks nothing of the net."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image
from pipeline_fixtures import ROOT, done, run

from ard_jax.__main__ import STAGES
from ard_jax.config import ROWS
from ard_jax.files import read_json
from ard_jax.shell import flags_of

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
HOW_TO = (DOCS / "HOW_TO.md").read_text()


def hook(name):
    """A module of docs/hooks, as mkdocs imports it."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings():
    """The page of every setting, and its rows by key: the cells after it."""
    page = hook("config_reference").page()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return page, {cells[0].strip("`"): cells[1:] for cells in rows}


def test_every_setting_stands_in_the_table_with_its_default(settings):
    _, rows = settings
    assert list(rows) == list(ROWS)
    for key, row in ROWS.items():
        assert ast.literal_eval(rows[key][0].strip("`")) == row.default, key
        assert set(re.findall(r"\w+", rows[key][-1].partition(";")[0])) == row.changes, key


def test_every_comment_of_the_settings_is_in_the_table(settings):
    source = (ROOT / "ard_jax" / "config.py").read_text()
    block = source[source.index("def _optimizer(") : source.index("def flatten(")]
    comments = [said for said in re.findall(r"^[^\n#]*# (.+)$", block, re.MULTILINE) if not said.startswith("---")]
    assert len(comments) > 120
    page = settings[0].casefold().replace("\\|", "|")
    assert not [said for said in comments if said.casefold() not in page]


def test_no_setting_lacks_a_comment_of_its_own(settings):
    """What is said of an optimiser is said before what is said of each of its rows."""
    said = hook("config_reference").comments()
    assert [key for key in ROWS if len(said.get(key, "").split()) < 2] == []
    assert not [key for key, cells in settings[1].items() if not cells[1].strip()]


def test_a_comment_is_of_its_own_row(settings):
    _, rows = settings
    assert "no more: the discriminator's norm" in rows["finetune.accumulate"][1]
    assert rows["finetune.checkpoint_every"][1].startswith("steps; with fewer, less is lost")
    assert rows["student.kind"][1].endswith("with fresh noise after each step")
    assert rows["run.keep_best"][1].startswith("and, while `watch` looks on")
    assert rows["run.poll"][1] == "seconds after which `watch` looks for checkpoints again"
    assert rows["teacher.optimizer.clip"][1:] == ["global gradient norm; 0 for none", "", "teacher; *until its end*"]
    assert rows["distill.distribution_matching.optimizer.clip"][1].startswith("of the fake score; global")
    assert rows["student.target"][2] == "x0 (predicted x0) or xt (noisy points)"


def sentences():
    """Strings of the code, … in place of what is filled in."""
    for path in sorted((ROOT / "ard_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[sd]", "…", node.value)
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_what_troubleshooting_quotes_is_said_by_the_code():
    quoted = re.findall(r"^> (.+)$", (DOCS / "TROUBLESHOOTING.md").read_text(), re.MULTILINE)
    code = "\n".join(sentences())
    assert len(quoted) > 30
    assert not [sentence for sentence in quoted if sentence not in code]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere_on_disk_and_in_the_menu_of_the_site(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert not [link for link in links if not link.startswith("https:") and not (DOCS / link).exists()]
    assert f": {page.name}\n" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_commands_say_what_there_is_to_say(page):
    """Those too that want weights or machines that are not here: a stage, its flags, settings and a config."""
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL) for line in block.splitlines()
    ]
    for line in lines:
        for said in re.findall(r"(?:^|&& )(?:python -m ard_jax|ard-jax) (.*)", line):
            stage, *words = shlex.split(said, comments=True)
            assert stage in (*STAGES, "completion"), line
            known = [flag.rstrip("=") for flag in flags_of(stage)] if stage in STAGES else []
            assert not [word for word in words if word.startswith("--") and word.partition("=")[0] not in known], line
            configs = [word.partition(":")[0] for word in words if word.startswith("configs/")]
            assert all((ROOT / config).is_file() for config in configs), line


@pytest.mark.slow
def test_the_commands_of_how_to_run_as_written(tmp_path, monkeypatch):
    """In their order; only the folder of pictures is made for them."""
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "PICTURES" / name).mkdir(parents=True)
        for shade in range(8):
            Image.new("L", (9, 8), 20 * shade + number).save(tmp_path / "PICTURES" / name / f"{shade}.png")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", HOW_TO, re.DOTALL) for line in block.splitlines()]
    for line in lines:
        start, stage, *flags = line.partition("-m ard_jax ")[0], *shlex.split(line.partition("-m ard_jax ")[2])
        outcome = run(stage, *flags)
        assert start == "python " and outcome.status == 0, (line, outcome.err)
    assert len(lines) == 5
    assert done(tmp_path / "runs" / "longer" / "teacher")["step"] == 10
    (config,) = re.findall(r"```python\n(.*?)```", HOW_TO, re.DOTALL)
    (tmp_path / "pictures.py").write_text(config)
    again = run("teacher", "--config", "pictures.py", "--workdir", "runs/pictures")
    assert again.status == 0 and "resuming at step 20 of 20" in again.err, again.err
    data = read_json(tmp_path / "runs" / "pictures" / "teacher" / "config.json")["data"]
    assert (data["source"], data["num_classes"]) == ("folder", 2)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs: pip install '.[docs]'")
def test_the_site_builds_strictly_and_asks_nothing_of_the_net(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "CONFIG.html", "source/benchmarks/RESULTS.html", "api/objectives.html"} <= set(pages)
    for name, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=[\"']?([^\"' >]+)", text)
        loaded += re.findall(r"<link[^>]*rel=[\"']?(?:stylesheet|icon|preconnect)[\"']?[^>]*>", text)
        assert loaded and not [where for where in loaded if "//" in where], name
    assert 'href="CONFIG.html"' in pages["index.html"]  # what is ard_jax/config.py on disk
    found = read_json(tmp_path / "search" / "search_index.json")["docs"]
    boosts = {entry["location"].partition("#")[0]: entry.get("boost", 1) for entry in found}
    assert max(boosts, key=boosts.get) == "TROUBLESHOOTING.html"
    assert not [location for location in boosts if location.startswith("source/ard_jax")]
    assert "teacher_forcing" in pages["source/ard_jax/objectives/ard.py.html"]
    for name in ("frechet_distance", "precision_recall", "Judge"):
        assert f'id="ard_jax.evaluation.{name}"' in pages["api/evaluation.html"]
