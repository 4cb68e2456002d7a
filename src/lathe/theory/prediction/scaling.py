"""Which parametrisation a network has, and which learning rates stay right when it gets wider.

What counts is how weights, multipliers and rates scale with width: Yang and Hu 2020, arXiv 2011.14522. Two widths show
it exactly; one network only shows what it looks like.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

from torch import nn

from lathe.theory.infinite_width_feature_learning import ABC
from lathe.theory.prediction.criticality import behind, path_into
from lathe.theory.prediction.reading import Reading, Step

__all__ = ["LayerScaling", "Scaling", "TransferRate", "compare_widths", "looks_like"]

Kind: TypeAlias = Literal["input", "hidden", "readout", "fixed"]
Exponents: TypeAlias = tuple[Fraction | float, Fraction | float]
_HALF = Fraction(1, 2)

#: (a, b) of each kind of layer: multipliers go as n^-a, standard deviations as n^-b.
_NAMED: dict[str, dict[str, tuple[Fraction, Fraction]]] = {
    "standard": {"input": (Fraction(0), Fraction(0)), "hidden": (Fraction(0), _HALF), "readout": (Fraction(0), _HALF)},
    "NTK": {"input": (Fraction(0), Fraction(0)), "hidden": (_HALF, Fraction(0)), "readout": (_HALF, Fraction(0))},
    "mean-field": {"input": (Fraction(0), Fraction(0)), "readout": (Fraction(1), Fraction(0))},
    "muP": {"input": (-_HALF, _HALF), "hidden": (Fraction(0), _HALF), "readout": (_HALF, _HALF)},
}


@dataclass(frozen=True)
class LayerScaling:
    """One layer.

    Attributes:
        name, kind: its name, and which of its sides grow with the width.
        multiplier: what its product is multiplied with in the forward pass.
        std: of its trained weights.
        a, b: how they scale with the width n, as n^-a and n^-b; None where one network does not tell.
    """

    name: str
    kind: Kind
    multiplier: float
    std: float
    a: Fraction | float | None
    b: Fraction | float | None


@dataclass(frozen=True)
class TransferRate:
    """How the learning rate of a parameter has to change when the network gets `m` times wider: by `m ** exponent`."""

    name: str
    kind: str
    sgd: Fraction | float
    adam: Fraction | float


@dataclass(frozen=True)
class Scaling:
    """Which parametrisation a network has.

    Attributes:
        name: "standard", "NTK", "mean-field", "muP" or "neither".
        certain: whether two widths were compared; else the name says what one network looks like.
        layers: the layers with weights.
        rates: for every parameter, the largest rates under which wider networks stay stable.
        abc: the exponents as theory judges them, with the largest stable rates of SGD; None where the layers are not
            one input layer, hidden layers and one readout, or their scaling is not known.
        explanation: in words: what the limit is, and which rates transfer.
    """

    name: str
    certain: bool
    layers: tuple[LayerScaling, ...]
    rates: tuple[TransferRate, ...]
    abc: ABC | None
    explanation: str


def _multiplier(step: Step, steps: list[Step]) -> float:
    """All numbers that the layer's product is multiplied with: in its weight, behind it, or at its input."""
    total = step.options.get("multiplier", 1.0) * behind(step, steps)
    if step.inputs:
        source = steps[step.inputs[0]]
        pending = 1.0
        while source.kind in ("scale", "same"):
            pending *= abs(source.options.get("by", 1.0))
            source = steps[source.inputs[0]]
        if source.kind != "weight":  # else it is counted behind that layer
            total *= pending
    return total


def _std(step: Step) -> float:
    """Of the weights that are trained, before any multiplier."""
    return math.sqrt(step.options["variance"]) / (step.options.get("multiplier", 1.0) or 1.0)


def _layers(reading: Reading) -> list[Step]:
    return [step for step in reading.steps if step.kind == "weight" and step.options["weights"]]


