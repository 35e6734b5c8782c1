"""Names and shapes of a state dict, held against those that were expected."""

from collections.abc import Iterable, Mapping

from ard_jax.errors import UserError


def check_names(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...] | None],
    described: str,
    names: str,
    optional: Iterable[str] = (),
) -> None:
    """Raises UserError with the first few missing, unexpected and misshapen names; `optional` ones are neither."""
    misshapen = [n for n, s in expected.items() if n in found and s is not None and found[n] != s]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected and name not in optional],
        "of another shape": [f"{n} {found[n]} instead of {expected[n]}" for n in misshapen],
    }
    said = [
        f"{kind}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if said:
        raise UserError(
            f"the state dict does not fit the architecture that {described} ({'; '.join(said)}): "
            f"give a state dict with {names}."
        )
