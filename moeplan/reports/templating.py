"""The one way templates are filled: every text is escaped, a name that is missing is an error."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["page_environment"]


def page_environment() -> Environment:
    """Templates of :mod:`moeplan.reports`, autoescaped."""
    return Environment(
        loader=PackageLoader("moeplan.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
