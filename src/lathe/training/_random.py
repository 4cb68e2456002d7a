"""The random numbers of a run, of every generator that a network or a Dataset may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["own_randomness", "random_state", "restore_random", "seed_everything"]


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Give the global random numbers back as they were."""
    before = random_state(None, device)
    try:
        yield
    finally:
        restore_random(before, None, device)


def seed_everything(seed: int, generator: torch.Generator) -> None:
    generator.manual_seed(seed)
    torch.default_generator.manual_seed(seed)
    if generator.device.type == "cuda":
        with torch.cuda.device(generator.device):
            torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (what a Dataset's transforms draw from)
    random.seed(seed)


def random_state(generator: torch.Generator | None, device: torch.device | None = None) -> dict[str, Any]:
    device = generator.device if generator is not None else device
    kind, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]  # noqa: NPY002
    return {
        "generator": None if generator is None else generator.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None,
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def restore_random(
    state: dict[str, Any], generator: torch.Generator | None, device: torch.device | None = None
) -> None:
    device = generator.device if generator is not None else device
    if generator is not None:
        generator.set_state(state["generator"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
