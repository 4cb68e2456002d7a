"""Which modules of a network follow one another, by the data that really flows between them.

`find_sequences(model, (nn.BatchNorm2d, nn.ReLU))` finds the pairs that one layer may stand for. The order in which
modules are registered says little; what counts is that the output of one goes into the next and nowhere else.

Sources, the surest first: `torch.fx` on the whole network; a recorded forward of `example_input`; `torch.fx` on the
parts that can be traced; and for what is left a guess, by the plain calls in the source of a module's `forward`, or,
where that names no children, by the order of registration within a container.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import inspect
import textwrap
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lathe.core.example import call

__all__ = ["DataFlow", "ModuleSequence", "find_sequences"]

Element = type | tuple  # a type, or several types of which each will do
TRACED = "torch.fx"
RECORDED = "a recorded forward of example_input"
TRACED_PART = "torch.fx on a part"
REGISTERED = "a guess by source and registration"


class ModuleSequence(NamedTuple):
    """Modules that follow one another, and nothing else uses what passes between them."""

    names: tuple[str, ...]
    """Qualified names, in the order of the data."""
    modules: tuple[nn.Module, ...]
    found_by: str
    """Where the order was read: torch.fx, a recorded forward, or the order of registration."""


def find_sequences(model: nn.Module, pattern: tuple, example_input: Any = None) -> list[ModuleSequence]:
    """The places of `model` where modules of the types in `pattern` follow one another.

    A sequence counts only if each module is called once, takes nothing but the output of the one before, and that
    output is used by nothing else: not by another operation, not as a result. This must hold in training and in
    evaluation mode. `nn.Identity` between two modules is looked through. Sequences may overlap. The model is left as it
    was.

    Args:
        model: any network; it need not be traceable.
        pattern: the types in order, each a type or a tuple of alternative types. Types are compared exactly: a subclass
            may compute something else.
        example_input: what the network takes (a tensor, a tuple of arguments, a dict of keyword arguments). It is asked
            where `torch.fx` cannot trace the network.

    Raises:
        TypeError: where `pattern` is no tuple of types.
        ValueError: where `pattern` is empty.
    """
    pattern = checked_pattern(pattern)
    flow = DataFlow(model, {kind for element in pattern for kind in element}, example_input)
    found = []
    for module in model.modules():
        if type(module) in pattern[0]:
            sequence = flow.sequence(module, pattern)
            if isinstance(sequence, ModuleSequence):
                found.append(sequence)
    return found


def checked_pattern(pattern: Any) -> tuple[tuple[type, ...], ...]:
    """`pattern` with every element as a tuple of types."""
    if not isinstance(pattern, tuple):
        raise TypeError(f"pattern must be a tuple of module types, got {pattern!r}")
    if not pattern:
        raise ValueError("pattern must name at least one module type, got an empty tuple")
    elements = tuple(element if isinstance(element, tuple) else (element,) for element in pattern)
    for element in elements:
        for kind in element:
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise TypeError(f"pattern must hold types of nn.Module, got {kind!r}")
        if not element:
            raise ValueError(f"every element of pattern must name at least one module type, got {pattern!r}")
    return elements


class Consumer(NamedTuple):
    """Who takes a module's output: another module, or something else."""

    module: int | None
    """`id` of the module."""
    description: str
    alone: bool = True
    """Whether the output is all that the module takes."""


@dataclass
class Flow:
    """Calls and uses seen in one region of a network, in one mode."""

    calls: Counter[int] = field(default_factory=Counter)
    consumers: dict[int, list[Consumer]] = field(default_factory=dict)
    read: set[int] = field(default_factory=set)
    """Modules whose parameters are read without calling them."""


class Region(NamedTuple):
    """A part of the network that was read in one piece, in one or two modes."""

    name: str
    found_by: str
    flows: list[Flow]


