"""A claim, the bound that decides it, and the measurement that is held against the bound.

The bound is part of the claim and is written down before anything is measured; the verdict follows from both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lathe.studies.engine.run import Run

__all__ = [
    "FALLS_SHORT",
    "HOLDS",
    "NOT_AT_THIS_SCALE",
    "Bound",
    "Claim",
    "Measurement",
    "NotAtThisScale",
    "at_least",
    "at_most",
    "average",
    "between",
    "compare",
    "equals",
]

HOLDS, FALLS_SHORT, NOT_AT_THIS_SCALE = "holds", "falls short", "not at this scale"


class NotAtThisScale(Exception):
    """Raised by a measurement that has no honest experiment at the scale (or on the machine) of its run; says why."""


@dataclass(frozen=True)
class Bound:
    """The closed interval in which a measured value must lie. `str()` writes it as a reader would."""

    low: float = -math.inf
    high: float = math.inf

    def __call__(self, value: float) -> bool:
        return self.low <= value <= self.high  # false for NaN

    def __str__(self) -> str:
        if self.low == self.high:
            return f"= {self.low:g}"
        if math.isinf(self.low):
            return f"≤ {self.high:g}"
        if math.isinf(self.high):
            return f"≥ {self.low:g}"
        return f"{self.low:g} to {self.high:g}"


def at_least(low: float) -> Bound:
    """Holds from `low` upwards."""
    return Bound(low=low)


def at_most(high: float) -> Bound:
    """Holds up to `high`."""
    return Bound(high=high)


def between(low: float, high: float) -> Bound:
    """Holds from `low` to `high`, both included."""
    return Bound(low, high)


def equals(value: float, tolerance: float = 0.0) -> Bound:
    """Holds within `tolerance` of `value`."""
    return Bound(value - tolerance, value + tolerance)


@dataclass(frozen=True)
class Measurement:
    """What was measured for a claim.

    Args:
        value: the headline number, in the claim's unit.
        baseline: what it was compared with, trained or computed in the same run.
        spread: standard deviation over seeds.
        seeds: how many seeds stand behind the value; 1 where nothing is random.
        samples: the values of the single seeds.
        also: the claim's further conditions by name (each has a bound in the claim), and any number worth recording.
        note: what a reader should know: the data, what was tried, why it falls short.
    """

    value: float
    baseline: float | None = None
    spread: float | None = None
    seeds: int = 1
    samples: Sequence[float] = ()
    also: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def average(
    samples: Sequence[float], *, baseline: float | None = None, also: Mapping[str, float] | None = None, note: str = ""
) -> Measurement:
    """The mean over seeds, with its spread."""
    samples = [float(sample) for sample in samples]
    return Measurement(
        statistics.fmean(samples),
        baseline,
        statistics.stdev(samples) if len(samples) > 1 else None,
        len(samples),
        samples,
        dict(also or {}),
        note,
    )


def compare(
    ours: Sequence[float],
    baseline: Sequence[float],
    *,
    how: Literal["difference", "ratio"] = "difference",
    also: Mapping[str, float] | None = None,
    note: str = "",
) -> Measurement:
    """Paired over seeds: the mean of `ours - baseline`, or of `ours / baseline`, with its spread.

    Raises:
        ValueError: where the two have different lengths or are empty.
    """
    if len(ours) != len(baseline) or not ours:
        raise ValueError(f"ours and baseline must pair up over seeds, got {len(ours)} and {len(baseline)} values")
    pairs = [(float(a), float(b)) for a, b in zip(ours, baseline)]
    samples = [a - b if how == "difference" else a / b for a, b in pairs]
    return average(samples, baseline=statistics.fmean(b for _, b in pairs), also=also, note=note)


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper that can be wrong, and how to find out.

    Args:
        id: as in the paper's sheet ("C1").
        text: the claim in our words.
        paper: where the paper says so, with its figure.
        holds: the bound on the measured value.
        measure: takes a `Run`, returns a `Measurement` (or raises `NotAtThisScale`).
        kind: "exact" where it must hold at every scale, "trained" where it needs training, sampling or timing at scale.
        unit: of the value.
        also: bounds on further parts of the measurement, by name; all must hold.
    """

    id: str
    text: str
    paper: str
    holds: Bound
    measure: Callable[[Run], Measurement]
    kind: Literal["exact", "trained"] = "trained"
    unit: str = ""
    also: Mapping[str, Bound] = field(default_factory=dict)

    def verdict(self, measurement: Measurement, scale: str) -> str:
        """`holds` where the value and every further part lie in their bounds.

        A trained claim is not judged at smoke scale, which only proves that its path works.

        Raises:
            ValueError: where the measurement lacks a part that the claim bounds.
        """
        missing = set(self.also) - set(measurement.also)
        if missing:
            raise ValueError(f"claim {self.id} bounds {sorted(missing)}, which its measurement lacks")
        if scale == "smoke" and self.kind == "trained":
            return NOT_AT_THIS_SCALE
        held = self.holds(measurement.value) and all(bound(measurement.also[name]) for name, bound in self.also.items())
        return HOLDS if held else FALLS_SHORT
