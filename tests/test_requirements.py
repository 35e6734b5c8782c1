"""The base requirements open, convert and export a model; the extra train runs the stages."""

import ast
import importlib.metadata
import re
import subprocess
import sys

import pytest
from pipeline_fixtures import ROOT
from test_architecture import arrows, modules

ELSEWHERE = {"mlflow": "mlflow-skinny"}


def required(*files: str) -> set[str]:
    """Distributions that files of requirements/ name."""
    lines = [line for file in files for line in (ROOT / "requirements" / f"{file}.txt").read_text().splitlines()]
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines)
    return {normal(name[0]) for name in names if name}


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def imported(body: list[ast.stmt]) -> set[str]:
    """First names of the modules that these statements import."""
    found = set()
    for node in body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def distributions(names: set[str]) -> set[str]:
    known = importlib.metadata.packages_distributions()
    others = names - set(sys.stdlib_module_names) - {"ard_jax"}
    # one that is not installed goes by its own name, or by the one that brings it
    return {normal(known.get(name, [ELSEWHERE.get(name, name)])[0]) for name in others}


@pytest.mark.parametrize("entry", ["pipeline", "stages.convert", "stages.export", "command_line"])
def test_the_base_requirements_are_enough_to_import(entry):
    graph, paths, reached, new = arrows(anywhere=False), modules(), set(), {entry}
    while new:
        reached |= new
        new = {other for module in new for other in graph[module]} - reached
    at_import = set().union(*(imported(ast.parse(paths[module].read_text()).body) for module in reached))
    assert distributions(at_import) <= required("base")


def test_every_import_is_required():
    everywhere = [list(ast.walk(ast.parse(path.read_text()))) for path in modules().values()]
    assert distributions(set().union(*map(imported, everywhere))) <= required(
        "base", "train", "convert", "text", "emoji", "demo", "wandb", "mlflow"
    )


def test_a_pipeline_imports_no_more_than_it_needs():
    """What reads data, trains and measures would double the time that the import takes."""
    loaded = "import sys; from ard_jax import ARDPipeline; print(*{name.split('.')[0] for name in sys.modules})"
    said = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    slow = {"clu", "grain", "matplotlib", "pandas", "scipy", "sklearn", "tensorflow", "tensorflow_datasets"}
    assert not slow & set(said.split()) and "ard_jax" in said.split()
