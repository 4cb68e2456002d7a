"""Replace modules inside any network, and say what was replaced, what was not, and why.

`swap(model, {nn.Conv2d: partial(PHConv2d.like, n=4)})` changes single modules; a tuple of types is a sequence of
modules that follow one another by the flow of data: `swap(model, {(nn.BatchNorm2d, nn.ReLU): lambda norm, relu: ...})`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lathe.core.dataflow import DataFlow, ModuleSequence, checked_pattern, find_sequences

__all__ = [
    "ModuleSequence",
    "Replacement",
    "Skip",
    "SwapReport",
    "find_sequences",
    "get_module",
    "set_module",
    "swap",
]


@dataclass(frozen=True)
class Replacement:
    """One module that was replaced, or a sequence of which the first was."""

    name: str
    """Qualified name; empty for the network itself."""
    type: str
    """Type of what stood there; of a sequence, the types joined by " + "."""
    new_type: str
    names: tuple[str, ...]
    """All names under which the module is registered (several, where it is shared)."""
    sequence: tuple[str, ...] = ()
    """Names of a sequence's members; all but the first became `nn.Identity`."""
    found_by: str = ""
    """How the sequence was found; empty for a single module."""
    parameters: tuple[int, int] = (0, 0)
    """Number of parameters before and after."""
    notes: tuple[str, ...] = ()
    """What was lost: hooks, ties between parameters."""


@dataclass(frozen=True)
class Skip:
    """One module that a rule might have been meant for, and why it was left alone."""

    name: str
    type: str
    reason: str


