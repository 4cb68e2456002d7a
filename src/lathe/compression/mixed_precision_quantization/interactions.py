"""How much the quantisation errors of two layers hurt each other: `Omega_ij = D({i,j}) - D({i}) - D({j})`.

`D(S)` is the loss increase when the layers of `S` are quantised. All pairs need L(L+1)/2 runs of the network; but a run
with layers i and j quantised is that with i alone until j starts. So each run with one layer quantised is kept, and
pairs start from what it had computed: of a chain, a third of the work is left.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lathe.compression.mixed_precision_quantization.calibration import as_batches, calibrate
from lathe.compression.mixed_precision_quantization.simulation import Simulator
from lathe.core.example import call

__all__ = ["Interactions", "pairwise_interactions"]


class Interactions(NamedTuple):
    """Loss increases by layers and by pairs of layers, in the order of the layers asked for."""

    single: Float[Tensor, " layers"]
    """`D({i})`."""
    pair: Float[Tensor, "layers layers"]
    """`Omega_ij`, symmetric, zero on the diagonal."""

    def together(self) -> Float[Tensor, "layers layers"]:
        """`D({i, j})`, with `D({i})` on the diagonal."""
        return self.pair + self.single[:, None] + self.single[None, :] - torch.diag(self.single)


def pairwise_interactions(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Any,
    bits: int,
    layers: Sequence[str] | None = None,
    *,
    reuse: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Interactions:
    """Measures all single and pair terms by forward passes over a small calibration set (256-512 samples suffice).

    Args:
        model: a `Simulator`, or a network, which is then calibrated on the same batches (largest magnitudes, a scale
            for each output channel).
        loss_fn: `loss_fn(output, *targets)` -> scalar, a mean over samples.
        batches: batches `(inputs, *targets)`, or a tuple of tensors.
        bits: of the quantised layers; take the lowest that the search may use: at 8 bits pair terms drown in rounding.
        layers: names; None takes all, in the order in which they run.
        reuse: start each pair from the kept activations of the run with its first layer quantised. The answer is the
            same; networks whose forward depends on values are recognised, and run in full with a `RuntimeWarning`.

    Raises:
        ValueError: where `bits` is not in 2..8, or there is no sample or no layer.
    """
    data = as_batches(batches, name="batches")
    simulator = model if isinstance(model, Simulator) else Simulator(model, calibrate(model, data))
    names = list(simulator.layers) if layers is None else list(layers)
    unknown = [name for name in names if name not in simulator.layers]
    if unknown or not names:
        raise ValueError(f"layers must name layers among {list(simulator.layers)}, got {unknown or 'none'}")
    kept = simulator.config
    total = torch.zeros(len(names) + 1, len(names) + 1, dtype=torch.float64)
    samples = 0
    try:
        for index, batch in enumerate(data):
            size = next(leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
            total += size * _losses(simulator, loss_fn, batch, bits, names, reuse)
            samples += size
            if progress is not None:
                progress("pairs", index + 1, len(data))
    finally:
        simulator.configure(kept)
    # Row and column 0 stand for no layer: total[0, 0] is the clean loss, total[0, i] that with layer i alone.
    total /= samples
    single = total[0, 1:] - total[0, 0]
    pair = (total[1:, 1:] - total[0, 0]) - single[:, None] - single[None, :]
    return Interactions(single, pair.fill_diagonal_(0.0))


@torch.no_grad()
def _losses(
    simulator: Simulator, loss_fn: Callable[..., Tensor], batch: Any, bits: int, names: list[str], reuse: bool
) -> Tensor:
    """Losses by pairs of layers, with no layer as the first row and column."""
    inputs, *targets = batch
    losses = torch.zeros(len(names) + 1, len(names) + 1, dtype=torch.float64)
    simulator.configure({})
    replay = _Replay(simulator, inputs) if reuse else None

    def loss(layers: list[str], keep: bool = False) -> float:
        simulator.configure(dict.fromkeys(layers, bits))
        if replay is None:
            output = call(simulator, inputs)
        else:
            output = replay.run(inputs, start=simulator.layers[layers[-1]] if layers else None, keep=keep)
        return float(loss_fn(output, *targets))

    try:
        losses[0, 0] = loss([], keep=True)
        order = list(range(len(names))) if replay is None else replay.order([simulator.layers[name] for name in names])
        for place, i in enumerate(order):
            if replay is not None:
                replay.back_to_clean()
            losses[0, i + 1] = losses[i + 1, 0] = loss([names[i]], keep=True)
            for j in order[place + 1 :]:
                losses[i + 1, j + 1] = losses[j + 1, i + 1] = loss([names[i], names[j]])
    except _ChangedPath as change:
        warnings.warn(f"{change}; running every pair in full", RuntimeWarning, stacklevel=4)
    else:
        return losses
    finally:
        if replay is not None:
            replay.close()
    return _losses(simulator, loss_fn, batch, bits, names, reuse=False)


class _ChangedPath(Exception):
    """The network called its modules in another order than before."""


@dataclass
class _Call:
    """One call of a module in the order in which calls start."""

    module: nn.Module
    end: int = 0
    """How many calls had started when it was over; the calls inside it are those between."""
    mutated: bool = False
    """Whether somebody wrote into its result later (`nn.ReLU(inplace=True)`, `+=`)."""


class _Replay:
    """Runs a network again from a layer on, taking all that was over before that layer from a kept run.

    Calls of modules are numbered as they start. A call whose last inner call started before layer j does not depend on
    what j does, so its kept result stands in for it, whatever it holds: one lookup replaces a whole block.
    """

    def __init__(self, simulator: Simulator, inputs: Any) -> None:
        self.simulator = simulator
        self.calls: list[_Call] = []
        self.next = 0
        self.start: int | None = None
        self.keep = True
        self.recording = True
        self.clean: dict[int, Any] = {}
        self.kept: dict[int, Any] = {}
        self.wrapped: list[nn.Module] = []
        for module in simulator.model.modules():
            inside = any(module is layer.layer for layer in simulator.layers.values())
            if module is simulator.model or "forward" in module.__dict__ or inside:
                continue
            module.forward = self._wrap(module, module.forward)  # type: ignore[method-assign]
            self.wrapped.append(module)
        try:
            results: list[tuple[int, Tensor, int]] = []
            self.versions: list[tuple[int, Tensor, int]] | None = results
            call(simulator, inputs)
        except BaseException:
            self.close()
            raise
        for index, tensor, version in results:
            self.calls[index].mutated |= tensor._version != version
        self.versions, self.recording = None, False
        self.first: dict[int, int] = {}
        for index, each in enumerate(self.calls):
            self.first.setdefault(id(each.module), index)

    def order(self, modules: Sequence[nn.Module]) -> list[int]:
        """Positions of the modules, sorted by when they run first."""
        return sorted(range(len(modules)), key=lambda index: self.first.get(id(modules[index]), len(self.calls)))

    def run(self, inputs: Any, start: nn.Module | None, keep: bool) -> Any:
        """The network's output; everything before the first call of `start` comes from the kept run."""
        self.next, self.keep = 0, keep
        self.start = None if start is None else self.first.get(id(start), len(self.calls))
        output = call(self.simulator, inputs)
        if keep and start is None:
            self.clean = dict(self.kept)
        return output

    def back_to_clean(self) -> None:
        """Takes the run without any quantised layer for the kept one."""
        self.kept = dict(self.clean)

    def close(self) -> None:
        for module in self.wrapped:
            module.__dict__.pop("forward", None)

    def _wrap(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            index = self.next
            if self.recording:
                self.calls.append(_Call(module))
            elif index >= len(self.calls) or self.calls[index].module is not module:
                raise _ChangedPath(f"{type(self.simulator.model).__name__} does not call its modules in a fixed order")
            this = self.calls[index]
            if self.start is not None and this.end <= self.start and index in self.kept:
                self.next = this.end
                return _copied(self.kept[index]) if this.mutated else self.kept[index]
            self.next = index + 1
            result = forward(*args, **kwargs)
            if self.recording:
                this.end = self.next
                assert self.versions is not None
                self.versions += [
                    (index, each, each._version) for each in tree_leaves(result) if isinstance(each, Tensor)
                ]
            elif self.keep:
                self.kept[index] = _copied(result) if this.mutated else result
            return result

        return run


def _copied(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