class DataFlow:
    """Who feeds whom in `model`; `kinds` are the types that are never looked into."""

    def __init__(self, model: nn.Module, kinds: Iterable[type], example_input: Any = None) -> None:
        self.names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self.modules: dict[int, nn.Module] = {id(module): module for module in model.modules()}
        self.notes: list[str] = []
        kinds = frozenset(kinds)
        flows, why = _trace(model, kinds, frozenset())
        if flows:
            self.regions = [Region("", TRACED, flows)]
            return
        could_not = f"torch.fx could not trace {type(model).__name__} ({why})"
        if example_input is not None:
            self.regions = [Region("", RECORDED, _record(model, kinds, example_input))]
            self.notes.append(f"{could_not}; the order of modules was recorded on example_input")
            return
        self.regions = _explore("", model, kinds, set(), {})
        self.notes.append(
            f"{could_not}; the order of modules was read by torch.fx in the parts that it can trace, elsewhere guessed"
            " from the source of forward and the order of registration: pass example_input to record the real one"
        )

    def sequence(self, head: nn.Module, pattern: tuple[tuple[type, ...], ...]) -> ModuleSequence | str:
        """The sequence that begins at `head`, or why there is none."""
        if len(pattern) == 1:
            return ModuleSequence((self.names[id(head)],), (head,), "its type")
        why = "the network never calls it"
        for region in self.regions:
            ends = {self._walk(flow, id(head), pattern) for flow in region.flows if flow.calls[id(head)]}
            if not ends:
                continue
            # A reason (a string) beats a find: what is no sequence in one mode is none.
            for end in ends:
                if isinstance(end, str):
                    return end
            if len(ends) > 1:
                return "training and evaluation mode send its output to different modules"
            members = ends.pop()
            assert not isinstance(members, str)
            for flow in region.flows:
                if not flow.calls[id(head)] and any(flow.calls[member] for member in members):
                    return "it is called in one mode only, what follows it in both"
            modules = tuple(self.modules[member] for member in members)
            how = region.found_by + (f" ({region.name})" if region.found_by == TRACED_PART else "")
            return ModuleSequence(tuple(self.names[member] for member in members), modules, how)
        return why

    def _walk(self, flow: Flow, head: int, pattern: tuple[tuple[type, ...], ...]) -> tuple[int, ...] | str:
        members = [head]
        for element in pattern[1:]:
            here = members[-1]
            output = "its output" if here == head else f"the output of {self.names[here]!r}"
            if flow.calls[here] != 1:
                return f"it is called {flow.calls[here]} times"
            if here in flow.read:
                return "its parameters are read without calling it"
            consumers = flow.consumers.get(here, [])
            expected = " or ".join(kind.__name__ for kind in element)
            if len(consumers) != 1:
                users = ", ".join(self._describe(consumer) for consumer in consumers) or "nothing"
                return f"{output} goes to {users}; only one {expected} may take it"
            (consumer,) = consumers
            if consumer.module is None or type(self.modules[consumer.module]) not in element:
                return f"{output} goes to {self._describe(consumer)}, not to {expected}"
            follower = repr(self.names[consumer.module])
            if not consumer.alone:
                return f"{follower}, which follows, takes more than {output}"
            if flow.calls[consumer.module] != 1:
                return f"{follower}, which follows, is called {flow.calls[consumer.module]} times"
            if consumer.module in flow.read:
                return f"the parameters of {follower}, which follows, are read without calling it"
            members.append(consumer.module)
        return tuple(members)

    def _describe(self, consumer: Consumer) -> str:
        if consumer.module is None:
            return consumer.description
        return f"{self.names[consumer.module]!r} ({type(self.modules[consumer.module]).__name__})"


# --- torch.fx ---------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def __init__(self, kinds: frozenset[type], opaque: frozenset[int]) -> None:
        super().__init__()
        self.kinds, self.opaque = kinds, opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self.kinds or id(m) in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        # Arguments with a default keep it: a proxy in place of `mask=None` would send the trace down the wrong branch.
        proxies: list[Any] = []
        keywords: dict[str, Any] = {}
        for parameter in inspect.signature(self.root.forward).parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL or parameter.kind is parameter.VAR_KEYWORD:
                continue
            if parameter.default is parameter.empty:
                proxy = self.create_proxy("placeholder", parameter.name, (), {})
                if parameter.kind is parameter.KEYWORD_ONLY:
                    keywords[parameter.name] = proxy
                else:
                    proxies.append(proxy)
        return (lambda *args: root_fn(*args, **keywords)), [self.root, *proxies]


