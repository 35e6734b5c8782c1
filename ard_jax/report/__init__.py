"""Results made visible: picture grids, charts, and one self-contained HTML page."""

from ard_jax.report.comparison import build_comparison, markdown
from ard_jax.report.figures import captioned_rows, teaser
from ard_jax.report.film import chosen as film_steps
from ard_jax.report.page import build_curve, build_report

__all__ = [
    "build_comparison",
    "build_curve",
    "build_report",
    "captioned_rows",
    "film_steps",
    "markdown",
    "teaser",
]
