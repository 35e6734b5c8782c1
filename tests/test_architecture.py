"""Who may import whom: docs/ARCHITECTURE.md's rooms, held against the imports that the code has."""

import ast
import pathlib

from pipeline_fixtures import ROOT

# From the ground up: a room may import those on lines before its own, and what stands on one line knows each other not.
FLOORS = (
    ("errors", "keys", "types", "version"),
    ("config", "progress", "chips", "conditions"),
    ("files",),
    ("doctor", "results", "sharded", "weights"),
    ("models", "data", "hosts", "evaluation", "report", "curve"),
    ("diffusion", "text"),
    ("parallel",),
    ("sampling",),
    ("objectives",),
    ("training",),
    ("build",),
    ("checks", "convert"),
    ("methods", "text_encoders", "workdir"),
    ("captions", "drawing", "snapshots", "trajectories"),
    ("completion", "measuring", "paired", "plan", "pipeline"),
    ("demo", "runner"),
    ("entries", "prompted"),
    ("stages",),
    ("command_line",),
    ("shell", "sweep"),
    ("__main__", "__init__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, pathlib.Path]:
    """Every module of the package by its dotted name below ard_jax; a package by its own."""
    paths = sorted((ROOT / "ard_jax").rglob("*.py"))
    names = {path: ".".join(path.relative_to(ROOT / "ard_jax").with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports(path: pathlib.Path, known: set[str], anywhere: bool = True) -> set[str]:
    """Modules of ours that a file imports, anywhere in it or when it is imported itself."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ard_jax":
            inner = node.module.removeprefix("ard_jax").lstrip(".")
            for alias in node.names:
                one = f"{inner}.{alias.name}".lstrip(".")
                found.add(one if one in known else inner or "__init__")
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("ard_jax.") for alias in node.names if alias.name.startswith("ard_jax.")}
    return found


def arrows(anywhere: bool = True) -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, set(known), anywhere) - {name} for name, path in known.items()}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_has_its_floor():
    assert {room(module) for module in modules()} == set(FLOOR)


def test_no_arrow_goes_up():
    upward = [
        f"{module} imports {other}"
        for module, others in arrows().items()
        for other in others
        if room(module) != room(other) and FLOOR[room(other)] >= FLOOR[room(module)]
    ]
    assert not upward


def test_there_is_no_circle():
    graph = arrows()
    while free := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in free:
            del graph[module]
    # a package and its modules: the package gathers them, and they never read it
    assert not graph


def test_nobody_imports_a_stage():
    assert not [module for module, others in arrows().items() if any(room(other) == "stages" for other in others)]


def test_config_stands_alone():
    assert imports(ROOT / "ard_jax" / "config.py", set(modules())) == {"errors"}