def _trace(model: nn.Module, kinds: frozenset[type], opaque: frozenset[int]) -> tuple[list[Flow], str]:
    """Flows in evaluation and in training mode, or no flows and why."""
    flows = []
    for training in (False, True):
        with _unchanged(model, training):
            try:
                flows.append(_flow_of_graph(model, _Tracer(kinds, opaque).trace(model), kinds))
            except Exception as error:  # whatever the forward of an unknown network raises on proxies
                return [], f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
    return flows, ""


def _flow_of_graph(model: nn.Module, graph: fx.Graph, kinds: frozenset[type]) -> Flow:
    flow = Flow()
    modules = dict(model.named_modules(remove_duplicate=False))
    look_through = nn.Identity not in kinds

    def consumers(node: fx.Node) -> Iterator[Consumer]:
        for user in node.users:
            if user.op == "call_module":
                module = modules[str(user.target)]
                if type(module) is nn.Identity and look_through:
                    yield from consumers(user)
                else:
                    yield Consumer(id(module), "", [*user.args, *user.kwargs.values()] == [node])
            elif user.op == "output":
                yield Consumer(None, "the result of forward")
            else:
                yield Consumer(None, str(getattr(user.target, "__name__", user.target)))

    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            flow.calls[id(module)] += 1
            flow.consumers.setdefault(id(module), []).extend(consumers(node))
        elif node.op == "get_attr":
            owner = node.target.rpartition(".")[0]
            if owner in modules:
                flow.read.add(id(modules[owner]))
    return flow


def _explore(
    name: str, module: nn.Module, kinds: frozenset[type], opaque: set[int], seen: dict[int, list[Region]]
) -> list[Region]:
    """Regions of a module that may not be traceable as a whole; what is not is added to `opaque`."""
    if id(module) in seen or type(module) in kinds:
        return []
    seen[id(module)] = []
    if not any(True for _ in module.children()):
        return []
    flows, _ = _trace(module, kinds, frozenset(opaque))
    if flows:
        return [Region(name, TRACED_PART, flows)]
    known = len(opaque)
    parts: list[Region] = []
    for key, child in module.named_children():
        parts += _explore(f"{name}.{key}" if name else key, child, kinds, opaque, seen)
    if len(opaque) > known:
        flows, _ = _trace(module, kinds, frozenset(opaque))
        if flows:
            return [Region(name, TRACED_PART, flows), *parts]
    opaque.add(id(module))
    return [*parts, Region(name, REGISTERED, [_flow_of_registration(module, kinds)])]


def _flow_of_registration(module: nn.Module, kinds: frozenset[type]) -> Flow:
    """A guess at which child follows which: by the source of `forward`, or, where that names none, by registration."""
    flow = Flow()
    source = _Source(module)
    # Under all its names: a shared module is called once for each.
    children = [
        (key, child)
        for key, child in module._modules.items()
        if child is not None and (type(child) is not nn.Identity or nn.Identity in kinds)
    ]
    for (key, child), following in zip(children, [*(child for _, child in children[1:]), None]):
        if key in source.named:
            takers = source.takers.get(key, [])
            consumers = [
                Consumer(id(module._modules[t]), "") if t else Consumer(None, "something else") for t in takers
            ]
            flow.calls[id(child)] += source.calls[key]
            if key in source.read:
                flow.read.add(id(child))
        else:
            consumers = [Consumer(None, "something else") if following is None else Consumer(id(following), "")]
            flow.calls[id(child)] += 1
        flow.consumers.setdefault(id(child), []).extend(consumers)
    return flow


