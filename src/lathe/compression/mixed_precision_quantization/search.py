"""From an order to bits: bisection (the paper's), greedy search (its companion's), and the exact optimum of a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

__all__ = ["allocate", "bisect_precision", "greedy_precision"]

Evaluate = Callable[[dict[str, int]], float]
Candidate = Callable[[str, int], bool]


def bisect_precision(
    evaluate: Evaluate,
    order: Sequence[str],
    bits: Sequence[int] = (16, 8, 4),
    *,
    floor: float,
    may_lower: Candidate | None = None,
) -> dict[str, int]:
    """Bits by layer: at each width in turn, lowers the longest prefix of `order` that bisection finds above the floor.

    Asks for at most `ceil(log2(L + 1))` evaluations a width, and one of the unquantised network. What is returned was
    itself evaluated and reached the floor; it is the longest such prefix if accuracy falls along the order.

    Args:
        evaluate: accuracy (or any score, more is better) of a configuration.
        order: layers, least sensitive first.
        bits: widths, falling; the first is that of the unquantised network.
        floor: the least score to accept.
        may_lower: `may_lower(name, bits)`; where false, the layer is passed over at that width.

    Raises:
        ValueError: where `bits` does not fall, `order` repeats a layer, or the unquantised network is below the floor.
    """
    config = _start(evaluate, order, bits, floor)
    for width in bits[1:]:
        names = [name for name in order if may_lower is None or may_lower(name, width)]
        low, high = 0, len(names)
        best = config
        while low < high:
            middle = (low + high + 1) // 2
            trial = config | {name: min(config[name], width) for name in names[:middle]}
            if evaluate(dict(trial)) >= floor:
                low, best = middle, trial
            else:
                high = middle - 1
        config = best
    return config


def greedy_precision(
    evaluate: Evaluate,
    order: Sequence[str],
    bits: Sequence[int] = (16, 8, 4),
    *,
    floor: float,
    may_lower: Candidate | None = None,
) -> dict[str, int]:
    """Bits by layer: tries each layer in order at each width, and takes it back if the floor is missed.

    L evaluations a width and one of the unquantised network; arguments as for `bisect_precision`. A width is tried only
    on layers that reached the one before.
    """
    config = _start(evaluate, order, bits, floor)
    for previous, width in itertools.pairwise(bits):
        for name in order:
            if config[name] > previous or (may_lower is not None and not may_lower(name, width)):
                continue
            trial = config | {name: width}
            if evaluate(dict(trial)) >= floor:
                config = trial
    return config


def _start(evaluate: Evaluate, order: Sequence[str], bits: Sequence[int], floor: float) -> dict[str, int]:
    check_bits(bits)
    if len(set(order)) != len(order):
        raise ValueError(f"order must name each layer once, got {list(order)}")
    config = dict.fromkeys(order, bits[0])
    score = evaluate(dict(config))
    if not score >= floor:
        raise ValueError(f"floor must be within reach of the unquantised network, got {floor} where it scores {score}")
    return config


def check_bits(bits: Sequence[int]) -> None:
    """Raises a ValueError unless `bits` are widths of 2..8 or 16 that fall."""
    if any(each not in (2, 3, 4, 5, 6, 7, 8, 16) for each in bits):
        raise ValueError(f"bits must be 2 to 8, or 16, got {tuple(bits)}")
    if not bits or any(left <= right for left, right in itertools.pairwise(bits)):
        raise ValueError(f"bits must fall, from that of the unquantised network on, got {tuple(bits)}")


def allocate(
    cost: Mapping[str, Mapping[int, float]],
    increase: Mapping[str, Mapping[int, float]],
    budget: float,
    *,
    pairs: Mapping[tuple[str, str], float] | None = None,
    pair_bits: int | None = None,
    conversions: Mapping[tuple[str, str], float] | None = None,
) -> dict[str, int]:
    """The cheapest bits whose modelled loss increase stays within a budget, exactly, by integer programming.

    Minimises `sum_i cost_i(b_i) + sum_(i,j) conversion_ij [b_i = 16, b_j < 16]` under
    `sum_i D_i(b_i) + sum_(i<j) Omega_ij [b_i = b_j = pair_bits] <= budget`: the model in which bisection searches one
    order only. Products of choices are linearised, which is exact for zeros and ones.

    Args:
        cost: for each layer and width what it costs (seconds, bytes, operations); layers may have different widths.
        increase: for each layer and width the loss increase with that layer alone quantised; 0 at 16 bits.
        pairs: `Omega_ij` of layers that are both at `pair_bits`; None for an additive model.
        pair_bits: None for the lowest width.
        conversions: for layers (i, j) that follow one another: what it costs if j is quantised and i is not, on top of
            `cost`, which then holds layer j without converting its input. Both must have 16 bits among their widths.

    Raises:
        ValueError: where layers or widths of the arguments differ, or no configuration keeps the budget.
    """
    names = list(cost)
    if not names or any(not cost[name] or set(increase.get(name, ())) != set(cost[name]) for name in names):
        raise ValueError("cost and increase must have the same layers and widths, and at least one")
    widths = sorted({width for name in names for width in cost[name]}, reverse=True)
    pair_bits = widths[-1] if pair_bits is None else pair_bits
    choices = [(name, width) for name in names for width in sorted(cost[name], reverse=True)]
    place = {choice: n for n, choice in enumerate(choices)}
    objective = [cost[name][width] for name, width in choices]
    losses = [increase[name][width] for name, width in choices]
    rows: list[dict[int, float]] = [{place[name, width]: 1.0 for width in cost[name]} for name in names]
    low, high = [1.0] * len(names), [1.0] * len(names)

    def add(row: dict[int, float], least: float, most: float) -> None:
        rows.append(row)
        low.append(least)
        high.append(most)

    for (i, j), omega in (pairs or {}).items():
        if omega == 0 or (i, pair_bits) not in place or (j, pair_bits) not in place:
            continue
        both = len(objective)
        objective.append(0.0)
        losses.append(omega)
        a, b = place[i, pair_bits], place[j, pair_bits]
        if omega > 0:  # the budget pulls the product down: hold it up
            add({both: 1.0, a: -1.0, b: -1.0}, -1.0, np.inf)
        else:
            add({both: 1.0, a: -1.0}, -np.inf, 0.0)
            add({both: 1.0, b: -1.0}, -np.inf, 0.0)
    for (i, j), seconds in (conversions or {}).items():
        crossing = len(objective)
        objective.append(seconds)
        losses.append(0.0)
        # At least [i at 16] - [j at 16]: one where j is quantised and i is not.
        add({crossing: 1.0, place[i, 16]: -1.0, place[j, 16]: 1.0}, 0.0, np.inf)
    matrix = sparse.lil_matrix((len(rows) + 1, len(objective)))
    for number, row in enumerate(rows):
        for column, value in row.items():
            matrix[number, column] = value
    # In units of the budget's own size, so that the solver's absolute tolerance means the same everywhere.
    unit = max(max(map(abs, losses)), abs(budget), 1e-300)
    matrix[len(rows)] = np.array(losses) / unit
    result = milp(
        np.array(objective) / max(max(map(abs, objective)), 1e-300),
        constraints=LinearConstraint(matrix.tocsr(), [*low, -np.inf], [*high, budget / unit]),
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
    )
    if result.x is None:
        raise ValueError(f"budget must allow some configuration, got {budget}: {result.message}")
    return {name: width for (name, width), n in place.items() if result.x[n] > 0.5}
