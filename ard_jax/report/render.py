"""Fills the templates of the pages (Jinja2); whatever they are given is escaped."""

import json

from jinja2 import Environment, PackageLoader, StrictUndefined

from ard_jax.report import words
from ard_jax.report.figures import PALETTE


def render(template: str, **values: object) -> str:
    """The whole page that a file of `templates/` makes of these values."""
    return _ENVIRONMENT.get_template(template).render(values)


def _json(values: object) -> str:
    return json.dumps(values, indent=2, default=str)


_ENVIRONMENT = Environment(
    loader=PackageLoader("ard_jax.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {
    "number": words.number,
    "significant": words.significant,
    "distance": words.distance,
    "duration": words.duration,
    "json": _json,
}
_ENVIRONMENT.globals |= {"palette": PALETTE, "targets": words.TARGETS}
