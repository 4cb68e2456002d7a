"""Verdicts follow from bounds and measurements, and from nothing else."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.studies.engine import (
    FALLS_SHORT,
    HOLDS,
    NOT_AT_THIS_SCALE,
    Claim,
    Measurement,
    at_least,
    at_most,
    average,
    between,
    compare,
    equals,
)

finite = st.floats(-1e6, 1e6)


@given(low=finite, value=finite)
def test_a_lower_bound_holds_from_its_value_upwards(low, value):
    assert at_least(low)(value) == (value >= low)
    assert at_most(low)(value) == (value <= low)
    assert between(low, low + 1)(value) == (low <= value <= low + 1)


@pytest.mark.parametrize("bound", [at_least(-math.inf), at_most(math.inf), between(-1, 1), equals(0)])
def test_no_bound_holds_for_nan(bound):
    assert not bound(math.nan)


def test_bounds_are_written_as_a_reader_would():
    assert [str(b) for b in (at_least(0.5), at_most(3), between(0.98, 1.02), equals(2))] == [
        "≥ 0.5",
        "≤ 3",
        "0.98 to 1.02",
        "= 2",
    ]


def claim(kind="trained", also=None):
    return Claim("C1", "text", "Table 1", at_least(1.0), lambda run: Measurement(0.0), kind, "", also or {})


def test_a_verdict_needs_the_value_and_every_part():
    both = claim(also={"part": at_most(2.0)})
    assert both.verdict(Measurement(1.0, also={"part": 2.0}), "desk") == HOLDS
    assert both.verdict(Measurement(1.0, also={"part": 2.1}), "desk") == FALLS_SHORT
    assert both.verdict(Measurement(0.9, also={"part": 2.0}), "desk") == FALLS_SHORT
    assert both.verdict(Measurement(math.nan, also={"part": 2.0}), "desk") == FALLS_SHORT


def test_a_measurement_without_a_bounded_part_is_refused():
    with pytest.raises(ValueError, match=r"bounds \['part'\]"):
        claim(also={"part": at_most(2.0)}).verdict(Measurement(1.0), "desk")


def test_trained_claims_are_not_judged_at_smoke_scale_and_exact_ones_are():
    assert claim("trained").verdict(Measurement(5.0), "smoke") == NOT_AT_THIS_SCALE
    assert claim("exact").verdict(Measurement(5.0), "smoke") == HOLDS
    assert claim("exact").verdict(Measurement(0.0), "smoke") == FALLS_SHORT


@given(pairs=st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=6))
def test_comparison_is_paired_over_seeds(pairs):
    ours, baseline = [a for a, _ in pairs], [b for _, b in pairs]
    differences = [a - b for a, b in pairs]
    got = compare(ours, baseline)
    assert got.value == pytest.approx(statistics.fmean(ours) - statistics.fmean(baseline), abs=1e-9)
    assert got.spread == pytest.approx(
        statistics.pstdev(differences) * math.sqrt(len(pairs) / (len(pairs) - 1)), abs=1e-9
    )
    assert got.seeds == len(pairs)
    assert compare(ours, baseline, how="ratio").samples == pytest.approx([a / b for a, b in pairs])


def test_unpaired_comparison_is_refused():
    with pytest.raises(ValueError, match="got 2 and 1 values"):
        compare([1, 2], [1])


def test_one_seed_has_no_spread():
    assert average([3.0]).spread is None