class _Source:
    """What the source of a module's `forward` says about its children.

    Only two plain forms are believed: `self.b(self.a(x))`, and `y = self.a(x)` followed by `self.b(y)` in one block.
    """

    def __init__(self, module: nn.Module) -> None:
        self.children = {key for key, child in module._modules.items() if child is not None}
        self.named: set[str] = set()
        self.read: set[str] = set()
        """Children that are mentioned without being called."""
        self.calls: Counter[str] = Counter()
        self.takers: dict[str, list[str | None]] = {}
        """For every use of a child's output the child that takes it, or None."""
        self.held: dict[str, tuple[str, int]] = {}
        """For a variable the child whose output it holds, and the block where it was assigned."""
        try:
            forward = inspect.unwrap(type(module).forward)
            tree = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
        except (OSError, TypeError, SyntaxError, IndexError):
            return
        for statement in getattr(tree, "body", []):
            self._visit(statement, tree, 0)

    def _visit(self, node: ast.AST, parent: ast.AST, block: int) -> None:
        if isinstance(node, ast.Call):
            parts: list[Any] = [
                *node.args,
                *node.keywords,
                node.func,
            ]  # arguments are evaluated before the call happens
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            parts = [node.value, *(node.targets if isinstance(node, ast.Assign) else [node.target])]
        else:
            parts = [part for _, part in ast.iter_fields(node)]
        for part in parts:
            if isinstance(part, ast.AST):
                self._visit(part, node, block)
            elif isinstance(part, list):
                for each in part:
                    if isinstance(each, ast.AST):
                        self._visit(each, node, id(part) if isinstance(each, ast.stmt) else block)
        child = self._child(node)
        called = self._child(node.func) if isinstance(node, ast.Call) else None
        if child:
            self.named.add(child)
            if not (isinstance(parent, ast.Call) and parent.func is node):
                self.read.add(child)
        elif called:
            self.calls[called] += 1
            if isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name):
                self.held[parent.targets[0].id] = (called, block)
            else:
                self.takers.setdefault(called, []).append(self._taker(node, parent))
        elif isinstance(node, ast.Name):
            self._variable(node, parent, block)

    def _variable(self, node: ast.Name, parent: ast.AST, block: int) -> None:
        held = self.held.get(node.id)
        if held is not None and (isinstance(node.ctx, ast.Load) or isinstance(parent, ast.AugAssign)):
            self.takers.setdefault(held[0], []).append(self._taker(node, parent) if held[1] == block else None)
        # The value of an assignment is visited before its target: what was just noted down must stay.
        assigned = isinstance(parent, ast.Assign) and self._child(getattr(parent.value, "func", None)) is not None
        if not isinstance(node.ctx, ast.Load) and not assigned:
            self.held.pop(node.id, None)

    def _child(self, node: ast.AST | None) -> str | None:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            return node.attr if node.attr in self.children else None
        return None

    def _taker(self, node: ast.AST, parent: ast.AST) -> str | None:
        """The child that is called with `node` and nothing else."""
        if isinstance(parent, ast.Call) and [*parent.args, *parent.keywords] == [node]:
            return self._child(parent.func)
        return None


# --- recorded forward -------------------------------------------------------------------------------------------------


@dataclass
class _Output:
    """A module's output while the network runs."""

    module: int
    tensor: weakref.ref
    depth: int
    """How many recorded modules were running when it was made."""
    consumers: list[Consumer] = field(default_factory=list)
    overwritten: bool = False

    def used_by(self, consumer: Consumer) -> None:
        if consumer not in self.consumers:
            self.consumers.append(consumer)


