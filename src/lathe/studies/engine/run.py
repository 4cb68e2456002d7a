"""What a measurement is given: the scale's setting, device, seeds, data, progress, and a place for its figure."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from lathe.studies.engine.study import Setting, Study

__all__ = ["Run", "seed_everything"]

SeedTask = tuple[Callable[..., Any], int, dict[str, Any]]
SeedResult = tuple[Any, list[str]]


def seed_everything(seed: int) -> None:
    """Seeds the global generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that a study calls may draw from the global generator
    random.seed(seed)


class Run:
    """One study at one scale on one device.

    Args:
        study: what is run.
        scale: "smoke", "desk" or "full".
        device: where networks are trained ("cpu", "cuda").
        seeds: the seeds of `each_seed`; by default as many as the setting says, from 0.
        on_progress: told `(what, done, total)`.
        map_seeds: how seeds are spread: takes a list of `(function, seed, options)`, returns in order what `one_seed`
            does. None runs one after the other, here.
    """

    def __init__(
        self,
        study: Study,
        scale: str,
        *,
        device: str = "cpu",
        seeds: Sequence[int] | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
        map_seeds: Callable[[Run, list[SeedTask]], list[SeedResult]] | None = None,
    ) -> None:
        self.study, self.scale, self.device = study, scale, device
        self.setting: Setting = study.scales[scale]
        self.seeds = tuple(range(self.setting.seeds)) if seeds is None else tuple(seeds)
        self.notes: list[str] = []
        self.chart: Any = None
        self._on_progress, self._map_seeds = on_progress, map_seeds
        self._results: dict[tuple[str, int, str], SeedResult] = {}

    def each_seed(self, function: Callable[..., Any], **options: Any) -> list[Any]:
        """Calls `function(run, seed, **options)` for every seed; a call that was made before is not made again.

        `function` is a top-level function of the study's file and `options` are plain values: the call may be made in
        another process. The global generators are seeded before each call.
        """

        def key(seed: int) -> tuple[str, int, str]:
            return function.__qualname__, seed, repr(sorted(options.items()))

        missing = [seed for seed in self.seeds if key(seed) not in self._results]
        if self._map_seeds is not None and len(missing) > 1:
            results = self._map_seeds(self, [(function, seed, options) for seed in missing])
            self._results.update({key(seed): result for seed, result in zip(missing, results)})
        else:
            for done, seed in enumerate(missing):
                told = ", ".join(str(value) for value in options.values())
                self.progress(f"{function.__name__}({told}) seed {seed}", done, len(missing))
                self._results[key(seed)] = self.one_seed(function, seed, options)
        found = [self._results[key(seed)] for seed in self.seeds]
        for _, notes in found:  # also where the networks were trained for an earlier claim
            self.notes += [note for note in notes if note not in self.notes]
        return [result for result, _ in found]

    def one_seed(self, function: Callable[..., Any], seed: int, options: dict[str, Any]) -> SeedResult:
        """One call of `each_seed`, and what it noted."""
        before, self.notes = self.notes, []
        seed_everything(seed)
        try:
            result = function(self, seed, **options)
            return result, self.notes
        finally:
            self.notes = before

    def generator(self, seed: int) -> torch.Generator:
        """A fresh CPU generator."""
        return torch.Generator().manual_seed(seed)

    def data(self, name: str, split: str = "train", **options: Any) -> Any:
        """`lathe.data.load`; at smoke scale nothing is downloaded, and digits replace images that are not at hand.

        The result says so.

        Raises:
            DataUnavailable: at the other scales, naming the command that gets the data.
        """
        from lathe import data

        try:
            return data.load(name, split, download=self.scale != "smoke", **options)
        except data.DataUnavailable:
            if self.scale != "smoke" or name not in {"mnist", "cifar10", "omniglot"}:
                raise
            note = f"digits in place of {name}, which is not at hand"
            if note not in self.notes:
                self.notes.append(note)
            return data.load("digits", split)

    def figure(self, chart: Any) -> None:
        """Keeps an Altair chart, data and all, as the figure of the claim being measured."""
        self.chart = chart

    def progress(self, what: str, done: int = 0, total: int = 0) -> None:
        """Says what is being done, and how much of it."""
        if self._on_progress is not None:
            self._on_progress(what, done, total)
