"""Labelled point sets by the million: drawn from a seed, in several processes, and served in batches of one size."""

from __future__ import annotations

import bisect
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lathe.data.tours.geometry import IGNORED, convex_hull, delaunay
from lathe.data.tours.salesman import tsp

__all__ = ["DelaunayDataset", "HullDataset", "PointDataset", "TSPDataset", "batches", "pad_problems"]

Label = Callable[[Tensor], Tensor]

# Points are drawn and labelled this many sets at a time, each lot from a seed of its own: the data do not depend on
# how many processes draw them.
_LOT = 2000


class PointDataset(Dataset):
    """Uniform points of the unit square with labels, as `(points, targets)`.

    Args:
        label: `label(points) -> targets`, such as `convex_hull`; with `workers` it must be a top-level function (or a
            `functools.partial` of one).
        size: how many sets.
        n: points of each set, or the `(least, most)` of them, drawn evenly.
        seed: the whole data set is a function of it.
        workers: processes that draw and label; 0 works here.

    Raises:
        ValueError: where size or n are not positive, or n is no range.

    Source: Vinyals et al. 2015, section 4.
    """

    def __init__(self, label: Label, size: int, n: int | tuple[int, int], *, seed: int = 0, workers: int = 0) -> None:
        least, most = (n, n) if isinstance(n, int) else n
        if size < 1 or least < 1 or most < least:
            raise ValueError(f"size and n must be positive and n a number or (least, most), got {size} and {n}")
        shares = np.random.default_rng([seed, 1]).multinomial(size, [1 / (most - least + 1)] * (most - least + 1))
        lots = [
            (least + number, min(_LOT, int(share) - start), number, start)
            for number, share in enumerate(shares)
            for start in range(0, int(share), _LOT)
        ]
        work = [(count, points, [seed, 2, number, start]) for points, count, number, start in lots]
        if workers:
            # Fork is not safe once torch has started threads.
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                made = list(pool.map(partial(_lot, label), *zip(*work)))
        else:
            made = [_lot(label, *lot) for lot in work]
        self.parts: list[tuple[Tensor, Tensor]] = []
        for points in sorted({lot[0] for lot in lots}):
            mine = [lot for lot, (many, *_) in zip(made, lots) if many == points]
            self.parts.append((torch.cat([part[0] for part in mine]), torch.cat([part[1] for part in mine])))
        self._ends = np.cumsum([len(points) for points, _ in self.parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "n 2"], Int64[Tensor, " length"]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} point sets")
        index %= len(self)
        part = bisect.bisect_right(self._ends, index)
        points, targets = self.parts[part]
        return points[index - self._ends[part]], targets[index - self._ends[part]]

    def batches(self, batch_size: int = 128, *, seed: int = 0) -> DataLoader:
        """An endless stream of batches for `lathe.training.fit`; see `batches`."""
        return batches(self.parts, batch_size, seed=seed)


class HullDataset(PointDataset):
    """Points and their convex hulls; arguments as in `PointDataset` and `convex_hull`."""

    def __init__(
        self, size: int, n: int | tuple[int, int], *, close: bool = False, seed: int = 0, workers: int = 0
    ) -> None:
        super().__init__(partial(convex_hull, close=close), size, n, seed=seed, workers=workers)


class DelaunayDataset(PointDataset):
    """Points and their Delaunay triangulations; arguments as in `PointDataset`."""

    def __init__(self, size: int, n: int | tuple[int, int], *, seed: int = 0, workers: int = 0) -> None:
        super().__init__(delaunay, size, n, seed=seed, workers=workers)


class TSPDataset(PointDataset):
    """Cities and tours, without a stop token; arguments as in `PointDataset` and `tsp`."""

    def __init__(
        self,
        size: int,
        n: int | tuple[int, int],
        *,
        method: Literal["held_karp", "christofides", "nearest", "two_opt"] = "held_karp",
        direction: Literal["index", "counter_clockwise"] = "index",
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(partial(tsp, method=method, direction=direction), size, n, seed=seed, workers=workers)


def _lot(label: Label, count: int, n: int, seed: list[int]) -> tuple[Tensor, Tensor]:
    state = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
    points = torch.rand(count, n, 2, generator=torch.Generator().manual_seed(state))
    return points, label(points)


class _Batches(IterableDataset):
    def __init__(self, parts: list[tuple[Tensor, Tensor]], batch_size: int, seed: int) -> None:
        self.parts, self.batch_size, self.seed = parts, batch_size, seed

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            lots = [
                (part, places)
                for part, (points, _) in enumerate(self.parts)
                for places in torch.randperm(len(points), generator=generator).split(self.batch_size)
            ]
            for number in torch.randperm(len(lots), generator=generator).tolist():
                part, places = lots[number]
                points, targets = self.parts[part][0][places], self.parts[part][1][places]
                longest = int((targets != IGNORED).sum(1).max())
                yield (points, targets[:, :longest]), targets[:, :longest]


def batches(parts: list[tuple[Tensor, Tensor]], batch_size: int = 128, *, seed: int = 0) -> DataLoader:
    """An endless stream of `((points, targets), targets)`: what teacher forcing is given, and what the loss is.

    A batch has sets of one size only, so that nothing is padded but the targets, and those only to the longest of the
    batch. Each pass over the data has an order of its own.

    Args:
        parts: `(points, targets)` for each number of points.
    """
    return DataLoader(_Batches(parts, batch_size, seed), batch_size=None)


def pad_problems(
    problems: list[tuple[Tensor, Tensor]], *, stop_token: bool = True
) -> tuple[Float[Tensor, "batch n d"], Int64[Tensor, "batch length"], Int64[Tensor, " batch"]]:
    """Sets of different sizes as one batch: points padded with zeros, targets with `IGNORED`, and the sizes.

    The stop token, which is n in a set of n points, becomes that of the largest set.

    Raises:
        ValueError: where there is no problem.
    """
    if not problems:
        raise ValueError("problems must hold at least one (points, targets), got none")
    most = max(len(points) for points, _ in problems)
    longest = max(len(targets) for _, targets in problems)
    points = torch.stack([functional.pad(points, (0, 0, 0, most - len(points))) for points, _ in problems])
    moved = [
        torch.where(targets == len(points), most, targets) if stop_token else targets for points, targets in problems
    ]
    padded = torch.stack([functional.pad(targets, (0, longest - len(targets)), value=IGNORED) for targets in moved])
    return points, padded, torch.tensor([len(points) for points, _ in problems])
