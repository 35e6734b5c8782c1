"""Who may import whom: the contracts in pyproject.toml, which docs/ARCHITECTURE.md shows as a table of rooms."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

from pipeline_fixtures import ROOT

CONTRACTS = {
    contract["id"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}


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


def test_the_contracts_hold():
    lint = [pathlib.Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    outcome = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken." in outcome.stdout


def test_the_page_shows_the_floors_of_the_contract():
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / "docs" / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    shown = [{name.rstrip("/") for name in re.findall(r"`(\w+)/?`", rooms)} for _, rooms in rows]
    assert [int(number) for number, _ in rows] == [*reversed(range(len(rows)))]
    assert shown == [set(layer.split(" | ")) for layer in CONTRACTS["floors"]["layers"]]


def test_there_is_no_circle_of_a_package_and_its_modules():
    """Either it gathers them, or they read it; the contracts compare siblings alone."""
    graph = arrows()
    while free := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph


def test_config_stands_alone():
    assert imports(ROOT / "ard_jax" / "config.py", set(modules())) == {"errors"}
