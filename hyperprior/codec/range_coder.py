"""A range coder in Python and NumPy. It gives the same bytes as tensorflow-compression's C++ operations.

Martin: "Range encoding: an algorithm for removing redundancy from a digitised message", 1979, with digits of 16 bits.
The coder holds an interval of 32-bit numbers. A symbol with the cumulative counts [lower, upper) of 2^precision narrows
the interval to that share of it. Once the interval is no longer than 2^16, its upper digit is known and is written.
If the interval still contains a multiple of 2^32, a later carry may change that digit: it waits, together with the
digits of zero that follow it.

A decoder repeats the encoder's arithmetic. It accepts any bytes, reads zeros beyond their end, and takes one step for
each symbol.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

MASK, DIGIT = 0xFFFFFFFF, 0xFFFF
MOST_BITS = 16  # of a table's precision
PIECE = 2**16  # symbols that are Python's integers at a time, which take ten times the memory of NumPy's


class Counts:
    """`lookup` of `tables.Tables`: each table as (precision, cumulative counts from 0 to 2^precision).

    Raises ValueError if a table is not a distribution.
    """

    def __init__(self, lookup: np.ndarray):
        self.lookup = lookup
        self.precision: list[int] = []
        self.cumulative: list[list[int]] = []  # of each table
        first: list[int] = []  # where each table's counts begin
        at = 0
        while at < len(lookup):
            precision = int(lookup[at])
            if not 0 < precision <= MOST_BITS:
                raise ValueError(f"table {len(first)} has a precision of {precision} bits")
            length = int(np.argmax(lookup[at + 1 :] == 1 << precision)) + 1
            cumulative = lookup[at + 1 : at + 1 + length]
            if length < 2 or cumulative[0] != 0 or not (np.diff(cumulative) > 0).all():
                raise ValueError(f"table {len(first)} is not a distribution")
            first.append(at + 1)
            self.precision.append(precision)
            self.cumulative.append(cumulative.tolist())
            at += 1 + length
        self.first = np.array(first)


class Encoder:
    """Encodes symbols of a batch, each into a string of its own."""

    def __init__(self, counts: Counts, batch: int):
        self.encoders = [SingleEncoder(counts) for _ in range(batch)]

    def put(self, symbols: np.ndarray, index: np.ndarray) -> None:
        """Appends `symbols` [B, …] int32, each by the table `index` [B, …]."""
        for encoder, own_symbols, own_index in zip(self.encoders, symbols, index):
            own_symbols, own_index = own_symbols.ravel(), own_index.ravel()
            for begin in range(0, own_index.size, PIECE):
                encoder.put(own_symbols[begin : begin + PIECE], own_index[begin : begin + PIECE])

    def finish(self) -> list[bytes]:
        return [encoder.finish() for encoder in self.encoders]


class Decoder:
    """Decodes a batch of strings."""

    def __init__(self, counts: Counts, strings: Sequence[bytes]):
        self.decoders = [SingleDecoder(counts, string) for string in strings]

    def take(self, index: np.ndarray) -> np.ndarray:
        """The next symbols, one for each table `index` [B, …]: int32."""
        symbols = np.empty(index.shape, np.int32)
        for decoder, own_index, own_symbols in zip(self.decoders, index.reshape(len(index), -1), symbols):
            places = own_symbols.reshape(-1)
            for begin in range(0, places.size, PIECE):
                places[begin : begin + PIECE] = decoder.take(own_index[begin : begin + PIECE])
        return symbols


class SingleEncoder:
    """One string. The interval is [base, base + size_minus_1], modulo 2³²."""

    def __init__(self, counts: Counts):
        self.counts = counts
        self.base, self.size_minus_1 = 0, MASK
        # Digits that wait for a carry: one plus the upper digit, and 2^16 for each byte of zeros that follows.
        self.waiting = 0
        self.string = bytearray()

    def put(self, symbols: np.ndarray, index: np.ndarray) -> None:
        """Appends symbols [n]."""
        at = self.counts.first[index] + symbols
        lowers, uppers = self.counts.lookup[at].tolist(), self.counts.lookup[at + 1].tolist()
        precision = self.counts.precision
        base, size_minus_1, waiting, string = self.base, self.size_minus_1, self.waiting, self.string
        for lower, upper, table in zip(lowers, uppers, index.tolist()):
            size, shift = size_minus_1 + 1, precision[table]
            begin = size * lower >> shift
            size_minus_1 = (size * upper >> shift) - 1 - begin
            base += begin
            has_carry = base > MASK
            base &= MASK
            if base + size_minus_1 > MASK:  # a later carry is possible
                if size_minus_1 <= DIGIT:
                    base, size_minus_1 = base << 16 & MASK, size_minus_1 << 16 | DIGIT
                    waiting += 2 << 16
                continue
            if waiting:
                if not has_carry:
                    waiting -= 1
                string += (waiting & DIGIT).to_bytes(2, "big")
                string += (b"\0" if has_carry else b"\xff") * (waiting >> 16)
                waiting = 0
            if size_minus_1 <= DIGIT:
                digit = base >> 16
                base, size_minus_1 = base << 16 & MASK, size_minus_1 << 16 | DIGIT
                if base + size_minus_1 <= MASK:
                    string += digit.to_bytes(2, "big")
                else:
                    waiting = digit + 1
        self.base, self.size_minus_1, self.waiting = base, size_minus_1, waiting

    def finish(self) -> bytes:
        """The string, ended by the fewest bytes that name a number in the interval."""
        if self.waiting:
            self.string += (self.waiting & DIGIT).to_bytes(2, "big").rstrip(b"\0") or b"\0"
        elif self.base:
            byte = (self.base - 1 >> 24) + 1
            if byte << 24 <= self.base + self.size_minus_1:
                self.string.append(byte)
            else:
                self.string += ((self.base - 1 >> 16) + 1).to_bytes(2, "big")
        return bytes(self.string)


class SingleDecoder:
    """One string. `offset`: the place in the interval, below `size`, that the string names."""

    def __init__(self, counts: Counts, string: bytes):
        self.tables = list(zip(counts.cumulative, counts.precision))
        self.digits = iter(np.frombuffer(string + b"\0" * (len(string) % 2), ">u2").tolist())
        self.offset, self.size = next(self.digits, 0) << 16 | next(self.digits, 0), MASK + 1

    def take(self, index: np.ndarray) -> list[int]:
        """The next symbols, one for each table `index` [n]."""
        tables, digits, offset, size = self.tables, self.digits, self.offset, self.size
        symbols: list[int] = []
        append = symbols.append
        for table in index.tolist():
            cumulative, shift = tables[table]
            # The last symbol whose part of the interval does not begin above the offset.
            symbol = bisect_right(cumulative, ((offset + 1 << shift) - 1) // size) - 1
            append(symbol)
            begin = size * cumulative[symbol] >> shift
            size = (size * cumulative[symbol + 1] >> shift) - begin
            offset -= begin
            if size <= DIGIT + 1:
                size, offset = size << 16, offset << 16 | next(digits, 0)
        self.offset, self.size = offset, size
        return symbols
