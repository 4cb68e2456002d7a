"""Which dimensions of which tensors grow with width: by comparing a model with a narrower copy of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

__all__ = ["BaseLike", "TensorWidth", "widths"]

MakeModel: TypeAlias = Callable[[int], nn.Module]
BaseLike: TypeAlias = nn.Module | Mapping[str, Sequence[int]] | MakeModel


@dataclass(frozen=True)
class TensorWidth:
    """How a parameter's dimensions compare with those at the base width.

    Attributes:
        kind: "input" (one dimension grows: input weights, biases, gains, embeddings), "hidden" (both the fan-in and the
            fan-out grow), "readout" (only the fan-in grows), "tied" (an embedding that is the readout too), "fixed".
        shape, base_shape: of the tensor.
        m_in: fan-in over base fan-in; one where it does not grow.
        m_out: fan-out over base fan-out, likewise.
        module: the name of the module that multiplies by it, where the tensor is its weight.
    """

    kind: str
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    m_in: float
    m_out: float
    module: str | None = None


def widths(
    model: nn.Module, base: BaseLike, base_width: int | None, readout: Iterable[str]
) -> tuple[dict[str, TensorWidth], Callable[[], nn.Module | None]]:
    """The `TensorWidth` of each parameter, and a function that gives the base model with values, if it can be had."""
    with_values: Callable[[], nn.Module | None] = lambda: None  # noqa: E731
    if isinstance(base, nn.Module):
        if not any(parameter.is_meta for parameter in base.parameters()):
            with_values = lambda: base  # noqa: E731
        base_shapes, grown = shapes_of(base), None
    elif isinstance(base, Mapping):
        base_shapes, grown = {name: tuple(shape) for name, shape in base.items()}, None
    elif callable(base):
        if base_width is None or base_width < 1:
            raise ValueError(f"base_width must be a width at which to call base, got {base_width!r}")
        make, width = base, base_width
        base_shapes, grown = _shapes_at(make, width), _shapes_at(make, 2 * width)
        with_values = lambda: _built(make, width)  # noqa: E731
    else:
        raise TypeError(
            f"base must be a module, a mapping of shapes or a function of the width, got {type(base).__name__}"
        )
    shapes = shapes_of(model)
    _same_names(shapes, base_shapes)
    owners = _owners(model)
    named = set(readout)
    known = set(shapes) | {name.rpartition(".")[0] for name in shapes}
    if named - known:
        raise ValueError(f"readout must name parameters or modules with parameters, got {sorted(named - known)}")
    found = {}
    for name, shape in shapes.items():
        flags = _flags(name, shape, base_shapes[name], None if grown is None else grown[name])
        is_named = name in named or (name.rpartition(".")[0] in named and sum(flags) == 1 and len(shape) > 1)
        found[name] = _tensor(name, shape, base_shapes[name], flags, owners[name], is_named)
    return found, with_values


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Each parameter's shape by its name; a shared parameter goes by its first."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _shapes_at(make_model: MakeModel, width: int) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"):
            return shapes_of(make_model(width))
    except (NotImplementedError, RuntimeError):  # a constructor that looks at values
        return shapes_of(_built(make_model, width))


def _built(make_model: MakeModel, width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return make_model(width)


def _same_names(shapes: Mapping[str, object], base: Mapping[str, object]) -> None:
    if set(shapes) != set(base):
        missing, extra = sorted(set(shapes) - set(base)), sorted(set(base) - set(shapes))
        raise ValueError(
            "base must have the parameters of model, only narrower"
            + (f"; it lacks {', '.join(missing[:5])}" if missing else "")
            + (f"; only it has {', '.join(extra[:5])}" if extra else "")
        )


def _flags(name: str, shape: Sequence[int], base: Sequence[int], grown: Sequence[int] | None) -> list[bool]:
    """Whether each dimension is a width."""
    if len(shape) != len(base) or (grown is not None and len(grown) != len(base)):
        raise ValueError(f"parameter {name!r} must have as many dimensions as in base, got {shape} and {tuple(base)}")
    if grown is None:
        return [size != small for size, small in zip(shape, base)]
    flags = [large != small for large, small in zip(grown, base)]
    for size, small, flag in zip(shape, base, flags):
        if size != small and not flag:
            raise ValueError(
                f"parameter {name!r} is {tuple(shape)} in model and {tuple(base)} in base, in a dimension that does "
                f"not grow with the width that base is given"
            )
    return flags


@dataclass(frozen=True)
class _Role:
    """How a module uses a parameter: which dimensions are fan-out and fan-in, and whether it looks rows up."""

    module: str
    out: int
    into: int
    looks_up: bool = False


def _owners(model: nn.Module) -> dict[str, list[_Role | None]]:
    """For each parameter, by its first name: its role in every module that holds it; None where that is not known."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    roles: dict[str, list[_Role | None]] = {name: [] for name in first.values()}
    for name, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            roles[first[id(parameter)]].append(_role(name, module, local))
    return roles


def _role(name: str, module: nn.Module, local: str) -> _Role | None:
    if isinstance(module, nn.MultiheadAttention):
        return _Role(name, 0, 1) if local.endswith("proj_weight") else None
    if local != "weight":
        return None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return _Role(name, 1, 0, looks_up=True)
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd) or (
        # The linear layer of Hugging Face's GPT-2, which keeps its weight as (in, out).
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )
    if transposed:
        return _Role(name, 1, 0)
    if isinstance(module, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)):
        return _Role(name, 0, 1)
    return None


def _tensor(
    name: str,
    shape: tuple[int, ...],
    base: tuple[int, ...],
    flags: list[bool],
    roles: list[_Role | None],
    is_named: bool,
) -> TensorWidth:
    grows = [dimension for dimension, flag in enumerate(flags) if flag]
    m = [size / small if flag else 1.0 for size, small, flag in zip(shape, base, flags)]
    role = next((role for role in roles if role is not None and not role.looks_up), None)
    looked_up = any(role is not None and role.looks_up for role in roles)
    module = role.module if role else None
    if len(grows) > 2:
        raise NotImplementedError(
            f"parameter {name!r} grows in {len(grows)} dimensions, {shape}; muP has a rule for two"
        )
    if not grows:
        return TensorWidth("fixed", shape, base, 1.0, 1.0, module)
    if len(grows) == 1:
        (grown,) = grows
        at_readout = role is not None and grown == role.into
        if looked_up:
            return TensorWidth("tied" if at_readout else "input", shape, base, m[grown], m[grown], module)
        if at_readout or is_named:
            return TensorWidth("readout", shape, base, m[grown], 1.0, module)
        return TensorWidth("input", shape, base, 1.0, m[grown], module)
    if role is not None and {role.out, role.into} == set(grows):
        return TensorWidth("hidden", shape, base, m[role.into], m[role.out], module)
    one, other = grows
    if m[one] != m[other]:
        raise ValueError(
            f"parameter {name!r}, {shape} against {base} in base, belongs to a module whose fan-in is not known, and "
            f"its two widths grow by different factors; let both grow by the same"
        )
    return TensorWidth("hidden", shape, base, m[other], m[one], module)
