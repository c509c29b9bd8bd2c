"""Check the memory that a member's plans ask for, before it is allocated."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble.errors import WeightsBroken
from ensemble.families.base import NetworkSpec
from ensemble.families.cropping import MAX_NETWORK_VOXELS
from ensemble.families.spec import MemberSpec
from ensemble.geometry import is_too_large

#: Edge of a cube that holds a large brain, and a slice's thickness where a network keeps the image's own (mm).
_BRAIN_MM, _SLICE_MM = 185.0, 1.0
#: Activations of one window: what nnU-Net plans for the largest GPUs stays below.
_MAX_WINDOW_BYTES = 24 * 2**30


def refuse_excessive_memory(spec: MemberSpec, network: NetworkSpec) -> None:
    """Raise WeightsBroken if resampling a brain or one window would need excessive memory, or voxels are as large as a brain."""
    patch = network.patch
    for spacing in (network.spacing_mm, spec.spacing_mm):
        if not spacing:
            continue
        whole = (_SLICE_MM,) * (3 - len(spacing)) + tuple(spacing)
        window = (1,) * (3 - len(patch)) + tuple(patch)
        finite = len(whole) == 3 and all(0 < mm < _BRAIN_MM / 2 for mm in whole)
        # so many that they are too many, where division would overflow
        brain = [max(1, round(min(_BRAIN_MM / mm, 1e9))) for mm in whole] if finite else []
        lattice = [max(pair) for pair in zip(brain, window, strict=True)] if finite else []
        if not finite or is_too_large(lattice, MAX_NETWORK_VOXELS):
            raise _refusal(spec, spacing, patch, f": a brain would have {_times(brain)} voxels" if finite else "")
    if network.window_bytes > _MAX_WINDOW_BYTES:
        needed = f" and {network.memory_of}: {network.window_bytes / 2**30:.0f} GiB a window"
        raise _refusal(spec, network.spacing_mm, patch, needed)


def _refusal(spec: MemberSpec, spacing_mm: Sequence[float], patch: Sequence[int], what: str) -> WeightsBroken:
    spacing = " x ".join(f"{mm:.3g}" for mm in spacing_mm)
    return WeightsBroken(
        f"member {spec.name} can't be used: its spacing or patch size is impossible, or needs too much memory",
        where=spec.folder,
        found=f"voxels of {spacing} mm, windows of {_times(patch)} voxels{what}",
        do="use the plans that were written with these weights (spacing in mm, patch size in voxels), and check the manifest's spacing_mm",
    )


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
