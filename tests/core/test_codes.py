"""Bit packing against numpy's packbits, by round trip, and by counting bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lathe.core.codes import pack_bits, packed_bytes, unpack_bits


@st.composite
def codes_of(draw, signed):
    bits = draw(st.integers(2, 8))
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return bits, torch.tensor(draw(st.lists(st.integers(low, high), max_size=40)), dtype=torch.int64)


@given(codes_of(signed=False))
def test_bytes_are_those_of_numpys_little_endian_bit_stream(case):
    bits, codes = case
    stream = (codes.numpy()[:, None] >> np.arange(bits)) & 1
    expected = np.packbits(stream.astype(np.uint8).reshape(-1), bitorder="little")
    packed = pack_bits(codes, bits)
    assert packed.numel() == packed_bytes(codes.numel(), bits) == -(-codes.numel() * bits // 8)
    np.testing.assert_array_equal(packed.numpy(), expected)


@pytest.mark.parametrize("signed", [False, True])
def test_unpacking_undoes_packing_for_every_width_and_count(signed):
    @given(codes_of(signed=signed))
    def check(case):
        bits, codes = case
        restored = unpack_bits(pack_bits(codes, bits), bits, codes.numel(), signed=signed)
        assert restored.dtype == (torch.int8 if signed else torch.uint8)
        assert torch.equal(restored.long(), codes)

    check()


def test_shape_is_restored_and_the_source_is_left_alone(rng):
    codes = torch.randint(-4, 4, (3, 5, 7), generator=rng, dtype=torch.int8)
    kept = codes.clone()
    assert torch.equal(unpack_bits(pack_bits(codes, 3), 3, codes.shape, signed=True), kept)
    assert torch.equal(codes, kept)


def test_int4_needs_half_a_byte_a_code():
    assert pack_bits(torch.zeros(1001, dtype=torch.int8), 4).numel() == 501


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, got {bits}"):
        pack_bits(torch.zeros(3, dtype=torch.int8), bits)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="fit 3 bits, got values from -1 to 7"):
        pack_bits(torch.tensor([-1, 7]), 3)


def test_a_stream_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="must hold 3 bytes for 8 codes of 3 bits, got 4"):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), 3, 8)
