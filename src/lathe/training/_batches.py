"""Batches for `fit`: the same order in every process and after every restart.

The order of an epoch is a function of the seed and the epoch alone, so that a resumed run needs no record of it and
skips what it has seen without loading it. Every process draws the whole order and takes its share of each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

__all__ = ["Batch", "Data", "Share", "Source", "derive_seed", "open_source", "walk"]

Data = tuple[Any, ...] | Dataset | DataLoader


@dataclass(frozen=True, slots=True)
class Batch:
    """What this process trains on, and how many samples of the whole batch that is."""

    inputs: Any
    targets: tuple[Any, ...]
    mine: int
    whole: int


@dataclass(frozen=True, slots=True)
class Share:
    """Process `rank` of `world` takes every `world`-th sample of each batch, from `rank` on."""

    rank: int = 0
    world: int = 1


@runtime_checkable
class Source(Protocol):
    """Where batches come from; `length` is the number of batches in an epoch, where that is known."""

    length: int | None
    samples: int | None

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, without the first `skip`."""


def derive_seed(*numbers: int) -> int:
    """One seed of 63 bits from several numbers; neighbouring numbers give unrelated seeds."""
    words = [number % 2**64 for number in numbers]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def open_source(
    data: Data, *, default: int, batch_size: int | None = None, shuffle: int | None = None, share: Share | None = None
) -> Source:
    """The source that fits `data`; `shuffle` is the seed of the order, None keeps the order that is there.

    Raises:
        TypeError: where `data` is nothing that gives batches.
        ValueError: where it is empty, its tensors differ in length, or the batch size is wrong.
    """
    share = share or Share()
    if batch_size is not None and (isinstance(batch_size, bool) or int(batch_size) != batch_size or batch_size < 1):
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size}")
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise ValueError(
                f"data is a DataLoader, which has its own batch size: leave batch_size out, got {batch_size}"
            )
        if isinstance(data.sampler, DistributedSampler):
            raise ValueError(
                "data must be a plain DataLoader: batches are shared out here, not by a DistributedSampler"
            )
        if data.batch_sampler is None or isinstance(data.dataset, IterableDataset):
            return _Stream(data, share)
        return _Loader(data, shuffle, share)
    size = batch_size or default
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)):
        return _Tensors(tuple(data), size, shuffle, share)
    if isinstance(data, IterableDataset):
        return _Stream(DataLoader(data, batch_size=size), share)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _Indexed(data, size, shuffle, share)
    raise TypeError(f"data must be a tuple of tensors, a Dataset or a DataLoader, got {type(data).__name__}")


