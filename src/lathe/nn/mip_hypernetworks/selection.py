"""Which parameters of a network are predicted, and every place where a tied one stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lathe.nn.mip_hypernetworks.layers import ExternalWeights, external_shapes

__all__ = ["Select", "aliases_of", "selected"]

Select = type[nn.Module] | str | Callable[[str, Tensor], bool] | Sequence["type[nn.Module] | str | Tensor"] | None


def selected(model: nn.Module, select: Select) -> dict[str, Tensor | tuple[int, ...]]:
    """Parameters by name that `select` means (see `hypernetize`), and the shapes of external tensors."""
    external = external_shapes(model)
    wanted: set[int] = set()
    if select is None:
        tied = _owned(model, (nn.Embedding, nn.EmbeddingBag))
        wanted = set() if external else _owned(model, (nn.Linear, _ConvNd)) - tied
    elif isinstance(select, (type, str)) or not callable(select):
        for each in [select] if isinstance(select, (type, str)) else _listed(select):
            wanted |= _matching(model, each)
    else:
        wanted = {id(parameter) for name, parameter in model.named_parameters() if select(name, parameter)}
    chosen: dict[str, Tensor | tuple[int, ...]] = dict(external)
    chosen |= {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}
    if not chosen:
        kinds = Counter(
            type(module).__name__ for module in model.modules() if any(True for _ in module.parameters(recurse=False))
        )
        told = ", ".join(f"{name} ({count})" for name, count in kinds.most_common()) or "none"
        raise ValueError(f"select must select parameters, got none with {select!r}; modules that have some: {told}")
    return chosen


def aliases_of(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """All names under which each parameter stands, its own first.

    Raises:
        ValueError: for a name that is no parameter of the network, or another shape.
    """
    external = external_shapes(model)
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{prefix}.{key}" if prefix else key)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, tuple[str, ...]] = {}
    for name, shape in shapes.items():
        if name in parameters:
            own, aliases = tuple(parameters[name].shape), names[id(parameters[name])]
        elif name in external:
            own, aliases = external[name], [name]
        else:
            kind = "a buffer" if name in dict(model.named_buffers()) else "no parameter of the network"
            raise ValueError(f"only parameters can be predicted; {name} is {kind}")
        if own != tuple(shape):
            raise ValueError(f"{name} must be of shape {own}, got {tuple(shape)}")
        if twice := set(aliases) & set(found):
            raise ValueError(f"{name} is tied to {twice.pop()}: it must be predicted once")
        found[name] = (name, *(alias for alias in aliases if alias != name))
    return found


def _listed(select: Any) -> list[Any]:
    if not isinstance(select, Sequence):
        raise TypeError(f"select must be types, globs, parameters or a function, got {type(select).__name__}")
    if not select:
        raise ValueError("select must select parameters, got an empty list")
    return list(select)


def _matching(model: nn.Module, each: Any) -> set[int]:
    """Identities of the parameters that one element of `select` means."""
    if isinstance(each, type):
        if not issubclass(each, nn.Module):
            raise TypeError(f"select must name types of modules, got {each.__name__}")
        return _owned(model, (each,))
    if isinstance(each, str):
        found = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if _fits(name, each)}
        if not found:
            buffers = [name for name, _ in model.named_buffers() if _fits(name, each)]
            what = f"only the buffer {buffers[0]}, which cannot be predicted" if buffers else "no parameter"
            raise ValueError(f"select must match names of parameters or modules; {each!r} matches {what}")
        return found
    if isinstance(each, Tensor):
        if not any(each is parameter for parameter in model.parameters()):
            kind = "a buffer" if any(each is buffer for buffer in model.buffers()) else "no parameter"
            raise ValueError(
                f"select must hold parameters of the network; a tensor {tuple(each.shape)} is {kind} of it"
            )
        return {id(each)}
    raise TypeError(f"select must be types, globs, parameters or a function, got {type(each).__name__} in it")


def _fits(name: str, pattern: str) -> bool:
    """Whether a glob matches a parameter's name or that of a module that it lies in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))


def _owned(model: nn.Module, types: tuple[type[nn.Module], ...]) -> set[int]:
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, types) and not isinstance(module, ExternalWeights)
        for parameter in module.parameters(recurse=False)
    }
