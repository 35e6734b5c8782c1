"""What is given to others: the wheel and the sdist, and what stands beside them."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import numpy as np
import pytest
from pipeline_fixtures import ROOT, copy, run, smoke

from ard_jax import ARDPipeline
from ard_jax.version import __version__

# Beside what git tracks, in a folder that somebody works in.
NOT_OURS = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "shared")
DRAW = """
import sys
import numpy as np
import ard_jax
images = ard_jax.ARDPipeline.from_pretrained(sys.argv[1])(class_labels=[3, 7], seed=0, output_type="np").images
np.save(sys.argv[2], images)
print(ard_jax.__file__)
"""


def test_the_version_is_the_same_everywhere():
    changes = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert (changes[0], citation) == (__version__, [__version__])


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> pathlib.Path:
    """A folder with the sdist, and the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(ROOT, folder / "tree", ignore=NOT_OURS)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "tree"]
    made = subprocess.run(build, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> pathlib.Path:
    """The commands of an environment that has the wheel, and what it requires from the tests' own."""
    home = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, *dist.glob("*.whl")], check=True)
    site = pathlib.Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    ours = [path for path in sys.path if pathlib.Path(path).name == "site-packages"]
    (site / "tests.pth").write_text("\n".join(ours) + "\n")  # they come after the wheel
    return home / "bin"


def elsewhere(*command: str | os.PathLike, cwd: pathlib.Path) -> str:
    """What a command prints in a folder from which this tree is not seen."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


@pytest.mark.slow
def test_the_wheel_has_what_the_package_reads(dist):
    """Every file of ard_jax/, templates and lists too, and nothing else of the repository."""
    (wheel,) = dist.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "ard_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert inside == {str(path.relative_to(ROOT)) for path in files}


@pytest.mark.slow
def test_the_sdist_has_what_the_wheel_leaves_out(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("configs", "docs", "launch", "pipelines", "requirements", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert wanted | {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "requirements.txt"} <= inside


@pytest.mark.slow
def test_an_installed_wheel_draws_what_this_tree_draws(installed, pipeline, tmp_path):
    folder = tmp_path / "student"
    export = run("export", "--workdir", pipeline, "--model", "ard", "--format", "pipeline", "--output", folder)
    assert export.status == 0, export.err
    said = elsewhere(installed / "python", "-c", DRAW, folder, tmp_path / "drawn.npy", cwd=tmp_path)
    assert pathlib.Path(said.strip()).is_relative_to(installed.parent)
    here = ARDPipeline.from_pretrained(folder)(class_labels=[3, 7], seed=0, output_type="np").images
    np.testing.assert_array_equal(np.load(tmp_path / "drawn.npy"), here)


@pytest.mark.slow
def test_the_command_of_an_installed_wheel(installed, pipeline, tmp_path):
    """Its words, and a stage that reads a config from the folder it is started in and templates from the wheel."""
    command = installed / "ard-jax"
    assert elsewhere(command, "--help", cwd=tmp_path) == run("--help").out
    workdir = copy(pipeline, tmp_path / "run", "teacher", "trajectories", "distill", "sample", "evaluate")
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=NOT_OURS)
    elsewhere(command, "report", "--config", "configs/smoke.py", "--workdir", workdir, cwd=tmp_path)
    page = (workdir / "report" / "index.html").read_text()
    assert smoke("report", workdir).status == 0
    assert page == (workdir / "report" / "index.html").read_text()
