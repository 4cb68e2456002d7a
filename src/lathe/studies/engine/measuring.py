"""Measures the claims of one study, one after the other, and says what comes out as it comes out.

This is what runs in a worker, local or remote. It writes no file: it emits events, and whoever started it keeps them.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lathe import studies
from lathe.data import DataUnavailable
from lathe.studies.engine.claim import NOT_AT_THIS_SCALE, Claim, NotAtThisScale
from lathe.studies.engine.ledger import Finding, finding
from lathe.studies.engine.run import Run, SeedResult, SeedTask, seed_everything

__all__ = ["Event", "measure_seed", "measure_study"]


@dataclass(frozen=True)
class Event:
    """Something that happened in a study.

    Args:
        kind: "started" or "measured" a claim, "progress" inside one, "finished" the study.
        slug: the study.
        claim: its id, "" where the event is about the whole study.
        what, done, total: of a progress.
        finding: of a measured claim.
        failure: "data" where a data set is missing, "error" where the measurement broke.
        details: the traceback of a broken measurement.
    """

    kind: str
    slug: str
    claim: str = ""
    what: str = ""
    done: int = 0
    total: int = 0
    finding: Finding = field(default_factory=dict)
    failure: str = ""
    details: str = ""


def measure_study(
    slug: str,
    scale: str,
    device: str,
    seeds: Sequence[int],
    skip: Collection[str],
    emit: Callable[[Event], None],
    map_seeds: Callable[[Run, list[SeedTask]], list[SeedResult]] | None = None,
) -> None:
    """Measures every claim of a study but those in `skip`, emitting an `Event` for each step."""
    torch.set_num_threads(1)
    study = studies.load(slug)
    claim_id = ""

    def tell(what: str, done: int, total: int) -> None:
        emit(Event("progress", slug, claim_id, what, done, total))

    run = Run(study, scale, device=device, seeds=seeds, on_progress=tell, map_seeds=map_seeds)
    for claim in study.claims.values():
        if claim.id not in skip:
            claim_id = claim.id
            emit(Event("started", slug, claim.id))
            emit(_measure(claim, run))
    emit(Event("finished", slug))


def _measure(claim: Claim, run: Run) -> Event:
    """Measures one claim; whatever goes wrong in it becomes part of the event."""
    slug, began = run.study.slug, time.perf_counter()
    run.chart = None
    run.notes.clear()
    seed_everything(0)
    failure = details = ""
    try:
        measurement = claim.measure(run)
        record = finding(
            claim,
            run.scale,
            measurement,
            seconds=time.perf_counter() - began,
            note="; ".join(" ".join(part.split()) for part in (measurement.note, *run.notes) if part),
            figure=None if run.chart is None else run.chart.to_dict(),
        )
    except NotAtThisScale as reason:
        record = finding(claim, run.scale, verdict=NOT_AT_THIS_SCALE, note=str(reason))
    except DataUnavailable as missing:
        failure, record = "data", finding(claim, run.scale, error=_one_line(missing))
    except Exception as broken:
        where = traceback.extract_tb(broken.__traceback__)[-1]
        told = f"{type(broken).__name__}: {_one_line(broken)} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        failure, details = "error", traceback.format_exc()
        record = finding(claim, run.scale, error=told, seconds=time.perf_counter() - began)
    return Event("measured", slug, claim.id, finding=record, failure=failure, details=details)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def measure_seed(
    slug: str, scale: str, device: str, seeds: Sequence[int], function: str, seed: int, options: dict[str, Any]
) -> SeedResult:
    """One seed of `Run.each_seed`, in a process of its own: `function` is named in the study's file."""
    import sys

    torch.set_num_threads(1)
    study = studies.load(slug)
    module = sys.modules[next(iter(study.claims.values())).measure.__module__]
    return Run(study, scale, device=device, seeds=seeds).one_seed(getattr(module, function), seed, options)
