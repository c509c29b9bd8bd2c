"""The interface between the engine and whatever runs a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Session(Protocol):
    """A loaded network. 2-D networks take windows of one slice (Z = 1)."""

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, Z, Y, X) of windows (N, C, Z, Y, X); both float32, contiguous or not, on one device."""


class TappedSession(Session, Protocol):
    """A session that can also return the maps of one layer."""

    def tapped(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits as a call does, and the layer's maps (N, D, z, y, x) float32; z = 1 for 2-D networks."""


class LoadedSession(Session, Protocol):
    """A session that states its device, its arithmetic, and the layer that it can return."""

    @property
    def tap(self) -> str:
        """Dotted name of the layer that `tapped` returns; empty for a session without that method."""

    @property
    def device(self) -> torch.device:
        """The device of its network."""

    @property
    def arithmetic(self) -> str:
        """Precision and runtime, in a few words."""
