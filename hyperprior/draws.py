"""Random numbers as pure functions: each depends only on what it is drawn for, such as ("crop", epoch, key).

So they are the same on every machine and version, and no draw depends on how many were drawn before.
"""

from __future__ import annotations

import hashlib


def draw(*inputs: object) -> int:
    """64 random bits that depend only on `inputs`: numbers, text, and lists or tuples of them."""
    text = repr(inputs).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def draw_unit(*inputs: object) -> float:
    """A random number in [0, 1) that depends only on `inputs`."""
    return (draw(*inputs) >> 11) / 2**53
