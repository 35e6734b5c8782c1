"""Tab completion, in a real bash, and in a real zsh where there is one."""

import re
import shlex
import shutil
import subprocess

import pytest
from pipeline_fixtures import ROOT, run

from ard_jax.__main__ import STAGES
from ard_jax.config import ROWS

ASK = """
source "$1"; shift
COMP_WORDS=(ard-jax "$@"); COMP_CWORD=$#
_ard_jax 2>&1; printf '%s\\n' "${COMPREPLY[@]}"
"""

# A terminal in which zsh waits for keys; the command says what it was given.
TYPE = """
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "autoload -Uz compinit; compinit -u -D; source $1; PS1=''"
zpty -w z "ard-jax() { print -r -- \\"got:\\$*:\\" }; print re''ady"
zpty -r z out '*ready*'
zpty -w -n z $'ard-jax dist\\t--config.student.his\\tX\\n'
zpty -r z out '*got:*:*'
print -r -- ${${(M)${(f)out}:#got:*}%$'\\r'}
"""


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    """What bash offers for the last of some words after the command."""
    path = tmp_path_factory.mktemp("completion") / "ard-jax"
    printed = run("completion", "bash")
    assert printed.status == 0, printed.err
    path.write_text(printed.out)

    def offered(*words):
        asked = subprocess.run(["bash", "--norc", "-c", ASK, "bash", path, *words], capture_output=True, text=True)
        assert (asked.returncode, asked.stderr) == (0, "")
        return asked.stdout.split()

    offered.path = path
    return offered


def test_stages_are_completed(completion):
    assert completion("") == [*STAGES, "run", "completion"]
    assert completion("di") == ["distill"]
    assert completion("t") == ["teacher", "trajectories"]


def test_settings_and_flags_are_completed(completion):
    settings = [f"--config.{key}=" for key in ROWS]
    assert [word for word in completion("distill", "--config.") if word in settings] == settings
    assert completion("run", "teacher,distill", "--config.student.his") == ["--config.student.history_layers="]
    assert completion("distill", "--w") == ["--workdir"]
    assert completion("compare", "--config", "a.py", "--q") == ["--quick"]
    assert completion("export", "--pus") == ["--push"]
    assert completion("evaluate", "--sam") == ["--samples"]
    assert completion("export", "--config.") == completion("nonsense", "--") == []


def test_other_words_are_paths(completion):
    """Bash completes a path by itself where nothing is offered, which the script asks it to."""
    assert completion("distill", "--config", "configs/dig") == []
    said = subprocess.run(
        ["bash", "--norc", "-c", f"source {shlex.quote(str(completion.path))}; complete -p ard-jax"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said.split() == ["complete", "-o", "default", "-F", "_ard_jax", "ard-jax"]


def test_the_command_of_the_page_makes_that_script(completion, tmp_path, monkeypatch):
    """As docs/STAGES.md has it, in the home of somebody else, the command in place of what is not installed here."""
    text = (ROOT / "docs" / "STAGES.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    (tmp_path / "ard-jax").write_text(f'#!/bin/sh\n[ "$*" = "completion bash" ] && cat {completion.path}\n')
    (tmp_path / "ard-jax").chmod(0o755)
    subprocess.run(["bash", "-c", block], env={"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    kept = tmp_path / ".local" / "share" / "bash-completion" / "completions" / "ard-jax"
    assert kept.read_text() == completion.path.read_text()


def test_a_shell_that_there_is_none_for_is_refused():
    for words in ((), ("fish",)):
        outcome = run("completion", *words)
        assert outcome.status == 2 and outcome.err.strip().endswith("choose bash or zsh.")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_tabs_typed_into_zsh(tmp_path):
    """A space behind a stage, none behind what wants a value."""
    path = tmp_path / "_ard-jax"
    path.write_text(run("completion", "zsh").out)
    said = subprocess.run(["zsh", "-f", "-c", TYPE, "zsh", path], capture_output=True, text=True, timeout=60)
    assert said.stdout == "got:distill --config.student.history_layers=X:\n", said.stderr
