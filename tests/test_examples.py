"""The notebooks of examples/ run from their first cell to their last, and show what they say."""

import base64
import io
import re

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import ROOT, done

from ard_jax import ARDPipeline

NOTEBOOK, COLAB = (ROOT / "examples" / f"{name}.ipynb" for name in ("pipeline", "colab"))


@pytest.fixture(scope="module")
def cells(pipeline):
    """The notebook's code cells by name, run on the smoke run's models from the folder that it lies in."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARD_JAX_RUN", str(pipeline))
        patch.setenv("PYTHONPATH", str(ROOT))
        resources = {"metadata": {"path": NOTEBOOK.parent}}
        nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def said(cell) -> str:
    """What a cell prints."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def shown(cell) -> np.ndarray:
    """The picture that a cell ends with."""
    (result,) = (output for output in cell.outputs if output.output_type == "execute_result")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(result.data["image/png"]))))


def pictures(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The 8×8 pictures of a grid, (rows · columns, 8, 8): each is enlarged 8 times, with gutters of 2 between them."""
    assert grid.shape == (66 * rows - 2, 66 * columns - 2)
    places = [(66 * row, 66 * column) for row in range(rows) for column in range(columns)]
    return np.stack([grid[top : top + 64 : 8, left : left + 64 : 8] for top, left in places])


@pytest.mark.slow
def test_it_shows_what_the_pipelines_make(cells, pipeline):
    student = ARDPipeline.from_pretrained(pipeline / "distill" / "ard")
    teacher = ARDPipeline.from_pretrained(pipeline / "teacher")
    assert said(cells["open"]) == f"{student}\n{teacher}\n"
    assert said(cells["draw"]) == "classes: [3, 3, 3, 3, 5, 5, 5, 5, 8, 8, 8, 8]\n"
    drawn = student([3, 5, 8], num_images_per_label=4, seed=0)
    np.testing.assert_array_equal(pictures(shown(cells["draw"]), 3, 4), np.stack(drawn.images))
    steps = student([3, 5, 8], seed=0, return_trajectory=True).trajectory
    assert said(cells["trajectory"]) == "steps: 3\n"
    strip = pictures(shown(cells["trajectory"]), 3, 3)
    np.testing.assert_array_equal(strip, [np.asarray(step) for row in steps for step in row])
    assert said(cells["edits"]) == "edits: 2\n"
    source, first, second = pictures(shown(cells["edits"]), 1, 3)
    np.testing.assert_array_equal(source, strip[2])
    np.testing.assert_array_equal(second, student.edit(source, 2, 8, seed=1).images[0])
    fast, slow = (np.stack(pipe([3, 5, 8]).images).astype(float) for pipe in (student, teacher))
    np.testing.assert_array_equal(pictures(shown(cells["compare"]), 2, 3), [*fast, *slow])
    difference = np.abs(fast - slow).mean()
    assert said(cells["compare"]) == f"mean difference: {difference:.2f} of 255 grey levels\n" and difference > 1
    heun = teacher([3, 5, 8], solver="heun", num_inference_steps=5, guidance_scale=3.0).images
    np.testing.assert_array_equal(pictures(shown(cells["heun"]), 1, 3), np.stack(heun))


SMALL = (
    "trajectories.count=16", "trajectories.batch_size=16", "distill.steps=3", "distill.batch_size=4",
    "distill.optimizer.warmup_steps=0",
)  # fmt: skip


@pytest.mark.slow
def test_a_student_of_ones_own_from_the_shipped_teacher(tmp_path, monkeypatch):
    """From what this machine is to the export, with nobody logged in."""
    notebook = nbformat.read(COLAB, as_version=4)
    for name in ("ARD_JAX_REPOSITORY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ARD_JAX_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("ARD_JAX_SETTINGS", " ".join(f"--config.{setting}" for setting in SMALL))
    monkeypatch.setenv("ARD_JAX_PUSH", "me/mine")
    resources = {"metadata": {"path": COLAB.parent}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert said(cells["device"]) == "runtime: cpu\n" and said(cells["jax"]) == "jax works on: cpu\n"
    assert said(cells["install"]) == "installed: everything is here already\n"
    costs = re.findall(r"^([\w ]+): 4 pictures, (\d+) calls", said(cells["teacher"]), re.MULTILINE)
    assert costs == [("Teacher", "48"), ("Shipped student", "4")]
    assert done(tmp_path / "run" / "distill" / "ard")["step"] == 3
    assert said(cells["look"]) == "rows: Teacher, Shipped student, Your student\n"
    before, after = shown(cells["teacher"]), shown(cells["look"])
    assert after.shape[1] == before.shape[1] and after.shape[0] > 1.3 * before.shape[0]  # a row more
    exported = ARDPipeline.from_pretrained(tmp_path / "run" / "export" / "ard" / "pipeline")
    assert said(cells["export"]).endswith(f"{exported}\n")
    picture = shown(cells["export"])[::4, ::4]
    np.testing.assert_array_equal(picture, np.asarray(exported("fire", seed=1).images[0]))
    assert said(cells["push"]) == "not pushed: no token, so log in first\n"


@pytest.mark.parametrize("path, cells", [(NOTEBOOK, 6), (COLAB, 8)], ids=lambda value: getattr(value, "stem", None))
def test_they_are_stored_without_outputs(path, cells):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == cells and not any(cell.outputs or cell.execution_count for cell in code)


def test_the_one_on_digits_opens_what_the_quickstart_makes():
    code = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert '"../runs/quickstart"' in code[0].source and (ROOT / "launch" / "quickstart.sh").exists()
