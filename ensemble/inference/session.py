"""What the engine asks of a network, whatever runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Session(Protocol):
    """A loaded network. 2-D networks take windows of one slice (Z = 1)."""

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, Z, Y, X) of windows (N, C, Z, Y, X); both float32, contiguous or not, on one device."""


class TappedSession(Session, Protocol):
    """A session that can tell the maps of one of the network's layers, too."""

    def tapped(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits as of a call, and the layer's maps (N, D, z, y, x) float32; z = 1 for 2-D networks."""


class LoadedSession(Session, Protocol):
    """A session that says where it runs."""

    @property
    def tap(self) -> str:
        """Dotted name of the layer that `tapped` tells of, of a `TappedSession`; empty for one that has no such method."""

    @property
    def device(self) -> torch.device:
        """Where its network lies."""

    @property
    def arithmetic(self) -> str:
        """Precision, and what computes, in a few words."""
