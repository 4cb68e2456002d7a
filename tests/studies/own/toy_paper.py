"""A study without a paper, by which the engine, the command line and the gallery are tested."""

from __future__ import annotations

import os
import time

import altair as alt
import torch

from lathe.studies.engine import Measurement, NotAtThisScale, Run, Setting, Study, at_least, average, equals

study = Study(
    "toy-paper",
    title="A <b>toy</b> & its claims",
    authors="Nobody",
    year=2020,
    arxiv="0000.00000",
    area="nn",
    module="lathe.core.shapes",
    job="build",
    summary="Draws normal numbers. Their mean is small.",
    example="import torch\nassert torch.ones(1) == 1",
    scales={
        "smoke": Setting(count=100, pause=0.0, seeds=2),
        "desk": Setting(count=1000, pause=1.0),
        "full": Setting(count=10000, pause=0.0),
    },
)


def mean_of_normals(run: Run, seed: int, shift: float) -> float:
    time.sleep(run.setting.pause)
    run.notes.append("drawn from thin air")
    return float(torch.randn(run.setting.count).mean() + shift)


@study.claim("C1", "One and one is <script>alert('two')</script>", paper="Table 1", holds=equals(2), kind="exact")
def sums(run: Run) -> Measurement:
    return Measurement(1.0 + 1.0)


@study.claim(
    "C2",
    "Shifted normals have a positive mean",
    paper="Fig. 2",
    holds=at_least(0.5),
    unit="shifts",
    also={"largest": at_least(0)},
)
def shifted(run: Run) -> Measurement:
    means = run.each_seed(mean_of_normals, shift=1.0)
    values = [{"seed": seed, "mean": mean} for seed, mean in zip(run.seeds, means)]
    run.figure(alt.Chart(alt.Data(values=values)).mark_point().encode(x="seed:O", y="mean:Q"))
    return average(means, also={"largest": max(means)})


@study.claim("C3", "Shifted normals again, trained once", paper="Fig. 3", holds=at_least(5.0))
def again(run: Run) -> Measurement:
    return average(run.each_seed(mean_of_normals, shift=1.0))


@study.claim("C4", "Needs a telescope", paper="Fig. 4", holds=at_least(0))
def telescope(run: Run) -> Measurement:
    raise NotAtThisScale("no telescope at hand")


@study.claim("C5", "Breaks when told to", paper="Fig. 5", holds=equals(0), kind="exact")
def breaks(run: Run) -> Measurement:
    if os.environ.get("TOY_BREAKS"):
        raise RuntimeError("told to")
    return Measurement(0.0)
