"""Training: the one loop (`fit`), and the methods that are training schemes."""

from __future__ import annotations

from lathe.training._checkpoints import CheckpointError
from lathe.training._schedules import cosine, one_cycle
from lathe.training.fit import EarlyStop, History, Progress, TrainingDiverged, accuracy, evaluate, fit

__all__ = [
    "CheckpointError",
    "EarlyStop",
    "History",
    "Progress",
    "TrainingDiverged",
    "accuracy",
    "cosine",
    "evaluate",
    "fit",
    "one_cycle",
]