class _Tensors:
    """Tensors in memory, indexed a batch at a time on the device where they lie."""

    def __init__(self, tensors: tuple[Any, ...], batch_size: int, shuffle: int | None, share: Share) -> None:
        if not tensors:
            raise ValueError("data must hold at least one tensor, got none")
        for position, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"data must be a tuple of tensors, got {type(tensor).__name__} at position {position}")
            if tensor.ndim == 0:
                raise ValueError(
                    f"data must be tensors with samples along the first dimension, got a scalar at {position}"
                )
        lengths = [len(tensor) for tensor in tensors]
        if len(set(lengths)) > 1 or lengths[0] == 0:
            raise ValueError(f"data must be tensors of one length, at least 1, got lengths {lengths}")
        self.tensors, self.batch_size, self.shuffle, self.share = tensors, batch_size, shuffle, share
        self.samples: int | None = lengths[0]
        self.length: int | None = -(-lengths[0] // batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        count = len(self.tensors[0])
        if self.shuffle is None:
            starts = range(skip * self.batch_size, count, self.batch_size)
            for start in starts:
                yield self._slice(start, min(start + self.batch_size, count))
            return
        order = _order(count, self.shuffle, epoch)
        orders = {tensor.device: order.to(tensor.device) for tensor in self.tensors}
        places = [orders[tensor.device].split(self.batch_size) for tensor in self.tensors]
        rank, world = self.share.rank, self.share.world
        for number in range(skip, len(places[0])):
            whole = len(places[0][number])
            mine = whole
            parts = []
            for tensor, place in zip(self.tensors, places):
                indices = place[number]
                if world > 1:
                    indices, mine = _share(indices, rank, world)
                parts.append(tensor.index_select(0, indices))
            yield Batch(parts[0], tuple(parts[1:]), mine, whole)

    def _slice(self, start: int, stop: int) -> Batch:
        parts = [tensor[start:stop] for tensor in self.tensors]
        mine = stop - start
        if self.share.world > 1:
            shared = [_share(part, self.share.rank, self.share.world) for part in parts]
            parts, mine = [part for part, _ in shared], shared[0][1]
        return Batch(parts[0], tuple(parts[1:]), mine, stop - start)


class _Loaded:
    """Samples fetched by index through a DataLoader: this process fetches its own share only."""

    share: Share
    samples: int | None
    length: int | None

    def _fetch(self, dataset: Any, batches: list[Any], seed: int, **options: Any) -> Iterator[Batch]:
        rank, world = self.share.rank, self.share.world
        shares = [_share(batch, rank, world) for batch in batches]
        # A generator of its own: making the iterator must not draw from the random numbers that dropout uses.
        loader: DataLoader = DataLoader(
            dataset,
            batch_sampler=[indices for indices, _ in shares],
            generator=torch.Generator().manual_seed(seed),
            **options,
        )
        for batch, (_, mine), loaded in zip(batches, shares, loader):
            inputs, targets = _split(loaded)
            yield Batch(inputs, targets, mine, len(batch))


class _Indexed(_Loaded):
    """A map-style Dataset."""

    def __init__(self, dataset: Any, batch_size: int, shuffle: int | None, share: Share) -> None:
        if len(dataset) == 0:
            raise ValueError("data must hold at least one sample, got an empty Dataset")
        self.dataset, self.batch_size, self.shuffle, self.share = dataset, batch_size, shuffle, share
        self.samples = len(dataset)
        self.length = -(-len(dataset) // batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        count = len(self.dataset)
        order = torch.arange(count) if self.shuffle is None else _order(count, self.shuffle, epoch)
        batches = [indices.tolist() for indices in order.split(self.batch_size)[skip:]]
        return self._fetch(self.dataset, batches, derive_seed(self.shuffle or 0, epoch, 1))


class _Loader(_Loaded):
    """A DataLoader over a map-style Dataset: its own order, its own workers."""

    def __init__(self, loader: DataLoader, shuffle: int | None, share: Share) -> None:
        self.loader, self.seed, self.share = loader, shuffle or 0, share
        self.samples = len(loader.dataset)  # type: ignore[arg-type]
        self.length = len(loader)
        self._next, self._drawn = 0, []  # type: ignore[var-annotated]
        if not self.length:
            raise ValueError("data must give at least one batch, got an empty DataLoader")

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        # A sampler with a generator of its own goes on from epoch to epoch: a resumed run draws what it skips.
        while self._next <= epoch:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.seed, self._next, 0))
                self._drawn = list(self.loader.batch_sampler)  # type: ignore[arg-type]
            self._next += 1
        loader = self.loader
        return self._fetch(
            loader.dataset,
            self._drawn[skip:],
            derive_seed(self.seed, epoch, 1),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
        )


class _Stream:
    """Batches that can only be read one after the other: every process reads all and keeps its share."""

    samples: int | None = None

    def __init__(self, loader: DataLoader, share: Share) -> None:
        self.loader, self.share = loader, share
        try:
            self.length: int | None = len(loader)
        except TypeError:
            self.length = None

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        # Skipped here, not at the first batch: the caller restores the random numbers after this returns.
        loaded = iter(self.loader)
        for _ in range(skip):
            next(loaded, None)
        return self._batches(loaded)

    def _batches(self, loaded: Iterable[Any]) -> Iterator[Batch]:
        rank, world = self.share.rank, self.share.world
        for item in loaded:
            inputs, targets = _split(item)
            whole = mine = _count(item)
            if world > 1:
                mine = len(range(rank, whole, world))
                inputs, *rest = (walk(lambda part: _share(part, rank, world)[0], part) for part in (inputs, *targets))
                targets = tuple(rest)
            yield Batch(inputs, targets, mine, whole)


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))


def _share(samples: Any, rank: int, world: int) -> tuple[Any, int]:
    """This process's samples and their number; where there are none, one that is to count for nothing.

    A process without a sample must still run the network, since the others wait for its gradients.
    """
    if world == 1:
        return samples, len(samples)
    mine = len(range(rank, len(samples), world))
    return (samples[rank::world], mine) if mine else (samples[:1], 0)


def _split(item: Any) -> tuple[Any, tuple[Any, ...]]:
    if isinstance(item, (tuple, list)):
        return item[0], tuple(item[1:])
    return item, ()


def _count(item: Any) -> int:
    if isinstance(item, Tensor):
        return len(item)
    for part in item.values() if isinstance(item, dict) else item:
        return _count(part)
    raise ValueError("data must give batches of tensors, got an empty batch")


def walk(function: Callable[[Tensor], Any], item: Any) -> Any:
    """The same structure of tuples, lists and dicts with `function` of each tensor."""
    if isinstance(item, Tensor):
        return function(item)
    if isinstance(item, dict):
        return {key: walk(function, part) for key, part in item.items()}
    if isinstance(item, (tuple, list)):
        return type(item)(walk(function, part) for part in item)
    return item
