"""What a study is written with (`Study`, `Claim`, `Run`, `Measurement`), what runs it and what keeps its results."""

from lathe.studies.engine.claim import (
    FALLS_SHORT,
    HOLDS,
    NOT_AT_THIS_SCALE,
    Bound,
    Claim,
    Measurement,
    NotAtThisScale,
    at_least,
    at_most,
    average,
    between,
    compare,
    equals,
)
from lathe.studies.engine.run import Run
from lathe.studies.engine.study import SCALES, Setting, Study

__all__ = [
    "FALLS_SHORT",
    "HOLDS",
    "NOT_AT_THIS_SCALE",
    "SCALES",
    "Bound",
    "Claim",
    "Measurement",
    "NotAtThisScale",
    "Run",
    "Setting",
    "Study",
    "at_least",
    "at_most",
    "average",
    "between",
    "compare",
    "equals",
]
