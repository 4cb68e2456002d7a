"""One file a paper: what it claims, and how that is measured. `engine` runs them.

A folder named in the environment variable `LATHE_STUDIES` adds a person's own studies, files of the same shape.
"""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lathe.studies.engine import Study

__all__ = ["UnknownClaim", "UnknownPaper", "load", "slugs"]


if os.environ.get("LATHE_STUDIES"):
    __path__.append(os.environ["LATHE_STUDIES"])


class UnknownPaper(ValueError):
    """A paper that Lathe has no study of."""


class UnknownClaim(ValueError):
    """A claim that a study does not have."""


def slugs() -> list[str]:
    """The papers that have a study, alphabetically; nothing is imported to find out."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if module.name != "engine")


def load(slug: str) -> Study:
    """The study of one paper.

    Raises:
        UnknownPaper: where there is none; the message names the nearest ones.
    """
    known = slugs()
    if slug not in known:
        near = difflib.get_close_matches(slug, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
        raise UnknownPaper(f"no paper named {slug!r}; {hint}")
    study: Study = importlib.import_module(f"{__name__}.{slug.replace('-', '_')}").study
    return study
