"""Compact codes: integers of 2 to 8 bits stored in the bytes that they need, and no more.

Codes are laid out little-endian: code k occupies bits `k * bits ... (k + 1) * bits - 1` of the byte stream, the least
significant bit first (the order of `numpy.packbits(..., bitorder="little")`). Only the last byte is padded, with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

__all__ = ["pack_bits", "packed_bytes", "unpack_bits"]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits need: `ceil(count * bits / 8)`."""
    _check_bits(bits)
    return (count * bits + 7) // 8


def pack_bits(codes: Integer[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " bytes"]:
    """The codes, in row-major order, packed into `ceil(n * bits / 8)` bytes.

    Args:
        codes: integers of `bits` bits, all unsigned (0 .. 2^bits - 1) or all signed (-2^(bits-1) .. 2^(bits-1) - 1);
            signed ones are stored as two's complement, and `unpack_bits(..., signed=True)` reads them back.
        bits: 2 to 8.

    Raises:
        ValueError: where `bits` is not in 2..8, or a code does not fit.
    """
    _check_bits(bits)
    if codes.numel():
        low, high = int(codes.min()), int(codes.max())
        half, full = 1 << (bits - 1), 1 << bits
        if not (low >= 0 and high < full) and not (-half <= low and high < half):
            raise ValueError(f"codes must fit {bits} bits, got values from {low} to {high}")
    flat = codes.reshape(-1)
    per_group, bytes_per_group = _group(bits)
    if bits == 8:
        return flat.to(torch.uint8, copy=True)
    size = packed_bytes(flat.numel(), bits)
    # A group of at most 8 codes is one machine word; a code that divides a byte stays in bytes, eight times the speed.
    word_type = torch.uint8 if bytes_per_group == 1 else torch.int64
    flat = torch.nn.functional.pad(flat.to(word_type), (0, -flat.numel() % per_group)) & ((1 << bits) - 1)
    columns = flat.view(-1, per_group)
    words = columns[:, 0].clone()
    for k in range(1, per_group):
        words |= columns[:, k] << (bits * k)
    if bytes_per_group == 1:
        return words
    return (
        torch.stack([(words >> (8 * k)) & 255 for k in range(bytes_per_group)], dim=1).to(torch.uint8).view(-1)[:size]
    )


def unpack_bits(
    packed: UInt8[Tensor, " bytes"], bits: int, shape: int | Sequence[int], *, signed: bool = False
) -> Integer[Tensor, "*shape"]:
    """The codes that `pack_bits` stored: uint8, or int8 where `signed`.

    Args:
        shape: the shape of the codes (or their number); the padding of the last byte is dropped.

    Raises:
        ValueError: where `bits` is not in 2..8, or `packed` has another number of bytes than the codes need.
    """
    _check_bits(bits)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(shape)
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"packed must hold {packed_bytes(count, bits)} bytes for {count} codes of {bits} bits, got {packed.numel()}"
        )
    per_group, bytes_per_group = _group(bits)
    if bits == 8:
        codes = packed.clone()
    elif bytes_per_group == 1:
        mask = (1 << bits) - 1
        codes = torch.stack([(packed >> (bits * k)) & mask for k in range(per_group)], dim=1).view(-1)[:count]
    else:
        padded = torch.nn.functional.pad(packed.long(), (0, -packed.numel() % bytes_per_group)).view(
            -1, bytes_per_group
        )
        words = padded[:, 0].clone()
        for k in range(1, bytes_per_group):
            words |= padded[:, k] << (8 * k)
        mask = (1 << bits) - 1
        codes = torch.stack([(words >> (bits * k)) & mask for k in range(per_group)], dim=1).view(-1)[:count]
    if signed:
        # Sign extension of two's complement: flip the sign bit, then subtract its weight.
        sign = 1 << (bits - 1)
        return ((codes.to(torch.int16) ^ sign) - sign).to(torch.int8).view(shape)
    return codes.to(torch.uint8).view(shape)


def _group(bits: int) -> tuple[int, int]:
    """The smallest whole number of bytes that holds a whole number of codes: (codes, bytes)."""
    codes = 8 // math.gcd(8, bits)
    return codes, codes * bits // 8


def _check_bits(bits: int) -> None:
    if bits not in range(2, 9):
        raise ValueError(f"bits must be 2 to 8, got {bits}")