def compare_widths(model: nn.Module, narrow: Reading, wide: Reading) -> Scaling:
    """From two networks that differ in their width alone; `model` is the one whose parameters are listed.

    Raises:
        ValueError: where they have not the same layers, nothing gets wider, or things get wider by different factors.
    """
    pairs = list(zip(_layers(narrow), _layers(wide)))
    if len(_layers(narrow)) != len(_layers(wide)) or any(a.name != b.name for a, b in pairs):
        raise ValueError("make_model must give the same layers at every width")
    growths = {
        round(b.options[side] / a.options[side], 6)
        for a, b in pairs
        for side in ("fan_in", "fan_out")
        if a.options[side] != b.options[side] and a.options["form"] != "embedding"
    }
    if not growths:
        raise ValueError("make_model must give wider networks for larger widths, got the same shapes")
    if len(growths) > 1:
        told = ", ".join(f"{growth:.4g}" for growth in sorted(growths))
        raise ValueError(f"make_model must widen all layers by the same factor, got {told}")
    m = growths.pop()
    layers = []
    for a, b in pairs:
        wider_in = a.options["fan_in"] != b.options["fan_in"]
        kind = _kind(wider_in, a.options["fan_out"] != b.options["fan_out"])
        exponents = []
        for quantity in (_multiplier, lambda step, _: _std(step)):
            small, large = quantity(a, narrow.steps), quantity(b, wide.steps)
            exponents.append(_rounded(-math.log(large / small) / math.log(m)) if small > 0 and large > 0 else None)
        layers.append(LayerScaling(b.name, kind, _multiplier(b, wide.steps), _std(b), exponents[0], exponents[1]))
    name = _name(layers)
    return _scaling(model, wide, name, True, layers)


def looks_like(model: nn.Module, reading: Reading) -> Scaling:
    """From one network: what its multipliers and variances at this width would be in each parametrisation."""
    steps = _layers(reading)
    layers = []
    for step in steps:
        anchor = path_into(step, reading.steps).anchor if step.inputs else None
        first = anchor is None or reading.steps[anchor].kind == "data"
        kind = _kind(not first, step is not steps[-1] or len(steps) == 1)
        layers.append(LayerScaling(step.name, kind, _multiplier(step, reading.steps), _std(step), None, None))
    name = _resemblance(layers, steps)
    known = _NAMED.get(name)
    if known is not None:
        layers = [
            LayerScaling(each.name, each.kind, each.multiplier, each.std, *known[each.kind])
            if each.kind in known
            else each
            for each in layers
        ]
    return _scaling(model, reading, name, False, layers)


def _resemblance(layers: list[LayerScaling], steps: list[Step]) -> str:
    later = [(layer, step) for layer, step in zip(layers, steps) if layer.kind in ("hidden", "readout")]
    if not later:
        return "neither"

    def near(value: float, wanted: float, factor: float) -> bool:
        return value > 0 and abs(math.log(value / wanted)) <= math.log(factor)

    if all(
        near(layer.multiplier, step.options["fan_in"] ** -0.5, 1.05) and near(layer.std, 1, 3) for layer, step in later
    ):
        return "NTK"
    hidden = [(layer, step) for layer, step in later if layer.kind == "hidden"]

    # In each layer: the variance of its output for inputs of size one, whatever it is made of.
    def size(layer: LayerScaling, step: Step) -> float:
        return float((layer.multiplier * layer.std) ** 2 * step.options["fan_in"])

    if not all(near(size(layer, step), 1, 5) for layer, step in hidden):
        return "neither"
    readout, step = later[-1]
    fan_in, scale = step.options["fan_in"], size(readout, step)
    if readout.kind != "readout":
        return "standard"
    if near(readout.multiplier, 1 / fan_in, 1.05) and not hidden:
        return "mean-field"
    if near(readout.multiplier, 1, 1.001) and near(scale, 1, 5):
        return "standard"
    return "muP" if fan_in >= 32 and scale < 10 / fan_in else "neither"


def _kind(wider_in: bool, wider_out: bool) -> Kind:
    if wider_in:
        return "hidden" if wider_out else "readout"
    return "input" if wider_out else "fixed"


def _rounded(value: float) -> Fraction | float:
    """The nearest quarter, as what is measured on drawn weights is never exact."""
    near = Fraction(round(4 * value), 4)
    return near if abs(value - near) < 0.08 else value


def _name(layers: list[LayerScaling]) -> str:
    """The named parametrisation with these exponents, up to one shift of all multipliers into the weights."""
    growing = [layer for layer in layers if layer.kind != "fixed"]
    if any(layer.a is None or layer.b is None for layer in growing):
        return "neither"
    found = [(layer.kind, layer.a, layer.b) for layer in growing]
    for name, rows in _NAMED.items():
        if any(kind not in rows for kind, _, _ in found):
            continue
        shifts = {a - rows[kind][0] for kind, a, _ in found}  # type: ignore[operator]
        if len(shifts) == 1 and all(a + b == sum(rows[kind]) for kind, a, b in found):  # type: ignore[operator]
            return name
    sums = {"input": Fraction(0), "hidden": _HALF, "readout": Fraction(1)}
    if all(a + b == sums[kind] for kind, a, b in found):  # type: ignore[operator]
        return "muP"
    return "neither"


