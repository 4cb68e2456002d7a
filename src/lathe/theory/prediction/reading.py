"""Reads a network by running it once: every operation between tensors is seen, and said what it does to signals.

Works for whatever runs: control flow, functions, hooks and modules of other libraries are followed alike, because it is
the operations themselves that are recorded (`torch.overrides.TorchFunctionMode`), each with the module that it was
called in. What theory has nothing to say about is collected and named, with what to do.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lathe.core.example import call
from lathe.theory.prediction.layout import Layout, grid_of, units_of
from lathe.theory.prediction.operations import HANDLERS, HINTS, OPENING, plain_name

__all__ = ["Reading", "Recorder", "Step", "UnsupportedNetwork", "read"]


class UnsupportedNetwork(ValueError):
    """A network with parts that the theory cannot follow; the message names each, and what to do."""


@dataclass(eq=False)
class Step:
    """One operation on signals.

    Attributes:
        index: its place in the order of execution.
        name: the module that did it, or the module around it and the function.
        kind: what it does to signals, see `operations.py`.
        inputs: the steps whose results it takes.
        layout: what the axes of its result stand for.
        options: what else there is to know, by kind.
    """

    index: int
    name: str
    kind: str
    inputs: tuple[int, ...]
    layout: Layout
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, ...]:
        return grid_of(self.layout)

    @property
    def units(self) -> int:
        return units_of(self.layout)


@dataclass
class Reading:
    """A network as a list of steps.

    Attributes:
        steps: in the order of execution.
        output: the step that makes the network's result.
        batch: inputs in the example.
        notes: what was taken as something simpler than it is.
    """

    steps: list[Step]
    output: int
    batch: int
    notes: list[str]


def read(model: nn.Module, example: Any) -> Reading:
    """The steps of one forward pass of `model` in training mode; the model is left as it was.

    Raises:
        UnsupportedNetwork: with every part that is not supported.
        ValueError: where the network does not run on the example, or has no weights.
    """
    twin = copy.deepcopy(model).train()
    with torch.random.fork_rng(), torch.no_grad():
        return Recorder(twin, example).run()


def batch_size(example: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    if not tensors:
        raise ValueError(
            f"example_input must hold a tensor whose first axis counts inputs, got {type(example).__name__}"
        )
    if any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors):
        raise ValueError("example_input must be finite, got infinite or NaN entries")
    if len(tensors[0]) == 0:
        raise ValueError("example_input must hold at least one input, got an empty batch")
    return len(tensors[0])


class Recorder(TorchFunctionMode):
    """Runs a network and writes down its steps; `observe(step, tensor)` is called with each step's result."""

    def __init__(self, model: nn.Module, example: Any, observe: Callable[[Step, Tensor], None] | None = None) -> None:
        super().__init__()
        self.model, self.example, self.observe = model, example, observe
        self.batch = batch_size(example)
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self.known: dict[int, int] = {}
        self.blocked: dict[int, list[str]] = {}
        self.parameters = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        self.derived: dict[int, frozenset[str]] = {}
        self.alive: list[Any] = []
        self.stack: list[str] = [""]
        self.called: set[str] = set()
        self.entered: dict[tuple[int, int, Layout], Step] = {}

    def run(self) -> Reading:
        self.result: Any = None
        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                hooks.callback(module.register_forward_pre_hook(self._entering(name)).remove)
                hooks.callback(module.register_forward_hook(self._leaving).remove)
            hooks.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            try:
                with self:
                    self.result = call(self.model, self.example)
            except Exception as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ValueError(
                    f"model does not run on example_input in {self.stack[-1] or 'its forward'!r}: {reason}"
                ) from error
        if not self.blocked and not any(step.kind == "weight" for step in self.steps):
            raise ValueError("model must have linear layers, convolutions or embeddings, found none")
        output = self._output(self.result)
        return Reading(self.steps, output, self.batch, list(dict.fromkeys(self.notes)))

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, arguments: Any) -> None:
            self.stack.append(name)

        return enter

    def _leaving(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.stack.pop()

    def _output(self, result: Any) -> int:
        result = getattr(result, "logits", result)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if id(tensor) in self.known:
                self.output = tensor
                return self.known[id(tensor)]
        reasons = [reason for tensor in tensors for reason in self.blocked.get(id(tensor), [])]
        if reasons:
            listed = "\n".join(f"- {reason}" for reason in dict.fromkeys(reasons))
            raise UnsupportedNetwork(f"model has parts that predict cannot follow:\n{listed}")
        raise ValueError("model must put out a tensor that depends on its weights and on example_input")

    # --- what handlers use ---

    def step_of(self, value: Any) -> Step | None:
        number = self.known.get(id(value)) if isinstance(value, Tensor) else None
        return None if number is None else self.steps[number]

    def parameters_of(self, value: Any) -> frozenset[str]:
        """Names of the parameters that a tensor is, or was computed from."""
        if id(value) in self.parameters:
            return frozenset([self.parameters[id(value)]])
        return self.derived.get(id(value), frozenset())

    def add(self, kind: str, inputs: tuple[int, ...], layout: Layout, name: str = "", **options: Any) -> Step:
        step = Step(len(self.steps), name or self.stack[-1], kind, inputs, layout, options)
        self.steps.append(step)
        return step

    def data(self, value: Tensor, layout: Layout) -> Step:
        """The step of a tensor that no weight had a part in; one for all uses, so that streams can be seen to part."""
        key = id(value), value._version, layout
        if key not in self.entered:
            self.alive.append(value)
            self.entered[key] = self.add("data", (), layout, name="input", value=value.detach().clone())
        return self.entered[key]

    def note(self, text: str) -> None:
        self.notes.append(text)

    def place(self, function: str) -> str:
        """The module that is running; with the function, where it does other things too."""
        name = self.stack[-1]
        module = self.model.get_submodule(name)
        lone = not any(True for _ in module.children())
        return name if lone and name else f"{name} ({function})" if name else function

    # --- the mode ---

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = plain_name(func)
        blocked = [reason for leaf in leaves for reason in self.blocked.get(id(leaf), [])]
        moving = any(id(leaf) in self.known for leaf in leaves)
        weights = frozenset(each for leaf in leaves for each in self.parameters_of(leaf))
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name == "setitem" and (moving or blocked):
            self.blocked[id(args[0])] = [*blocked, f"{self.place('indexed assignment')}: {HINTS['setitem']}"]
        if not outputs:
            return result
        self.alive += [*leaves, *outputs]
        if blocked:
            for tensor in outputs:
                self.blocked[id(tensor)] = blocked
            return result
        if not moving and not (name in OPENING and weights and len(leaves) > 1):
            for tensor in outputs:
                if weights and id(tensor) not in self.parameters:
                    self.derived[id(tensor)] = weights
            return result
        made = self._made(name, func, args, kwargs, result)
        for tensor in outputs:
            self.known.pop(id(tensor), None)
        if isinstance(made, str):
            for tensor in outputs:
                self.blocked[id(tensor)] = [made]
            return result
        for tensor, step in made:
            self.known[id(tensor)] = step.index
            if self.observe is not None:
                self.observe(step, tensor)
        return result

    def _made(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> list[tuple[Tensor, Step]] | str:
        """The steps that a call makes, or what is the matter with it."""
        handler = HANDLERS.get(name)
        hint = HINTS.get(name, "predict the part before it, or put a supported layer in its place")
        made = hint if handler is None else handler(self, name, func, args, kwargs, result)
        return f"{self.place(name)}: {name}: {made}" if isinstance(made, str) else made
