"""Tab completion: a script for bash or zsh that knows the stages, their flags and every setting."""

from collections.abc import Mapping, Sequence

from ard_jax import hosts
from ard_jax.command_line import FLAGS, WITHOUT_CONFIG, WORKDIR, stage_flags
from ard_jax.config import ROWS
from ard_jax.errors import UserError

# A word is completed as a stage where it is the first, as a flag where it begins as one, and else as a path. What ends
# in "=" wants a value, so that no space is put behind it.
BASH = """\
_ard_jax() {
  local word=${COMP_WORDS[COMP_CWORD]} words=""
  if [[ $COMP_CWORD -eq 1 ]]; then
    words="@words"
  elif [[ $word == -* ]]; then
    case ${COMP_WORDS[1]} in
@cases
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o default -F _ard_jax ard-jax
"""
ZSH = """\
#compdef ard-jax
_ard_jax() {
  local words_of=""
  if (( CURRENT == 2 )); then
    words_of="@words"
  elif [[ $PREFIX == -* ]]; then
    case ${words[2]} in
@cases
    esac
  else
    _files
    return
  fi
  local -a all=(${(s: :)words_of})
  compadd -S '' -- ${(M)all:#*=}
  compadd -- ${all:#*=}
}
compdef _ard_jax ard-jax
"""
SCRIPTS = {"bash": (BASH, "words"), "zsh": (ZSH, "words_of")}


def script(shell: str, stages: Sequence[str], alone: Sequence[str]) -> str:
    """The script that completes the command `ard-jax`.

    Args:
        shell: "bash" or "zsh".
        stages: that are completed.
        alone: those of them that `run` does not run.

    Raises:
        UserError: a shell that there is no script for.
    """
    if shell not in SCRIPTS:
        raise UserError(f"there is no completion for {shell or 'no shell'}: choose {' or '.join(SCRIPTS)}.")
    text, variable = SCRIPTS[shell]
    flags = {stage: flags_of(stage) for stage in stages}
    flags["run"] = sorted({flag for stage in stages if stage not in alone for flag in flags[stage]})
    text = text.replace("@words", " ".join([*stages, "run", "completion"]))
    return text.replace("@cases", _cases(flags, variable))


def flags_of(stage: str) -> list[str]:
    """What may follow a stage; settings with the "=" that their value comes after."""
    others = _given(stage)
    if stage == "evaluate":  # its other forms
        others += [*_given("evaluate_files"), *_given("make_reference")]
    if stage in WITHOUT_CONFIG:
        return [*others, "--help"]
    joined = list(hosts.FLAGS) if "--workdir" in FLAGS.get(stage, WORKDIR) else []
    settings = [f"--config.{key}=" for key in ROWS]
    return list(dict.fromkeys(["--config", *others, *joined, "--help", *settings]))


def _given(stage: str) -> list[str]:
    """Flags of a stage beside --config; none of one that is not installed."""
    try:
        return list(stage_flags(stage))
    except UserError:
        return []


def _cases(flags: Mapping[str, Sequence[str]], variable: str) -> str:
    """A line for all stages that the same may follow."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for stage, words in flags.items():
        alike.setdefault(tuple(words), []).append(stage)
    return "\n".join(f'      {"|".join(of)}) {variable}="{" ".join(words)}" ;;' for words, of in alike.items())