def _scaling(model: nn.Module, reading: Reading, name: str, certain: bool, layers: list[LayerScaling]) -> Scaling:
    start = next((layer for layer in reversed(layers) if layer.kind == "readout"), None)
    known = start is not None and all(
        layer.a is not None and layer.b is not None for layer in layers if layer.kind != "fixed"
    )
    rates: tuple[TransferRate, ...] = ()
    abc = None
    if known and start is not None:
        assert start.a is not None and start.b is not None
        s = start.a + start.b
        rates = _rates(model, reading, layers, s)
        kinds = [layer.kind for layer in layers]
        if kinds == ["input", *["hidden"] * (len(kinds) - 2), "readout"]:
            a, b = zip(*[(layer.a, layer.b) for layer in layers])
            by_name = {rate.name: rate.sgd for rate in rates}
            steps = _layers(reading)
            abc = ABC(a, b, [-by_name[step.options["weights"][0]] for step in steps])
    return Scaling(name, certain, tuple(layers), rates, abc, _explained(name, certain, rates, start))


def _rates(
    model: nn.Module, reading: Reading, layers: list[LayerScaling], s: Fraction | float
) -> tuple[TransferRate, ...]:
    """The largest stable rates; `s` is how fast the readout's initial size falls with the width.

    Where it is below one, hidden features may move by n^(s - 1) at most, or they blow up the output.
    """
    held: Fraction | float = 1 - s if s < 1 else Fraction(0)
    signal: Fraction | float = s if s < 1 else Fraction(1)
    by_parameter: dict[str, TransferRate] = {}
    for step, layer in zip(_layers(reading), layers):
        a = layer.a if layer.a is not None else Fraction(0)
        sgd: Fraction | float = Fraction(0)
        adam: Fraction | float = Fraction(0)
        if layer.kind == "fixed":
            pass
        elif layer.kind == "readout":
            sgd, adam = 2 * a - 1, a - 1
        else:
            own = 1 if layer.kind == "input" else 0
            sgd, adam = signal + 2 * a + own - 1 - held, a + own - 1 - held
        for weight in step.options["weights"]:
            by_parameter[weight] = TransferRate(weight, layer.kind, sgd, adam)
        for bias in step.options["biases"]:
            if layer.kind in ("readout", "fixed"):
                by_parameter[bias] = TransferRate(bias, "fixed", Fraction(0), Fraction(0))
            else:
                by_parameter[bias] = TransferRate(bias, "input", signal - held, -held)
    for parameter, _ in model.named_parameters():
        # Gains and biases of norms are one number a unit, as biases are.
        by_parameter.setdefault(parameter, TransferRate(parameter, "input", signal - held, -held))
    return tuple(by_parameter[name] for name, _ in model.named_parameters())


def _explained(name: str, certain: bool, rates: tuple[TransferRate, ...], start: LayerScaling | None) -> str:
    found = {
        "standard": "Weights of variance 1 / fan-in, no multipliers: wide networks of this kind become kernel methods, "
        "and the largest stable rate of SGD falls as 1 / width",
        "NTK": "Multipliers 1 / sqrt(width): wide networks of this kind become kernel methods",
        "mean-field": "The readout is an average: features keep learning at any width",
        "muP": "The readout starts small enough for features to keep learning at any width",
        "neither": "None of standard, NTK, mean-field and muP" + ("" if start else ": no layer reads out of a width"),
    }[name]
    doubt = "" if certain else " This is what it looks like; how things scale shows with make_model."
    if not rates:
        return f"{found}.{doubt}"
    free = {optimizer: all(getattr(rate, optimizer) == 0 for rate in rates) for optimizer in ("sgd", "adam")}
    stay = " and ".join(name for key, name in (("sgd", "SGD"), ("adam", "Adam")) if free[key])
    if stay:
        tail = f" One rate of {stay} transfers to wider networks as it is"
        tail += "." if stay == "SGD and Adam" else "; the other optimiser needs a rate a layer (see scaling.rates)."
    else:
        tail = " Rates have to change with width, layer by layer (see scaling.rates); "
        tail += "lathe.theory.infinite_width_feature_learning.parametrize makes tuned rates transfer."
    return f"{found}.{tail}{doubt}"
