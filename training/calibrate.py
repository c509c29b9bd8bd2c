"""Move a member's threshold to 0.5: `python -m training.calibrate model_weights/iso3d --threshold 0.2`.

A voxel is voted for above a probability of 0.5. A member that does best at another threshold, chosen on simulated validation patients, gets
a constant added to its lesion logit, by the bias of its last layer, so that this threshold becomes 0.5.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

CHECKPOINT = Path("fold_0") / "checkpoint_final.pth"
LESION = 1


def shift_threshold(folder: Path, threshold: float) -> None:
    """Rewrite the checkpoint of an nnU-Net v2 model folder so that probability `threshold` (0-1, exclusive) becomes 0.5."""
    if not 0 < threshold < 1:
        raise ValueError(f"a threshold lies between 0 and 1, not at {threshold}")
    path = folder / CHECKPOINT
    checkpoint = torch.load(path, weights_only=True)
    weights = checkpoint["network_weights"]
    (name,) = _last_bias(weights)
    bias = weights[name].clone()
    bias[LESION] += math.log((1 - threshold) / threshold)
    for other, value in weights.items():  # nnU-Net's modules hold the same tensor under several names
        if value.data_ptr() == weights[name].data_ptr() and other != name:
            weights[other] = bias
    weights[name] = bias
    draft = path.with_suffix(".draft")
    torch.save(checkpoint, draft)
    draft.rename(path)


def _last_bias(weights: dict[str, torch.Tensor]) -> list[str]:
    """The bias of the layer that gives the logits at full resolution: nnU-Net numbers `decoder.seg_layers` from coarse to fine."""
    names = [name for name in weights if name.startswith("decoder.seg_layers.") and name.endswith(".bias")]
    return [max(names, key=lambda name: int(name.split(".")[2]))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.calibrate", description="Move a member's threshold to 0.5."
    )
    parser.add_argument(
        "folder", type=Path, help="nnU-Net v2 model folder, as training.train writes it; changed in place"
    )
    parser.add_argument("--threshold", type=float, required=True, help="probability that is to become 0.5")
    options = parser.parse_args(arguments)
    shift_threshold(options.folder, options.threshold)


if __name__ == "__main__":
    main()
