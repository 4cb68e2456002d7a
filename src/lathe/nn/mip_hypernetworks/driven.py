"""Any network, driven by a hypernetwork: its selected weights are predicted anew at every call, on `torch.func`."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from lathe.core.kept import Kept
from lathe.nn.mip_hypernetworks.encoding import InputSpec
from lathe.nn.mip_hypernetworks.hypernetwork import HyperNetwork
from lathe.nn.mip_hypernetworks.selection import Select, aliases_of, selected

__all__ = ["HyperDriven", "hypernetize", "using_weights"]

# One lock a network: while weights are exchanged in its modules, another thread must not call it.
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


def hypernetize(
    model: nn.Module,
    select: Select = None,
    inputs: Mapping[str, InputSpec | int | tuple[int, ...]] | int = 1,
    *,
    pretrained: bool = True,
    generator: torch.Generator | None = None,
    **hyper: Any,
) -> HyperDriven:
    """A copy of `model` whose selected parameters are predicted from `gamma`; call it as `driven(x, gamma=0.3)`.

    Args:
        select: what is predicted; the rest stays learnt as usual. None: weights and biases of all linear layers and
            convolutions that are not tied to an embedding (or, where the network has layers with external weights,
            those alone). Module types (one or several), globs of the names of parameters or of modules, a function of
            name and parameter, or parameters themselves. Tied parameters are predicted once.
        inputs: of the hypernetwork, by name; a number is the size of one input named "gamma".
        pretrained: theta_0 starts at the model's weights; else they are drawn as for a fresh network.
        generator: of the initial weights of the hypernetwork.
        hyper: further arguments of `HyperNetwork`.

    Raises:
        TypeError: for a `select` of another kind, or parameters that are not floating point.
        ValueError: where nothing is selected (saying what there is) or a buffer is, and as `HyperNetwork`.
    """
    chosen = selected(model, select)
    driven = HyperDriven(copy.deepcopy(model), HyperNetwork(inputs, chosen, generator=generator, **hyper))
    if not pretrained and driven.hyper.flat_theta0 is not None:
        driven.hyper.reset_theta0(generator)
    return driven


class HyperDriven(nn.Module):
    """A network, `primary`, with the weights that `hyper` predicts.

    Called with the primary's arguments and with those of the hypernetwork by name. One gamma serves the whole batch; a
    batch of gammas, `(batch, size)`, gives every sample a network of its own in one vectorised pass (`torch.func.vmap`:
    convolutions become grouped, products batched; recurrent layers run one after the other). Answers have the batch
    first.

    Args:
        primary: any network. Its parameters that `hyper` predicts are taken out of it: they are in no state_dict and
            no optimiser any more; theta_0 has their values.
        hyper: names among its targets are those of the primary's parameters.

    Raises:
        ValueError: where a name or shape is not one of the primary's, or the primary takes an argument that is named
            like an input of the hypernetwork.

    Example:
        >>> driven = hypernetize(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(36, 2)))
        >>> driven(torch.zeros(8, 1, 5, 5), gamma=0.3).shape
        torch.Size([8, 2])
        >>> driven(torch.zeros(8, 1, 5, 5), gamma=torch.rand(8, 1)).shape
        torch.Size([8, 2])
    """

    def __init__(self, primary: nn.Module, hyper: HyperNetwork) -> None:
        super().__init__()
        clash = set(hyper.inputs) & set(inspect.signature(primary.forward).parameters)
        if clash:
            raise ValueError(f"inputs must not be named like arguments of the network, got {', '.join(sorted(clash))}")
        self._aliases = aliases_of(primary, hyper.shapes)
        for module, key in _places(primary, self._aliases):
            module._parameters[key] = None
        self.primary, self.hyper = primary, hyper
        self._kept = Kept()
        self.train(primary.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the primary answers to its arguments, with the weights for the inputs of the hypernetwork.

        Raises:
            RuntimeError: where no input of the hypernetwork is given.
            ValueError: as `HyperNetwork.forward`; for a batch of gammas also where a tensor has another number of
                samples, or BatchNorm would take statistics over one sample of each network.
        """
        gammas = {name: kwargs.pop(name) for name in self.hyper.inputs if name in kwargs}
        if not gammas:
            wanted = ", ".join(f"{name}=..." for name in self.hyper.inputs)
            raise RuntimeError(f"the weights of this network depend on an input: call it with {wanted}")
        weights = self.weights(**gammas)
        name, shape = next(iter(self.hyper.shapes.items()))
        if weights[name].ndim > len(shape):
            return self._call_each(weights, args, kwargs)
        return self._call(weights, args, kwargs)

    def weights(self, **gammas: Shaped[Tensor, "..."] | float) -> dict[str, Shaped[Tensor, "..."]]:
        """The predicted weights by name, see `HyperNetwork.forward`.

        In evaluation and without gradients, those of the last gamma are remembered until a weight changes.
        """
        key = None if self.training or torch.compiler.is_compiling() else self._key(gammas)
        if key is None:
            return self.hyper(**gammas)
        sources = [*self.hyper.parameters(), *self.hyper.buffers()]
        with _exclusive(self.primary):
            flat = self._kept.get(sources, lambda: self.hyper.flat(**gammas), key)
        return self.hyper.split(flat)

    def at(self, **gammas: Shaped[Tensor, "..."] | float) -> nn.Module:
        """The network for one gamma, by itself: an ordinary module with parameters of its own, at no extra cost a call.

        Raises:
            ValueError: for a batch of gammas, and as `HyperNetwork.forward`.
        """
        with torch.no_grad():
            weights = self.weights(**gammas)
        for name, shape in self.hyper.shapes.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"at() takes one gamma, got a batch of {len(weights[name])}")
        with _exclusive(self.primary):
            fixed = copy.deepcopy(self.primary)
        for name, aliases in self._aliases.items():
            parameter = nn.Parameter(weights[name].clone())
            for module, key in _places(fixed, {name: aliases}):
                module._parameters[key] = parameter
        return fixed

    def theta0(self) -> dict[str, Shaped[Tensor, "..."]]:
        """As `HyperNetwork.theta0`."""
        return self.hyper.theta0()

    def freeze_theta0(self, frozen: bool = True) -> None:
        """As `HyperNetwork.freeze_theta0`."""
        self.hyper.freeze_theta0(frozen)

    def train(self, mode: bool = True) -> HyperDriven:
        """As `nn.Module.train`; training forgets remembered weights."""
        self._kept.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HyperDriven:
        self._kept.forget()
        return super()._apply(fn, recurse)

    def _call(self, weights: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        named = {alias: weights[name] for name, aliases in self._aliases.items() for alias in aliases}
        with _exclusive(self.primary):
            return functional_call(self.primary, named, args, kwargs, tie_weights=False)

    def _call_each(self, weights: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        count = len(next(iter(weights.values())))
        leaves, structure = tree_flatten((args, kwargs))
        tensors = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        for tensor in tensors.values():
            if tensor.ndim == 0 or len(tensor) != count:
                raise ValueError(
                    f"every tensor must have {count} samples, one a gamma, got shape {tuple(tensor.shape)}"
                )
        for name, module in self.primary.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"{name} ({type(module).__name__}) would take statistics of one sample of each network: call "
                    "eval(), give the batch one gamma, or normalise otherwise (GroupNorm)"
                )
        if count == 0:  # vmap needs a sample; any weights do for none
            return self._call({name: weight.sum(0) for name, weight in weights.items()}, args, kwargs)
        answer: Any = None

        def one(weights: dict[str, Tensor], samples: dict[int, Tensor]) -> list[Tensor]:
            nonlocal answer
            mine = [samples.get(place, leaf) for place, leaf in enumerate(leaves)]
            found, answer = tree_flatten(self._call(weights, *tree_unflatten(mine, structure)))
            for leaf in found:
                if not isinstance(leaf, Tensor):
                    raise TypeError(
                        f"with a gamma a sample a network must return tensors only, got {type(leaf).__name__}"
                    )
            return found

        samples = {place: tensor.unsqueeze(1) for place, tensor in tensors.items()}
        if any(isinstance(module, nn.RNNBase) for module in self.primary.modules()):  # torch cannot batch their weights
            rows = [
                one({k: v[i] for k, v in weights.items()}, {k: v[i] for k, v in samples.items()}) for i in range(count)
            ]
            found = [torch.stack(parts) for parts in zip(*rows)]
        else:
            found = vmap(one, randomness="different")(dict(weights), samples)
        return tree_unflatten([leaf.flatten(0, 1) if leaf.ndim > 1 else leaf for leaf in found], answer)

    def _key(self, gammas: Mapping[str, Tensor | float]) -> tuple[Any, ...] | None:
        """The values of a single gamma, to remember its weights by; None where they must not be remembered."""
        values: list[Any] = []
        for name, value in sorted(gammas.items()):
            if isinstance(value, Tensor):
                wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
                # Values on an accelerator would have to be waited for.
                if value.device.type != "cpu" or value.requires_grad or wrapped:
                    return None
                values += [name, value.shape, value.dtype, *value.flatten().tolist()]
            else:
                values += [name, value]
        return tuple(values)


@contextmanager
def using_weights(model: nn.Module, weights: Mapping[str, Shaped[Tensor, "..."]]) -> Iterator[nn.Module]:
    """For a while, the network computes with other tensors in place of its parameters, and gradients flow into them.

    Afterwards it has its own again, also after an exception. Blocks of several threads on one network, and calls of a
    `HyperDriven` that has it for its primary, wait for each other; a thread that calls the network without either sees
    what another one has put there. Where several threads need several weights at once, give each `HyperDriven.at`.

    Args:
        weights: by name of parameter; tied parameters are replaced everywhere.

    Raises:
        ValueError: for a name that is no parameter, or another shape.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    aliases = aliases_of(model, shapes)
    with _exclusive(model):
        places = [(*place, weights[name]) for name in aliases for place in _places(model, {name: aliases[name]})]
        own = [module._parameters[key] for module, key, _ in places]
        try:
            for module, key, weight in places:
                # A plain tensor may stand here, which setattr would refuse; torch.func does the same.
                module._parameters[key] = weight  # type: ignore[assignment]
            yield model
        finally:
            for (module, key, _), parameter in zip(places, own):
                module._parameters[key] = parameter


def _places(model: nn.Module, aliases: Mapping[str, Sequence[str]]) -> list[tuple[nn.Module, str]]:
    names = [alias.rpartition(".") for every in aliases.values() for alias in every]
    return [(model.get_submodule(prefix), key) for prefix, _, key in names]


def _exclusive(model: nn.Module) -> Any:
    """Lets one thread at a time exchange weights of a network."""
    if torch.compiler.is_compiling():  # a graph is recorded by one thread
        return nullcontext()
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())
