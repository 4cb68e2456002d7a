"""muP for your own model: rates tuned on a narrow copy stay right on the wide one, and features keep learning.

`parametrize` compares a model with its narrower copy, rescales the initial weights, puts a multiplier into the readout
and says which learning rate each tensor gets. Yang and Hu, 2020, arXiv 2011.14522; with one rate a tensor and Adam as
in Yang et al., 2022, arXiv 2203.03466, tables 3 and 8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn, optim

from lathe.theory.infinite_width_feature_learning.abc import ABC, Rule
from lathe.theory.infinite_width_feature_learning.readouts import READOUTS, _Multiplied
from lathe.theory.infinite_width_feature_learning.shapes import BaseLike, TensorWidth, widths

__all__ = ["Parametrization", "ScaledTensor", "parametrize", "update_rule"]

OptimizerLike: TypeAlias = str | type[optim.Optimizer] | optim.Optimizer | functools.partial
Init: TypeAlias = Literal["auto", "fan_in", "constant"]

_SGD_LIKE = (optim.SGD, optim.ASGD)
#: Their updates do not depend on the gradient's size, entry by entry.
_ADAM_LIKE = (
    optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adagrad, optim.Adadelta,
    optim.Rprop, optim.SparseAdam,
)  # fmt: skip
#: What wrappers put into the names of parameters.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_MARK = "_parametrized_by_width"


@dataclass(frozen=True)
class ScaledTensor:
    """What became of one parameter.

    Attributes:
        name: as `named_parameters` gives it.
        kind: "input", "hidden", "readout", "tied" or "fixed"; see `TensorWidth`.
        shape, base_shape: in the model and at the base width.
        m_in, m_out: by what fan-in and fan-out have grown; one where they do not grow.
        init_scale: what the initial values were multiplied with.
        multiplier: what its product with the input is multiplied with in the forward pass.
        rate: its learning rate over the global one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    m_in: float
    m_out: float
    init_scale: float
    multiplier: float
    rate: float


