"""The flips over which test-time augmentation averages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

Flip = tuple[int, ...]


def all_flips(axes: Sequence[int]) -> list[Flip]:
    """Return every subset of the spatial axes (0 z, 1 y, 2 x) to reverse, the empty one first: 2**n flips for n axes."""
    if len(set(axes)) != len(axes) or not set(axes) <= {0, 1, 2}:
        raise ValueError(f"mirror axes {tuple(axes)} are not distinct spatial axes 0, 1, 2")
    return [flip for count in range(len(axes) + 1) for flip in combinations(axes, count)]


def flipped_dims(flip: Flip) -> list[int]:
    """Return the dimensions of an (N, C, Z, Y, X) tensor that a flip reverses."""
    return [axis + 2 for axis in flip]
