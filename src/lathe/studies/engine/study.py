"""A study: a paper's claims, the settings of its three scales, and how it is told to a reader."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from lathe.studies.engine.claim import Bound, Claim, Measurement
from lathe.studies.engine.run import Run

__all__ = ["SCALES", "Setting", "Study"]

SCALES = ("smoke", "desk", "full")
Job = Literal["predict", "build", "reshape", "read", "train"]
JOBS: tuple[Job, ...] = ("predict", "build", "reshape", "read", "train")


class Setting:
    """The numbers of one scale, read as attributes: `Setting(width=8).width`. `seeds` is how many it runs over."""

    def __init__(self, *, seeds: int = 3, **values: Any) -> None:
        self._values = {"seeds": seeds, **values}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"this scale's setting has no {name!r}; it has {', '.join(self._values)}") from None

    def __repr__(self) -> str:
        return f"Setting({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"

    def as_dict(self) -> dict[str, Any]:
        """The numbers by name, for the record."""
        return dict(self._values)


class Study:
    """What a paper claims and how that is measured.

    Args:
        slug: names the study everywhere ("evonorm").
        title, authors, year, arxiv: of the paper.
        area: the folder of the method ("nn", "operators", ...).
        module: where the method lives ("lathe.nn.evonorm").
        job: what a reader wants to do with it: predict, build, reshape, read or train.
        summary: two sentences: what it does for the reader.
        example: five lines that a user can paste.
        scales: a `Setting` for each of smoke, desk and full.
    """

    def __init__(
        self,
        slug: str,
        *,
        title: str,
        authors: str,
        year: int,
        arxiv: str,
        area: str,
        module: str,
        job: Job,
        summary: str,
        example: str,
        scales: Mapping[str, Setting],
    ) -> None:
        if set(scales) != set(SCALES):
            raise ValueError(f"scales must be {', '.join(SCALES)}, got {', '.join(scales)}")
        if job not in JOBS:
            raise ValueError(f"job must be one of {', '.join(JOBS)}, got {job!r}")
        self.slug, self.title, self.authors, self.year, self.arxiv = slug, title, authors, year, arxiv
        self.area, self.module, self.job = area, module, job
        self.summary, self.example = " ".join(summary.split()), example.strip("\n")
        self.scales = MappingProxyType(dict(scales))
        self.claims: dict[str, Claim] = {}

    def claim(
        self,
        id: str,
        text: str,
        *,
        paper: str,
        holds: Bound,
        kind: Literal["exact", "trained"] = "trained",
        unit: str = "",
        also: Mapping[str, Bound] | None = None,
    ) -> Callable[[Callable[[Run], Measurement]], Callable[[Run], Measurement]]:
        """Declares the decorated function as the measurement of a claim; see `Claim`."""
        if id in self.claims:
            raise ValueError(f"study {self.slug} has two claims {id!r}")

        def declare(measure: Callable[[Run], Measurement]) -> Callable[[Run], Measurement]:
            claim = Claim(id, text, paper, holds, measure, kind, unit, dict(also or {}))
            # In the order of the paper's sheet, wherever the file declares them: C2, C2a, C10.
            self.claims = dict(sorted({**self.claims, id: claim}.items(), key=lambda item: _natural(item[0])))
            return measure

        return declare


def _natural(id: str) -> list[tuple[int, str]]:
    return [(int(digits or 0), rest) for digits, rest in re.findall(r"(\d*)(\D*)", id)]
