"""What mkdocs adds to the pages of docs/ when it builds the site: every setting, the interface of the packages, and
what the pages link to elsewhere in the repository.

The pages link as they do on disk, so that they can be read there. On the site a link out of docs/ leads to a copy below
`source/`: a Markdown file or a folder is a page, code is shown, anything else is the file itself.
"""

import ast
import pathlib
import posixpath
import re
from collections.abc import Iterator

import config_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = "docs"
CONFIG, SETTINGS = "CONFIG.md", "ard_jax/config.py"
PACKAGES = ("pipeline", "sampling", "evaluation", "models", "objectives", "convert")  # whose interface has a page
ALSO = ("README.md", "benchmarks/RESULTS.md")  # pages of the site although nothing may link to them
LANGUAGES = {".py": "python", ".sh": "bash", ".txt": "text"}
BOOST = {"TROUBLESHOOTING.md": 20}  # so that words of a message lead to what it means, not to what prints it
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that docs/ has not; mkdocs calls this by its name."""
    made = {CONFIG: config_reference.page()} | {f"api/{name}.md": _interface(name) for name in PACKAGES}
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    for path in _reached(made):
        place = site_path(path)
        content = {"abs_src_path": str(ROOT / path)} if _is_copied(path) else {"content": _text(path)}
        files.append(File.generated(config, place, **content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links out of docs/ to where they are on the site, and ranks it in searches; mkdocs calls it by its name."""
    here = page.file.src_uri
    page.meta["search"] = {"exclude": here.startswith("source/ard_jax"), "boost": BOOST.get(here, 1)}
    return rewrite(markdown, here, repository_path(here))


def rewrite(markdown: str, place: str, path: str) -> str:
    """The text of a page whose links fit where it is on the site.

    Args:
        markdown: the text.
        place: of the page on the site.
        path: of the page in the repository.
    """

    def lead(link: re.Match) -> str:
        target = _target(path, link[2])
        if target is None or (path.startswith(DOCS) and target.startswith(f"{DOCS}/")):
            return link[0]
        return link[1] + posixpath.relpath(site_path(target), posixpath.dirname(place)) + link[3]

    return LINK.sub(lead, markdown)


def site_path(path: str) -> str:
    """Where a path of the repository is on the site; that of the settings is their table."""
    if path == SETTINGS:
        return CONFIG
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return f"source/{path}" if _is_copied(path) or path.endswith(".md") else f"source/{path}.md"


def repository_path(place: str) -> str:
    """The path of the repository that is at a place of the site; that of docs/ for pages that are made here."""
    path = place.removeprefix("source/")
    if path == place:
        return f"{DOCS}/{place}"
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def _target(path: str, link: str) -> str | None:
    """The path of the repository that a link of the page at `path` names, None if there is none."""
    folder = path if (ROOT / path).is_dir() else posixpath.dirname(path)
    target = posixpath.normpath(posixpath.join(folder, link))
    return target if not target.startswith("..") and (ROOT / target).exists() else None


def _reached(made: dict[str, str]) -> list[str]:
    """Paths outside of docs/ that the pages link to, and those that these do."""
    texts = [(f"{DOCS}/{place}", text) for place, text in made.items()]
    texts += [(str(path.relative_to(ROOT)), path.read_text()) for path in sorted((ROOT / DOCS).glob("*.md"))]
    found = dict.fromkeys(ALSO)
    texts += [(path, _text(path)) for path in ALSO]
    while texts:
        path, text = texts.pop()
        for target in filter(None, (_target(path, link[2]) for link in LINK.finditer(text))):
            if target not in (*found, SETTINGS) and not target.startswith(f"{DOCS}/"):
                found[target] = None
                texts += [(target, _text(target))] if _has_links(target) else []
    return list(found)


def _has_links(path: str) -> bool:
    return path.endswith(".md") or (ROOT / path).is_dir()


def _is_copied(path: str) -> bool:
    return not _has_links(path) and pathlib.PurePath(path).suffix not in LANGUAGES


def _text(path: str) -> str:
    """The page that shows a file or a folder of the repository."""
    whole = ROOT / path
    if whole.is_dir():
        names = sorted(item.name for item in whole.glob("*.py"))
        return f"# {path}\n\n" + "\n".join(f"- [{name}]({name}): {_first_sentence(whole / name)}" for name in names)
    text = whole.read_text()
    if path.endswith(".md"):
        return text
    fence = "`" * 6  # longer than any in the file
    return f"# {path}\n\n{fence}{LANGUAGES[whole.suffix]}\n{text}\n{fence}\n"


def _first_sentence(path: pathlib.Path) -> str:
    said = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
    return said.replace("[", "\\[")  # of a command's flags, no link


def _interface(name: str) -> str:
    """A page of the docstrings of what a package, or a module, offers."""
    path = ROOT / "ard_jax" / name / "__init__.py"
    modules = [f"ard_jax.{name}.{part}" for part in _public(path)] if path.exists() else [f"ard_jax.{name}"]
    return f"# ard_jax.{name}\n\n" + "\n".join(f"::: {module}\n" for module in modules)


def _public(path: pathlib.Path) -> Iterator[str]:
    """Names that a package gathers in `__all__`, or else those that it defines itself."""
    body = ast.parse(path.read_text()).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            yield from ast.literal_eval(node.value)
            return
    named = (node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    yield from (node.name for node in named if not node.name.startswith("_"))
