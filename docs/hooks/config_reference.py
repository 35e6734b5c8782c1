"""The page of every setting, made from the rows and comments of ard_jax/config.py, so that nothing is written twice.

A comment is of the row on whose line it stands, or of the row that begins below it.
"""

import ast
import io
import json
import tokenize
from collections.abc import Iterator
from typing import Any

from ard_jax import config
from ard_jax.config import CHANGES, ROWS, Setting

HEAD = """# Every setting

This page is made from `ard_jax/config.py` whenever the site is built. A file in `configs/` starts from these
defaults and changes what its experiment needs; the command line overrides single keys:
`--config.student.history_layers=2`. Where no values are given, the module that reads a setting checks it, and
says in one sentence what it may be.

The last column says what is made anew if a setting changes: a stage; `network`, what a teacher's trained weights mean;
`store`, what trajectories mean; `request`, what is asked for, where everything that is there stays good; or `nothing`,
which may differ between two starts of the same run. A setting marked *may grow* may be larger when a run goes on, one
marked *until its end* may be another for as long as the run has not ended.
"""
LATER = {"larger": "*may grow*", "unfinished": "*until its end*"}


def comments() -> dict[str, str]:
    """What config.py says of each setting and section, by dotted key; keys without a comment are left out."""
    with open(config.__file__, encoding="utf-8") as file:
        source = file.read()
    lines = _comment_lines(source)
    dicts = {name: tree for name, tree in _dicts(ast.parse(source))}
    found = ((key, _comment(first, last, lines)) for key, first, last in _entries(dicts["SETTINGS"], dicts))
    return {key: said for key, said in found if said}


def _comment_lines(source: str) -> dict[int, tuple[str, bool]]:
    """Line number → comment, and whether it has the line to itself."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _dicts(module: ast.Module) -> Iterator[tuple[str, ast.Dict]]:
    """Names of variables and functions on top of a module that are, or give back, a dict written there."""
    for node in module.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Dict):
            yield node.target.id, node.value
        last = node.body[-1] if isinstance(node, ast.FunctionDef) else None
        if isinstance(last, ast.Return) and isinstance(last.value, ast.Dict):
            yield node.name, last.value


def _entries(tree: ast.Dict, dicts: dict[str, ast.Dict], prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """(dotted key, its first line, the line on which its own comment may end it) of a dict and those within it."""
    for key, value in zip(tree.keys, tree.values, strict=True):
        called = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
        inner = value if isinstance(value, ast.Dict) else dicts.get(called)
        if key is None:  # **_optimizer(…)
            yield from _entries(inner, dicts, prefix)
            continue
        name = prefix + ast.literal_eval(key)
        yield name, key.lineno, value.lineno if isinstance(value, ast.Dict) else value.end_lineno
        if inner:
            yield from _entries(inner, dicts, f"{name}.")


def _comment(first: int, last: int, lines: dict[int, tuple[str, bool]]) -> str:
    """The comment lines right above `first`, then that at the end of `last`."""
    above = first
    while lines.get(above - 1, ("", False))[1]:
        above -= 1
    return " ".join(lines[line][0] for line in (*range(above, first), last) if line in lines)


def page() -> str:
    """The page in Markdown: a table a section, in the order of config.py."""
    said, parts = comments(), [HEAD]
    for section in dict.fromkeys(key.split(".")[0] for key in ROWS):
        rows = {key: row for key, row in ROWS.items() if key.split(".")[0] == section}
        about = said.get(section, "") if section not in ROWS else ""
        parts += [f"## {section}\n", *([_sentence(about) + "\n"] if about else [])]
        parts += ["| setting | default | meaning | values | changes |", "|---|---|---|---|---|"]
        parts += [_line(key, row, said) for key, row in rows.items()]
        parts.append("")
    return "\n".join(parts)


def _line(key: str, row: Setting, said: dict[str, str]) -> str:
    group = key.rpartition(".")[0]  # what is said of an optimiser is said of its rows
    about = [said[name] for name in (group,) if group.count(".") and name in said] + [said.get(key, "")]
    changes = ", ".join(name for name in CHANGES if name in row.changes)
    later = f"; {LATER[row.later]}" if row.later in LATER else ""
    cells = (f"`{key}`", f"`{shown(row.default)}`", "; ".join(filter(None, about)), _values(row), changes + later)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(row: Setting) -> str:
    remedy = row.allowed.remedy if row.allowed else ""
    return remedy.removeprefix("give ").removeprefix("choose ")


def shown(value: Any) -> str:
    """A default as one writes it on the command line."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
