"""Check the voxel sizes and the memory that a member's plans ask for, before it is allocated."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble.errors import WeightsBroken
from ensemble.families.base import NetworkSpec
from ensemble.families.cropping import MAX_NETWORK_VOXELS
from ensemble.families.spec import ENTRY_FILES, MemberSpec
from ensemble.geometry import describe_size_limit, is_too_large

#: Edge of a cube that holds a large brain, and a slice's thickness where a network keeps the image's own (mm).
_BRAIN_MM, _SLICE_MM = 185.0, 1.0
#: Activations of one window: what nnU-Net plans for the largest GPUs stays below.
_MAX_WINDOW_BYTES = 24 * 2**30


def refuse_impossible_plans(spec: MemberSpec, network: NetworkSpec) -> None:
    """Raise WeightsBroken for impossible plans.

    That is: voxel sizes that are not positive or as large as a brain, too many voxels in a brain, too much memory for one window.
    """
    patch = network.patch
    for spacing in (network.spacing_mm, spec.spacing_mm):
        if not spacing:
            continue
        whole = (_SLICE_MM,) * (3 - len(spacing)) + tuple(spacing)
        window = (1,) * (3 - len(patch)) + tuple(patch)
        finite = len(whole) == 3 and all(0 < mm < _BRAIN_MM / 2 for mm in whole)
        # division would overflow: too many in any case
        brain = [max(1, round(min(_BRAIN_MM / mm, 1e9))) for mm in whole] if finite else []
        lattice = [max(pair) for pair in zip(brain, window, strict=True)] if finite else []
        if not finite:
            raise _refusal(
                spec,
                "has an impossible voxel size",
                f"{_mm(spacing)}; it must be above 0 and below {_BRAIN_MM / 2:g} mm",
            )
        if is_too_large(lattice, MAX_NETWORK_VOXELS):
            limit = describe_size_limit(MAX_NETWORK_VOXELS)
            found = f"a brain at {_mm(spacing)} has {_times(brain)} voxels; the patch has {_times(patch)}; {limit}"
            raise _refusal(spec, "would need too much memory for a brain at its voxel size and patch size", found)
    if network.window_bytes > _MAX_WINDOW_BYTES:
        found = f"{network.window_bytes / 2**30:.0f} GiB for a patch of {_times(patch)} voxels and {network.memory_of}"
        found += f"; at most {_MAX_WINDOW_BYTES / 2**30:.0f} GiB are allowed"
        raise _refusal(spec, "would need too much memory for one window", found)


def _refusal(spec: MemberSpec, what: str, found: str) -> WeightsBroken:
    return WeightsBroken(
        f"member {spec.name} {what}",
        where=spec.folder,
        found=found,
        do="use the plans that were written with these weights (spacing in mm, patch size in voxels), "
        f"and check spacing_mm in {ENTRY_FILES}",
    )


def _mm(spacing_mm: Sequence[float]) -> str:
    return f"{' x '.join(f'{mm:.3g}' for mm in spacing_mm)} mm"


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
