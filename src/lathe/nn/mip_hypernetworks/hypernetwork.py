"""The hypernetwork itself: theta = theta_0 + h(E(gamma)), all predicted tensors out of one product."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from lathe.core.precision import without_autocast
from lathe.nn.mip_hypernetworks.encoding import Encoding, InputSpec, encode, specs
from lathe.nn.mip_hypernetworks.heads import make_head
from lathe.nn.mip_hypernetworks.layers import external_shapes

__all__ = ["HyperNetwork", "param_groups"]

Target = nn.Module | Mapping[str, "tuple[int, ...] | Tensor"]
_SLOPE = 0.01  # of nn.LeakyReLU


class HyperNetwork(nn.Module):
    """Predicts named tensors from `gamma` in the magnitude-invariant parametrisation (MIP).

    The input is encoded to constant norm and the output is a change of independent learnt weights theta_0, so that
    neither the predicted weights nor their gradients scale with gamma. `encoding="none", residual=False` is the usual
    hypernetwork, whose predictions are proportional to gamma.

    Args:
        inputs: name -> `InputSpec`, or a size for entries in [0, 1]; a number is the size of one input named "gamma".
        target: what to predict: a network (its external tensors where it has such layers, else all its parameters), or
            name -> shape or tensor. theta_0 starts at the values of tensors and parameters.
        hidden: sizes of the hidden layers.
        activation: makes the activation after each of them.
        norm: makes a normalisation of that many features after each activation; the paper finds that it is no remedy
            (a LayerNorm makes the usual hypernetwork blind to a scalar gamma).
        encoding, frequencies: see `encode`.
        residual: add theta_0, `flat_theta0` (|theta|,).
        head_rank: factorise the last matrix to this rank.
        head_chunk: let chunks of that many entries share the last matrix, see `ChunkedHead`.
        adapter_rank: predict changes of this rank for each matrix, see `AdapterHead`.
        clamp: move values outside of an input's range to its bounds instead of refusing them. On an accelerator this
            also spares the wait that a check of values there costs; numbers and CPU tensors are checked for free.
        generator: of the initial weights.
        device, dtype: of the weights; those of the target where it has tensors.

    Raises:
        ValueError: where there is nothing to predict, tensors differ in dtype or device, or sizes are not positive.

    Example:
        >>> weights = HyperNetwork(1, {"weight": (4, 3), "bias": (4,)})(gamma=0.5)
        >>> {name: tuple(weight.shape) for name, weight in weights.items()}
        {'weight': (4, 3), 'bias': (4,)}
    """

    def __init__(
        self,
        inputs: Mapping[str, InputSpec | int | tuple[int, ...]] | int,
        target: Target,
        hidden: Sequence[int] = (16, 128),
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
        *,
        norm: Callable[[int], nn.Module] | None = None,
        encoding: Encoding = "mip",
        frequencies: int = 1,
        residual: bool = True,
        head_rank: int | None = None,
        head_chunk: int | None = None,
        adapter_rank: int | None = None,
        clamp: bool = False,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if encoding not in ("mip", "none", "complement"):
            raise ValueError(f"encoding must be 'mip', 'none' or 'complement', got {encoding!r}")
        if frequencies < 1 or (frequencies > 1 and encoding != "mip"):
            raise ValueError(f"frequencies must be 1, or more with encoding 'mip', got {frequencies} with {encoding!r}")
        if any(size < 1 for size in hidden):
            raise ValueError(f"hidden must hold positive sizes, got {tuple(hidden)}")
        self.inputs = specs(inputs)
        self.shapes, values = _shapes_and_values(target)
        self.encoding: Encoding = encoding
        self.frequencies, self.clamp = frequencies, clamp
        for value in values.values():
            device, dtype = value.device if device is None else device, value.dtype if dtype is None else dtype
        made: dict[str, Any] = {"device": device, "dtype": dtype}

        reals = sum(spec.entries for spec in self.inputs.values() if spec.kind == "real")
        categories = sum(spec.entries for spec in self.inputs.values() if spec.kind == "categorical")
        per_real = {"none": 1, "complement": 2, "mip": 2 * frequencies}[encoding]
        sizes = [per_real * reals + categories, *hidden]
        self.trunk = nn.Sequential()
        for before, after in pairwise(sizes):
            self.trunk.append(nn.Linear(before, after, **made)).append(activation())
            if norm is not None:
                self.trunk.append(norm(after).to(**{k: v for k, v in made.items() if v is not None}))
        self.head = make_head(sizes[-1], self.shapes, head_rank, head_chunk, adapter_rank, **made)
        total = sum(self._sizes)
        self.flat_theta0 = nn.Parameter(torch.zeros(total, **made)) if residual else None
        self.reset_parameters(generator)
        if values and self.flat_theta0 is not None:
            self._set_theta0(values)

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes.values()]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights anew.

        Hidden layers are Kaiming normal by fan_out for a LeakyReLU, heads by fan_out tensor by tensor (see
        `lathe.nn.mip_hypernetworks.heads`), and theta_0 as in `reset_theta0`, with 1 for vectors named "weight", the
        scales of a normalisation. For d real inputs under "mip" and LeakyReLUs, the changes of a tensor of m entries
        then start with a standard deviation of sqrt(d / m).
        """
        for module in self.trunk:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, a=_SLOPE, mode="fan_out", generator=generator)
                nn.init.zeros_(module.bias)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self.head.reset_parameters(generator)
        if self.flat_theta0 is not None:
            with torch.no_grad():
                for name, value in self.theta0().items():
                    value.fill_(float(value.ndim == 1 and name.rpartition(".")[2] == "weight"))
            self.reset_theta0(generator)

    @torch.no_grad()
    def reset_theta0(self, generator: torch.Generator | None = None) -> None:
        """Draws theta_0 as of a fresh network: Kaiming normal by fan_in for a LeakyReLU, biases 0, the rest as is."""
        for name, value in self.theta0().items():
            if value.ndim > 1:
                nn.init.kaiming_normal_(value, a=_SLOPE, generator=generator)
            elif name.rpartition(".")[2] == "bias":
                value.zero_()

    def theta0(self) -> dict[str, Shaped[Tensor, "..."]]:
        """The independent weights by name, as views: what is written into them is learnt on from there.

        Raises:
            RuntimeError: for a hypernetwork without them (`residual=False`).
        """
        return self.split(self._require_theta0())

    def set_theta0(self, weights: nn.Module | Mapping[str, Tensor]) -> None:
        """Copies pretrained weights into theta_0.

        Args:
            weights: a network, or its state_dict; names that are not predicted are passed over.

        Raises:
            ValueError: where a predicted tensor is missing or of another shape.
        """
        found = dict(weights.named_parameters(remove_duplicate=False)) if isinstance(weights, nn.Module) else weights
        missing = [name for name in self.shapes if name not in found]
        if missing:
            raise ValueError(f"weights must hold every predicted tensor, got none for {', '.join(missing)}")
        self._set_theta0({name: found[name] for name in self.shapes})

    @torch.no_grad()
    def _set_theta0(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if value.shape != torch.Size(self.shapes[name]):
                raise ValueError(f"{name} must be of shape {self.shapes[name]}, got {tuple(value.shape)}")
        own = self.theta0()
        for name, value in values.items():
            own[name].copy_(value)

    def freeze_theta0(self, frozen: bool = True) -> None:
        """Leaves theta_0 as it is in training; `frozen=False` lets it learn again."""
        self._require_theta0().requires_grad_(not frozen)

    def _require_theta0(self) -> nn.Parameter:
        if self.flat_theta0 is None:
            raise RuntimeError("this hypernetwork has no theta_0: it was made with residual=False")
        return self.flat_theta0

    @torch.no_grad()
    def scale(self, select: str, factor: float, *, theta0: bool = True) -> None:
        """Multiplies the initial predictions of some tensors by a factor: theta_0 and its changes, or the changes only.

        For layers that should start near zero, as the flow of a registration network: MIP would start them at random.

        Args:
            select: glob of names.
            theta0: False leaves theta_0 alone.

        Raises:
            ValueError: where no name matches.
        """
        names = [name for name in self.shapes if fnmatchcase(name, select)]
        if not names:
            raise ValueError(f"select must match predicted tensors ({', '.join(self.shapes)}), got {select!r}")
        for name in names:
            self.head.scale_rows(name, factor)
            if theta0 and self.flat_theta0 is not None:
                self.theta0()[name].mul_(factor)

    def forward(self, **gammas: Shaped[Tensor, "..."] | float) -> dict[str, Float[Tensor, "..."]]:
        """All predicted tensors for one value of every input, or for a batch of them.

        Args:
            gammas: by name, each of its input's shape `(size,)` for one value (a number where that is all), or
                `(batch, size)`; categorical inputs are integers `()` or `(batch,)`.

        Returns:
            name -> `shape`, or `(batch, *shape)` where an input came as a batch; views of one tensor, see `flat`.

        Raises:
            TypeError: for integer tensors of real inputs.
            ValueError: for missing or unknown names, wrong shapes, unequal batches, or values out of range.
        """
        return self.split(self.flat(**gammas))

    def flat(self, **gammas: Shaped[Tensor, "..."] | float) -> Float[Tensor, "*batch theta"]:
        """As `forward`, all tensors one after the other in one."""
        missing, unknown = self.inputs.keys() - gammas.keys(), gammas.keys() - self.inputs.keys()
        if missing or unknown:
            raise ValueError(
                f"inputs must be {', '.join(self.inputs)}; missing: {', '.join(sorted(missing)) or 'none'}, "
                f"unknown: {', '.join(sorted(unknown)) or 'none'}"
            )
        encoded, batched = self._encoded(gammas)
        # Nearly all of the work is memory traffic; autocast would round theta_0 to save next to nothing.
        with without_autocast(encoded.device):
            hidden = self.trunk(encoded)
            return self.head(hidden if batched else hidden[0], self.flat_theta0)

    def _encoded(self, gammas: Mapping[str, Tensor | float]) -> tuple[Tensor, bool]:
        reals: list[Tensor] = []
        categories: list[Tensor] = []
        counts: dict[str, int] = {}
        for name, spec in self.inputs.items():
            rows, batched = spec.rows(name, gammas[name], clamp=self.clamp)
            (reals if spec.kind == "real" else categories).append(rows)
            if batched:
                counts[name] = len(rows)
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise ValueError(f"inputs must come in batches of one size, got {told}")
        like = next(self.head.parameters())
        parts = []
        if reals:
            if len({rows.device for rows in reals}) > 1:
                reals = [rows.to(like.device) for rows in reals]
            joined = torch.cat(_same_length(reals, counts), -1) if len(reals) > 1 else reals[0]
            parts.append(encode(joined, self.encoding, frequencies=self.frequencies))
        parts = [part.to(like.device, like.dtype) for part in _same_length([*parts, *categories], counts)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1), bool(counts)

    def split(self, flat: Shaped[Tensor, "*batch theta"]) -> dict[str, Shaped[Tensor, "..."]]:
        """Views of a flat tensor by name and shape."""
        # One split, not a narrow a tensor: its gradient is one concatenation instead of a full-size sum of each part.
        parts = flat.split(self._sizes, -1)
        return {name: part.view(*flat.shape[:-1], *shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def extra_repr(self) -> str:
        """What goes in and what comes out."""
        residual = "" if self.flat_theta0 is not None else ", residual=False"
        return (
            f"{', '.join(self.inputs)} -> {len(self.shapes)} tensors of {sum(self._sizes):,}, {self.encoding}{residual}"
        )


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser that decay all but theta_0, which is the network, not a change of it."""
    kept = {id(module.flat_theta0) for module in model.modules() if isinstance(module, HyperNetwork)}
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in learnt if id(p) not in kept], "weight_decay": weight_decay},
        {"params": [p for p in learnt if id(p) in kept], "weight_decay": 0.0},
    ]


def _shapes_and_values(target: Target) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    named: Mapping[str, tuple[int, ...] | Tensor]
    named = external_shapes(target) or dict(target.named_parameters()) if isinstance(target, nn.Module) else target
    if not named:
        raise ValueError("target must have tensors to predict, got none")
    values = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    kinds = {(value.dtype, value.device) for value in values.values()}
    if len(kinds) > 1:
        told = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"target must have tensors of one dtype on one device, got {told}")
    for name, value in values.items():
        if not value.is_floating_point():
            raise TypeError(f"target must have floating-point tensors, got {value.dtype} for {name}")
    shapes = {name: tuple(value.shape) if isinstance(value, Tensor) else tuple(value) for name, value in named.items()}
    for name, shape in shapes.items():
        if math.prod(shape) < 1:
            raise ValueError(f"target must have tensors with entries, got shape {shape} for {name}")
    return shapes, values


def _same_length(parts: list[Tensor], counts: Mapping[str, int]) -> list[Tensor]:
    """Rows of one length: single values are repeated as often as the batch of another input is long."""
    length = next(iter(counts.values()), 1)
    return [part if len(part) == length else part.expand(length, -1) for part in parts]
