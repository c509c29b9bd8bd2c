"""What the engine asks of a network, whatever runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Session(Protocol):
    """A loaded network. 2-D networks take windows of one slice (Z = 1)."""

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, Z, Y, X) of windows (N, C, Z, Y, X); both float32, contiguous or not, on one device."""


class LoadedSession(Session, Protocol):
    """A session that says where it runs."""

    @property
    def device(self) -> torch.device:
        """Where its network lies."""

    @property
    def arithmetic(self) -> str:
        """Precision, and what computes, in a few words."""
