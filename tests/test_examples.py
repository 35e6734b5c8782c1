"""The notebooks of examples/ run from their first cell to their last, and show what they say."""

import base64
import io

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import ROOT

from ard_jax import ARDPipeline

NOTEBOOK = ROOT / "examples" / "pipeline.ipynb"


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


def test_it_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == 6 and not any(cell.outputs or cell.execution_count for cell in code)
    assert '"../runs/quickstart"' in code[0].source and (ROOT / "launch" / "quickstart.sh").exists()