class _Recorder(TorchDispatchMode):
    """Notes every operation that reads a recorded module's output, by storage: views and in-place writes are uses."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.recorded = modules
        self.flow = Flow()
        self.outputs: list[_Output] = []
        self.by_storage: dict[int, _Output] = {}
        self.running: list[Consumer] = []
        self.versions: list[list[tuple[Tensor, int]]] = []
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.paused:
            for output in self._outputs_in((args, kwargs)):
                inside = self.running[output.depth :]
                output.used_by(inside[0] if inside else Consumer(None, func.overloadpacket.__name__))
        return func(*args, **kwargs)

    def _outputs_in(self, tree: Any) -> Iterator[_Output]:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                output = self.by_storage.get(leaf.untyped_storage()._cdata)
                # A freed storage's address may be taken by another tensor.
                if output is not None and output.tensor() is not None and not output.overwritten:
                    yield output

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        alone = len(tensors) == 1 and len(tree_leaves((args, kwargs))) == 1
        self.flow.calls[id(module)] += 1
        consumer = Consumer(id(module), "", alone)
        for output in self._outputs_in((args, kwargs)):
            if len(self.running) == output.depth:
                output.used_by(consumer)
        self.running.append(consumer)
        self.versions.append([(tensor, tensor._version) for tensor in tensors])

    def after(self, module: nn.Module, args: tuple, result: Any) -> Any:
        self.running.pop()
        inputs = self.versions.pop()
        if not isinstance(result, Tensor) or result.layout is not torch.strided:
            self.flow.consumers.setdefault(id(module), []).append(Consumer(None, "several results"))
            return result
        storage = result.untyped_storage()._cdata
        for tensor, version in inputs:
            if tensor.layout is torch.strided and tensor.untyped_storage()._cdata == storage:
                if tensor._version != version:
                    # Written in place: who reads the old tensor from here on reads the new values.
                    for output in self._outputs_in(tensor):
                        output.overwritten = True
                else:
                    # Passed through (dropout in evaluation mode, a view): a copy tells later uses of the two apart.
                    self.paused = True
                    result = result.clone()
                    self.paused = False
                    storage = result.untyped_storage()._cdata
                break
        output = _Output(id(module), weakref.ref(result), len(self.running))
        self.outputs.append(output)
        self.by_storage[storage] = output
        return result

    def finish(self) -> Flow:
        """Uses of every module's output; called while the network's result is still held."""
        if any(output.tensor() is not None for output in self.outputs):
            gc.collect()
        for output in self.outputs:
            if output.tensor() is not None and not output.overwritten:
                output.used_by(Consumer(None, "the result of forward or something that keeps it"))
            self.flow.consumers.setdefault(output.module, []).extend(output.consumers)
        return self.flow


def _record(model: nn.Module, kinds: frozenset[type], example: Any) -> list[Flow]:
    """Flows of a real forward in evaluation mode, and in training mode where that runs (one image breaks BatchNorm)."""
    flows = [_record_once(model, kinds, example, training=False)]
    with contextlib.suppress(Exception):
        flows.append(_record_once(model, kinds, example, training=True))
    return flows


def _record_once(model: nn.Module, kinds: frozenset[type], example: Any, *, training: bool) -> Flow:
    recorder = _Recorder([module for module in model.modules() if type(module) in kinds])
    with _unchanged(model, training), torch.random.fork_rng(), torch.no_grad(), contextlib.ExitStack() as hooks:
        for module in recorder.recorded:
            before = module.register_forward_pre_hook(recorder.before, with_kwargs=True)
            after = module.register_forward_hook(recorder.after)
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        with recorder:
            result = call(model, example)
        flow = recorder.finish()
        del result
    return flow


@contextlib.contextmanager
def _unchanged(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts all modules in one mode, and afterwards puts back their attributes, buffers and modes."""
    modules = [*model.modules()]
    saved = [dict(module.__dict__) for module in modules]
    inner: list[list[tuple[dict, dict]]] = [
        [(table, dict(table)) for table in (module._parameters, module._buffers, module._modules)] for module in modules
    ]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    for module in modules:
        module.training = training
    try:
        yield
    finally:
        for module, attributes, tables in zip(modules, saved, inner):
            for table, entries in tables:
                table.clear()
                table.update(entries)
            module.__dict__.clear()
            module.__dict__.update(attributes)
        with torch.no_grad():
            for buffer, value in buffers:
                # Its version does not tell: BatchNorm writes running statistics without counting it up.
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)