@dataclass(frozen=True)
class Parametrization:
    """A model as `parametrize` left it, and the learning rates that belong to it. `str()` is a table of its tensors.

    Attributes:
        model: the model that was passed in.
        optimizer: "sgd" or "adam", the rule that the rates are for.
        abc: the exponents; None for scheme "sp", which leaves a model as it is.
        tensors: one row a parameter.
    """

    model: nn.Module
    optimizer: Rule
    abc: ABC | None
    tensors: tuple[ScaledTensor, ...]

    @property
    def rates(self) -> dict[str, float]:
        """Each parameter's learning rate over the global one, by its name."""
        return {tensor.name: tensor.rate for tensor in self.tensors}

    def param_groups(
        self,
        lr: Any,
        weight_decay: float = 0.0,
        *,
        groups: Iterable[Mapping[str, Any]] | None = None,
        decoupled: bool = False,
        model: nn.Module | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimiser: `torch.optim.SGD(result.param_groups(lr=0.1), momentum=0.9)`.

        One group for each rate. Weight decay is divided by the rate's factor, so that rate times decay, which is what
        all of torch's optimisers shrink weights by (AdamW too), is the same for all tensors.

        Args:
            lr: the global rate, as tuned at the base width; a number or a tensor.
            weight_decay: likewise.
            groups: your own groups, each with "params" and options. They are split by rate; their options stay, their
                "lr" and "weight_decay" go before `lr` and `weight_decay` and are scaled. By default one group of all
                parameters that require gradients.
            decoupled: leave `weight_decay` alone: for optimisers that do not multiply it by the learning rate.
            model: the model as it is trained, where wrapping it gave it new parameters (FSDP).

        Raises:
            ValueError: for a group without "params" or with a tensor that is no parameter of the model.
        """
        model = self.model if model is None else model
        rates, names = self.rates, {}
        for name, parameter in model.named_parameters():
            plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            names[id(parameter)] = name if name in rates else plain
        given: list[Mapping[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        given = given if groups is None else list(groups)
        split = []
        for group in given:
            if "params" not in group:
                raise ValueError(f"each of groups must have 'params', got {sorted(group)}")
            members: list[Any] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            by_rate: dict[float, list[Tensor]] = {}
            for parameter in members:
                name = names.get(id(parameter), "")
                if name not in rates:
                    told = f"{name!r} is" if name else f"a tensor of shape {tuple(parameter.shape)} is"
                    raise ValueError(
                        f"groups must hold parameters of the model that was parametrised; {told} none of them"
                    )
                by_rate.setdefault(rates[name], []).append(parameter)
            for rate, parameters in by_rate.items():
                decay = group.get("weight_decay", weight_decay)
                split.append(
                    {
                        **group,
                        "params": parameters,
                        "lr": group.get("lr", lr) * rate,
                        "weight_decay": decay if decoupled else decay / rate,
                    }
                )
        return split

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("name", "kind", "shape", "base", "init x", "forward x", "rate x")]
        rows += [
            (
                t.name,
                t.kind,
                str(t.shape),
                str(t.base_shape),
                *(f"{v:.4g}" for v in (t.init_scale, t.multiplier, t.rate)),
            )
            for t in self.tensors
        ]
        longest = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(size) for cell, size in zip(row, longest)).rstrip() for row in rows)


def parametrize(
    model: nn.Module,
    scheme: str | ABC = "mup",
    *,
    base: BaseLike,
    base_width: int | None = None,
    optimizer: OptimizerLike = "sgd",
    readout: Iterable[str] = (),
    output_mult: float = 1.0,
    zero_readout: bool = False,
    init: Init = "auto",
) -> Parametrization:
    """Makes a freshly initialised model train as its narrow copy does: rescales it in place, and gives the rates.

    With scheme "mup" and `m` the growth of a tensor's fan-in or fan-out since the base width:

    | kind | initial std | multiplier | rate, SGD | rate, Adam |
    | --- | --- | --- | --- | --- |
    | input, bias, gain, embedding | as at base | 1 | m_out | 1 |
    | hidden | as 1/sqrt(fan_in) | 1 | m_out / m_in | 1 / m_in |
    | readout | as at base | 1 / m_in | m_in | 1 |

    At the base width nothing changes, bit for bit. Layers that take a width to a fixed size are readouts wherever they
    stand. A tied embedding is both: it keeps its initial values, has the (equal) rate of both, and the multiplier is in
    the readout's forward pass only. Tied blocks are one tensor and need nothing. Dropout, heads and depth are yours:
    let the number of heads grow and not their size, or scale attention by 1/d_head in place of 1/sqrt(d_head).
    Wrap the model (FSDP, `torch.compile`) after this.

    Args:
        model: any network, just initialised.
        scheme: "mup"; "ntp", the neural tangent parametrization; "sp", which changes nothing and gives all tensors one
            rate; or an `ABC`, whose layer 1 is for input-like tensors, whose last is for readouts, and whose hidden
            layers are alike. Except for readouts, its multipliers are moved into the weights (`ABC.shift`).
        base: the model at the width where you tuned: a module (on the meta device will do), its shapes by name, or the
            function `make_model(width)` that makes it. A dimension is a width where it differs from the model's; with a
            function, where `make_model(base_width)` and `make_model(2 * base_width)` differ.
        base_width: what to call `base` with, where it is a function.
        optimizer: "sgd", "adam", or a torch optimiser (class, instance or partial), of which the rule is known.
        readout: names of parameters, or of modules, that are readouts and cannot be recognised by their type. As
            nothing can be put into their forward pass, they get the equivalent without multiplier.
        output_mult: a constant factor of all readouts, to be tuned; also at the base width.
        zero_readout: start the readouts at zero, where muP's outputs at infinite width start.
        init: how the initial std of weights depends on width: "fan_in" (as 1/sqrt(fan_in): PyTorch's default, Kaiming,
            Xavier, orthogonal), "constant" (Hugging Face's `initializer_range`), or "auto": by comparison with the
            values of `base`, or, where it has none, by recognising PyTorch's default.

    Raises:
        ValueError: for a second call, for parameters that do not match those of `base`, for an optimiser whose rule is
            not known or does not fit the `ABC`, for an `ABC` that treats hidden layers, or the two sides of a tied
            embedding, differently, for `zero_readout` with a tied embedding, and where "auto" cannot tell.
        NotImplementedError: for a parameter with more than two width dimensions.
        RuntimeError: where the model has been parametrised before.
    """
    if getattr(model, _MARK, False):
        raise RuntimeError("model has been parametrised before; its weights would be scaled twice. Make a fresh one")
    rule = update_rule(optimizer)
    abc = _exponents(scheme, rule)
    if init not in ("auto", "fan_in", "constant"):
        raise ValueError(f"init must be 'auto', 'fan_in' or 'constant', got {init!r}")
    found, base_model = widths(model, base, base_width, readout)
    if abc is None:
        tensors = [_scaled(name, width, 1.0, 1.0, 1.0) for name, width in found.items()]
    else:
        tensors = _plan(model, found, abc, init, functools.cache(base_model))
    if zero_readout:
        if any(width.kind == "tied" for width in found.values()):
            raise ValueError("zero_readout would set a tied embedding to zero; untie it")
        tensors = [replace(each, init_scale=0.0) if each.kind == "readout" else each for each in tensors]
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    with torch.no_grad():
        for tensor in tensors:
            if tensor.init_scale != 1:
                parameters[tensor.name].mul_(tensor.init_scale)
    if abc is not None:
        readouts = {id(parameters[name]): name for name, width in found.items() if width.kind in ("readout", "tied")}
        rows = {tensor.name: number for number, tensor in enumerate(tensors)}
        for module in modules.values():
            name = readouts.get(id(getattr(module, "weight", None)))
            if name is not None and type(module) in READOUTS:
                row = rows[name]
                tensors[row] = replace(tensors[row], multiplier=tensors[row].multiplier * output_mult)
                # The object stays what others hold: tied weights, hooks and references survive.
                module.__class__ = READOUTS[type(module)]
                module.multiplier = tensors[row].multiplier
    setattr(model, _MARK, True)
    return Parametrization(model, rule, abc, tuple(tensors))


def update_rule(optimizer: OptimizerLike) -> Rule:
    """Whether an optimiser's updates grow with the gradient ("sgd") or have entries of the rate's size ("adam").

    Raises:
        ValueError: where that is not known.
    """
    if isinstance(optimizer, str):
        rules: dict[str, Rule] = {"sgd": "sgd", "adam": "adam"}
        if optimizer not in rules:
            raise ValueError(f"optimizer must be 'sgd', 'adam' or a torch optimiser, got {optimizer!r}")
        return rules[optimizer]
    kind = optimizer.func if isinstance(optimizer, functools.partial) else optimizer
    kind = kind if isinstance(kind, type) else type(kind)
    if issubclass(kind, _SGD_LIKE):
        return "sgd"
    if issubclass(kind, _ADAM_LIKE):
        return "adam"
    raise ValueError(
        f"the rule of optimizer {kind.__name__} is not known: pass optimizer='sgd' if doubling the gradient doubles "
        f"its update, optimizer='adam' if its update's entries are of the learning rate's size whatever the gradient. "
        f"Muon, Adafactor and LBFGS are neither: torch's Muon (adjust_lr_fn='original') wants a factor of one on "
        f"hidden weights, beside optimizer='adam' for all others"
    )


def _exponents(scheme: str | ABC, rule: Rule) -> ABC | None:
    if isinstance(scheme, ABC):
        if scheme.optimizer != rule:
            raise ValueError(f"scheme is an ABC for {scheme.optimizer!r}, but the optimizer follows {rule!r}")
        if len({(scheme.a[l], scheme.b[l], scheme.c[l]) for l in range(1, scheme.L)}) > 1:
            raise ValueError(f"scheme must treat all its hidden layers after the first alike, got {scheme}")
        return scheme
    if scheme == "sp":
        return None
    if scheme == "ntp":
        return ABC.ntk(2, rule)
    if scheme == "mup":
        mup = ABC.mup(2, rule)
        return mup.shift([0, 0, 1 - mup.a[-1]])
    raise ValueError(f"scheme must be 'mup', 'ntp', 'sp' or an ABC, got {scheme!r}")


def _plan(
    model: nn.Module,
    found: Mapping[str, TensorWidth],
    abc: ABC,
    init: Init,
    base_model: Callable[[], nn.Module | None],
) -> list[ScaledTensor]:
    """What to do to each parameter; changes nothing."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    power = 2 if abc.optimizer == "sgd" else 1
    # Multipliers of all but the readout move into the weights, and with them goes part of the rate.
    spread = [float(a + b) for a, b in zip(abc.a, abc.b)]
    speed = [float(c + power * a) for c, a in zip(abc.c, abc.a)]
    tensors = []
    for name, width in found.items():
        m_in, m_out = width.m_in, width.m_out
        module = modules.get(width.module) if width.module is not None else None
        scale = multiplier = rate = 1.0
        if width.kind == "input":
            scale, rate = m_out ** -spread[0], m_out ** -speed[0]
        elif width.kind == "hidden":
            if abc.L == 1:
                raise ValueError(f"scheme is an ABC without hidden weights (L = 1), but the model has {name!r}")
            scale, rate = m_in ** -spread[1], m_out ** (1 - speed[1]) / m_in
        elif isinstance(module, _Multiplied):  # put there by hand, and initialised as it should be
            multiplier, rate = module.multiplier, m_in ** -(speed[-1] - power)
        elif width.kind in ("readout", "tied"):
            a, b, c = (float(exponents[-1]) for exponents in (abc.a, abc.b, abc.c))
            if type(module) not in READOUTS:
                a, b, c = 0.0, spread[-1], speed[-1]
            scale, multiplier, rate = m_in**-b, m_in**-a, m_in**-c
        if width.kind == "tied" and not (
            math.isclose(scale, m_out ** -spread[0]) and math.isclose(rate, m_out ** -speed[0])
        ):
            raise ValueError(
                f"{name!r} is embedding and readout at once, and the scheme wants different sizes or rates for the "
                f"two; untie them, or use scheme 'mup'"
            )
        if len(width.shape) > 1 and width.kind != "fixed" and not isinstance(module, _Multiplied):
            scale *= _law(name, parameters[name], width, module, init, base_model)
        tensors.append(_scaled(name, width, scale, multiplier, rate))
    return tensors if init == "constant" else _with_biases(model, parameters, tensors)


def _with_biases(model: nn.Module, parameters: Mapping[str, Tensor], tensors: list[ScaledTensor]) -> list[ScaledTensor]:
    """PyTorch draws biases from U(+-1/sqrt(fan_in)): behind a width they shrink, and get back their size at base."""
    rows = {tensor.name: number for number, tensor in enumerate(tensors)}
    first = {id(parameter): name for name, parameter in parameters.items()}
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)) or not isinstance(
            bias, nn.Parameter
        ):
            continue
        weight, row = module.weight, rows[first[id(bias)]]
        base_shape = tensors[rows[first[id(weight)]]].base_shape
        fan_in, base_fan_in = weight[0].numel(), math.prod(base_shape[1:])
        if fan_in == base_fan_in or isinstance(module, _Multiplied):
            continue
        drawn = bias.detach().abs().max().item()
        constant = bias.numel() > 1 and bool((bias == bias.flatten()[0]).all())
        if not constant and 0 < drawn <= fan_in**-0.5 * (1 + 1e-6):
            tensors[row] = replace(tensors[row], init_scale=tensors[row].init_scale * (fan_in / base_fan_in) ** 0.5)
    return tensors