@dataclass
class SwapReport:
    """What `swap` did. `str(report)` is a table."""

    model: nn.Module
    """The network: the one passed in, or its replacement where a rule replaced the network itself."""
    replaced: list[Replacement] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What concerns the network as a whole, such as how sequences were found."""

    def __str__(self) -> str:
        lines = [f"replaced {_count(self.replaced)}, skipped {_count(self.skipped)}"]
        if self.replaced:
            rows = [("name", "was", "is", "parameters", "notes")]
            for each in self.replaced:
                notes = [*each.notes]
                if each.sequence[1:]:
                    notes.insert(0, f"{', '.join(each.sequence[1:])} -> Identity (order by {each.found_by})")
                if each.names[1:]:
                    notes.insert(0, f"shared, also {', '.join(name or '(root)' for name in each.names[1:])}")
                before, after = each.parameters
                size = f"{before:,} -> {after:,}" if before != after else f"{after:,}"
                rows.append((each.name or "(root)", each.type, each.new_type, size, "; ".join(notes)))
            lines += ["", *_table(rows)]
        if self.skipped:
            skips = [(each.name or "(root)", each.type, each.reason) for each in self.skipped]
            lines += ["", *_table([("name", "type", "left alone because"), *skips])]
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)


def swap(
    model: nn.Module,
    rules: Mapping,
    *,
    where: Callable[..., Any] | None = None,
    example_input: Any = None,
) -> SwapReport:
    """Replace the modules of `model` for which there is a rule, in place.

    A rule gets the module and returns its replacement, or None to leave it alone. A rule for a tuple of types gets the
    modules of a sequence (see `find_sequences`); its replacement takes the place of the first, the others become
    `nn.Identity`. A longer sequence goes before a shorter, a sequence before a single module, an outer module before
    those inside it. Nothing inside a replaced module or inside a replacement is looked at.

    Types are compared exactly. A rule for `nn.Conv2d` leaves subclasses of it alone (and says so), because a subclass
    may compute something else: this is also why running the same rules twice does not hit replacements that inherit
    from `nn.Conv2d`. Name a subclass in the rules to have it replaced.

    A module registered under several names is one module: the rule is called once, and its replacement stands under all
    of the names. A replacement takes over training or evaluation mode, device and dtype of what it replaces; its dtype
    is left alone where it has no floating-point parameters (packed and quantised formats).

    All rules are called before anything changes, so that an error in one leaves the network as it was. A rule that
    itself changes the module it gets is beyond this promise.

    Args:
        model: any network; its modules may stand in lists, dicts and containers. Where a rule replaces the network
            itself, `report.model` is the new one.
        rules: from a module type, or a tuple of types (each a type or a tuple of alternatives), to a rule.
        where: `where(name)` or `where(name, module)` is asked before a rule; false leaves the module alone. Of a
            sequence, the first module is asked about. A shared module is replaced only if all its names are accepted.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments, to record the order of modules in
            networks that `torch.fx` cannot trace.

    Raises:
        TypeError: where a key is no module type, a rule is not callable, or a rule returns something that is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    plan = _Plan(model, _checked_rules(rules), _checked_where(where), example_input)
    plan.make()
    return plan.install()


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module of `model` with the qualified name `name` (as `named_modules` gives it); "" is the model.

    Raises:
        ValueError: where there is none.
    """
    module = model
    path = name.split(".") if name else []
    for depth, key in enumerate(path):
        child = module._modules.get(key)
        if child is None:
            inside = ".".join(path[:depth]) or type(model).__name__
            known = ", ".join(key for key, _ in module.named_children()) or "none"
            raise ValueError(f"name must be that of a module, got {name!r}; the modules of {inside} are: {known}")
        module = child
    return module


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the module of `model` with the qualified name `name`.

    Raises:
        ValueError: where there is no such module, or `name` is empty: a network cannot replace itself in place.
        TypeError: where `module` is no `nn.Module`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if not name:
        raise ValueError("name must not be empty: a network cannot be replaced inside itself")
    get_module(model, name)
    parent, _, key = name.rpartition(".")
    get_module(model, parent)._modules[key] = module


# --- the plan ---------------------------------------------------------------------------------------------------------

Pattern = tuple[tuple[type, ...], ...]


@dataclass
class _Step:
    """A replacement that is decided on and not yet made."""

    modules: tuple[nn.Module, ...]
    new: nn.Module
    found_by: str


class _Plan:
    def __init__(
        self,
        model: nn.Module,
        rules: list[tuple[Pattern, Callable[..., Any]]],
        where: Callable[[str, nn.Module], bool],
        example_input: Any,
    ) -> None:
        self.model, self.rules, self.where = model, rules, where
        self.names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), []).append(name)
        self.report = SwapReport(model)
        self.steps: list[_Step] = []
        self.taken: dict[int, str] = {}  # modules that a step replaces, and those inside them: name of that module
        self.reasons: dict[int, str] = {}
        self.sequences: dict[int, list[tuple[ModuleSequence, Callable[..., Any]]]] = {}
        self._find_sequences(example_input)

    def _find_sequences(self, example_input: Any) -> None:
        """Files every sequence that a rule is for under each of its members; a longer one goes first."""
        patterns = [(pattern, rule) for pattern, rule in self.rules if len(pattern) > 1]
        heads = {kind for pattern, _ in patterns for kind in pattern[0]}
        if not any(type(module) in heads for module in self.model.modules()):
            return
        kinds = {kind for pattern, _ in self.rules for part in pattern for kind in part}
        flow = DataFlow(self.model, kinds, example_input)
        self.report.notes += flow.notes
        for pattern, rule in sorted(patterns, key=lambda each: -len(each[0])):
            for module in self.model.modules():
                if type(module) in pattern[0]:
                    found = flow.sequence(module, pattern)
                    if isinstance(found, str):
                        self.reasons.setdefault(id(module), found)
                    else:
                        for member in found.modules:
                            self.sequences.setdefault(id(member), []).append((found, rule))

    def make(self) -> None:
        """Asks the rules, outermost modules first; changes nothing."""
        for module in self.model.modules():
            if id(module) in self.taken:
                continue
            sequences = self.sequences.get(id(module), [])
            if any(self._try(found.modules, rule, found.found_by) for found, rule in sequences):
                continue
            for pattern, rule in self.rules:
                if len(pattern) == 1 and type(module) in pattern[0] and self._try((module,), rule, ""):
                    break
        self._explain()

    def _try(self, modules: tuple[nn.Module, ...], rule: Callable[..., Any], found_by: str) -> bool:
        head, name = modules[0], self.names[id(modules[0])][0]
        for member in modules:
            inside = [self.taken[id(each)] for each in member.modules() if id(each) in self.taken]
            if inside:
                self.reasons[id(head)] = f"{inside[0] or 'the network'!r} is replaced already"
                return False
        for each in self.names[id(head)]:
            if not self.where(each, head):
                shared = f" under its name {each!r}" if self.names[id(head)][1:] else ""
                self.reasons[id(head)] = f"where= refused it{shared}"
                return False
        new = rule(*modules)
        if new is None:
            self.reasons[id(head)] = "the rule left it alone"
            return False
        if not isinstance(new, nn.Module):
            raise TypeError(
                f"the rule for {_types(modules)} must return a module or None, got {type(new).__name__} for {name!r}"
            )
        if new is head and not modules[1:]:
            self.reasons[id(head)] = "the rule returned the module itself"
            return False
        self._adapt(new, head)
        self.steps.append(_Step(modules, new, found_by))
        for member in modules:
            for gone in member.modules():
                self.taken[id(gone)] = self.names[id(member)][0]
        return True

    def _adapt(self, new: nn.Module, old: nn.Module) -> None:
        """Gives `new` the mode, device and dtype of `old`; what it holds of the network itself is left alone."""
        for module in new.modules():
            if id(module) not in self.names:
                module.training = old.training
        like = next(_floating(old), None)
        # An activation has no device of its own: take that of the nearest module around it that has one.
        name = self.names[id(old)][0]
        while like is None and name:
            name = name.rpartition(".")[0]
            like = next(_floating(get_module(self.model, name)), None)
        if like is None:
            return
        own = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        dtypes = {parameter.dtype for parameter in new.parameters() if parameter.is_floating_point()}
        stale = dtypes if like.dtype not in dtypes else set()

        def fit(tensor: Tensor) -> Tensor:
            if id(tensor) in own:
                return tensor
            return tensor.to(device=like.device, dtype=like.dtype if tensor.dtype in stale else tensor.dtype)

        new._apply(fit)

    def _explain(self) -> None:
        """Lists the modules that a rule might have been meant for and that stay."""
        kinds = {kind for pattern, _ in self.rules for kind in pattern[0]}
        held = {id(member) for step in self.steps for member in step.modules}
        for module in self.model.modules():
            name = self.names[id(module)][0]
            if id(module) in held:
                continue
            if type(module) in kinds:
                reason = self.reasons.get(id(module), "")
                if id(module) in self.taken:
                    reason = f"it stands inside {self.taken[id(module)]!r}, which was replaced"
                if reason:
                    self.report.skipped.append(Skip(name, type(module).__name__, reason))
            elif id(module) not in self.taken and isinstance(module, tuple(kinds)):
                parents = ", ".join(sorted(kind.__name__ for kind in kinds if isinstance(module, kind)))
                reason = f"it is a subclass of {parents}; name it in the rules to have it replaced"
                self.report.skipped.append(Skip(name, type(module).__name__, reason))
        for name, module in _unregistered(self.model):
            if type(module) in kinds:
                reason = "it is not registered (a plain list, dict or attribute): use nn.ModuleList or nn.ModuleDict"
                self.report.skipped.append(Skip(name, type(module).__name__, reason))

    def install(self) -> SwapReport:
        """Makes the replacements; nothing in here calls foreign code."""
        self.report.replaced = [self._describe(step) for step in self.steps]
        new: dict[int, nn.Module] = {}
        for step in self.steps:
            new[id(step.modules[0])] = step.new
            for member in step.modules[1:]:
                identity = nn.Identity()
                identity.training = member.training
                new[id(member)] = identity
        inside = {id(each) for step in self.steps for member in step.modules for each in member.modules()}
        for module in [*self.model.modules()]:
            if id(module) in inside:
                continue
            for key, child in module._modules.items():
                if child is not None and id(child) in new:
                    module._modules[key] = new[id(child)]
            for key, value in [*module.__dict__.items()]:
                if key not in ("_modules", "_parameters", "_buffers"):
                    module.__dict__[key] = _with_replacements(value, new)
        self.report.model = new.get(id(self.model), self.model)
        return self.report

    def _describe(self, step: _Step) -> Replacement:
        old, names = step.modules, [self.names[id(member)] for member in step.modules]
        kept = {id(module) for module in step.new.modules()}
        gone = [module for member in old for module in member.modules() if id(module) not in kept]
        notes = []
        hooks = sum(
            len(table)
            for module in gone
            for table in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        )
        if hooks:
            notes.append(f"{hooks} hook{'s' * (hooks > 1)} lost")
        notes += self._broken_ties(step)
        counts = [
            sum({id(p): p.numel() for m in modules for p in m.parameters()}.values()) for modules in (old, (step.new,))
        ]
        return Replacement(
            name=names[0][0],
            type=_types(old),
            new_type=type(step.new).__name__,
            names=tuple(names[0]),
            sequence=tuple(each[0] for each in names) if old[1:] else (),
            found_by=step.found_by,
            parameters=(counts[0], counts[1]),
            notes=tuple(notes),
        )

    def _broken_ties(self, step: _Step) -> Iterator[str]:
        kept = {id(parameter) for parameter in step.new.parameters()}
        gone = {id(module) for member in step.modules for module in member.modules()}
        for member in step.modules:
            for key, parameter in member.named_parameters():
                if id(parameter) in kept:
                    continue
                for other in self.model.modules():
                    for other_key, tied in other._parameters.items():
                        if tied is parameter and id(other) not in gone:
                            full = ".".join(filter(None, (self.names[id(other)][0], other_key)))
                            yield f"{key} is no longer tied to {full}"


def _checked_rules(rules: Any) -> list[tuple[Pattern, Callable[..., Any]]]:
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules must be a dict from module types to rules, got {type(rules).__name__}")
    checked = []
    for key, rule in rules.items():
        if not callable(rule):
            raise TypeError(f"the rule for {key!r} must be callable, got {type(rule).__name__}")
        try:
            checked.append((checked_pattern(key if isinstance(key, tuple) else (key,)), rule))
        except (TypeError, ValueError) as error:
            raise type(error)(f"a key of rules must be a module type or a tuple of them: {error}") from None
    return checked


def _checked_where(where: Callable[..., Any] | None) -> Callable[[str, nn.Module], bool]:
    """`where` as a function of name and module, whichever of the two forms it has."""
    if where is None:
        return lambda name, module: True
    if not callable(where):
        raise TypeError(f"where must be callable, got {type(where).__name__}")
    try:
        parameters = [*inspect.signature(where).parameters.values()]
    except (TypeError, ValueError):  # some builtins have no signature
        parameters = []
    required = [
        p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    if len(required) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return where
    return lambda name, module: where(name)


def _floating(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            yield tensor


def _with_replacements(value: Any, new: dict[int, nn.Module]) -> Any:
    """`value` with replaced modules exchanged, in a plain attribute, list, tuple or dict (lists and dicts in place)."""
    if isinstance(value, nn.Module):
        return new.get(id(value), value)
    if type(value) is list:
        value[:] = [_with_replacements(each, new) for each in value]
    elif type(value) is dict:
        value.update({key: _with_replacements(each, new) for key, each in value.items()})
    elif type(value) is tuple:
        changed = tuple(_with_replacements(each, new) for each in value)
        return value if all(a is b for a, b in zip(value, changed)) else changed
    return value


def _unregistered(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that stand only in plain lists, tuples, dicts and attributes, with a name that says where."""
    known = {id(module) for module in model.modules()}

    def search(name: str, value: Any) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(value, nn.Module):
            if id(value) not in known:
                known.add(id(value))
                for inner, module in value.named_modules():
                    yield ".".join(filter(None, (name, inner))), module
        elif type(value) in (list, tuple):
            for index, each in enumerate(value):
                yield from search(f"{name}[{index}]", each)
        elif type(value) is dict:
            for key, each in value.items():
                yield from search(f"{name}[{key!r}]", each)

    for prefix, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key not in ("_modules", "_parameters", "_buffers"):
                yield from search(f"{prefix}.{key}" if prefix else key, value)


def _types(modules: tuple[nn.Module, ...]) -> str:
    return " + ".join(type(module).__name__ for module in modules)


def _count(things: list) -> str:
    return f"{len(things)} module{'s' * (len(things) != 1)}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