def _law(
    name: str,
    parameter: Tensor,
    width: TensorWidth,
    module: nn.Module | None,
    init: Init,
    base_model: Callable[[], nn.Module | None],
) -> float:
    """What takes the initial std back to its value at the base width."""
    if init == "constant" or width.m_in == width.m_out == 1:
        return 1.0
    if parameter.is_meta:
        raise ValueError(f"parameter {name!r} is on the meta device: give it values first")
    if not parameter.any():
        return 1.0
    layer = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    # What PyTorch calls the fan-in of any tensor; of a tensor of unknown use it is what it was grown by.
    fan_in = math.prod(width.shape[1:]) / math.prod(width.base_shape[1:]) if layer else width.m_in
    if layer and _is_uniform(parameter, parameter[0].numel() ** -0.5):
        return fan_in**0.5
    if isinstance(module, nn.MultiheadAttention) and _is_uniform(parameter, (6 / sum(width.shape)) ** 0.5):
        return width.m_in**0.5
    if init == "fan_in":
        return 1.0 if width.kind in ("input", "tied") else fan_in**0.5
    base = base_model()
    if base is None:
        if width.kind in ("input", "tied"):
            return 1.0
        raise ValueError(
            f"init='auto' cannot tell how the initial std of {name!r}, {_std(parameter):.3g}, depends on width: base "
            f"has no values and this is not PyTorch's default. Say init='fan_in' if it falls as 1/sqrt(fan_in), or "
            f"init='constant', or give a base with values"
        )
    before = _std(dict(base.named_parameters())[name])
    growth = max(width.m_in, width.m_out)
    if not before > 0 or growth == 1:
        return 1.0
    # The nearer of the two laws.
    return growth**0.5 if math.log(_std(parameter) / before) / math.log(growth) < -0.25 else 1.0


def _sampled(parameter: Tensor) -> Tensor:
    """At most about a million of the values, from all over the tensor."""
    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() >> 20)].double()


def _std(parameter: Tensor) -> float:
    return _sampled(parameter).square().mean().sqrt().item()


def _is_uniform(parameter: Tensor, bound: float) -> bool:
    """Whether the values look as drawn from U(-bound, bound), as PyTorch draws the weights of its layers."""
    values = _sampled(parameter)
    ratio = values.square().mean().sqrt().item() / bound * math.sqrt(3)
    return bool(values.abs().max() <= bound * (1 + 1e-3)) and abs(ratio - 1) < 0.02 + 2 / math.sqrt(len(values))


def _scaled(name: str, width: TensorWidth, scale: float, multiplier: float, rate: float) -> ScaledTensor:
    return ScaledTensor(
        name, width.kind, width.shape, width.base_shape, width.m_in, width.m_out, scale, multiplier, rate
    )
