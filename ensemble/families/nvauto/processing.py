"""NVAUTO's pre- and postprocessing: MONAI 0.9's `Spacingd`, `NormalizeIntensityd` and `Invertd`, rounding included.

Which voxels are exactly 0 decides about the normalisation, and positions that are 1e-6 voxels off make others than 0 of those beside a
stripped brain. So positions are found as MONAI finds them: by solving in float32, then in float64. Arrays are in the file's axis order
(x, y, z), affines RAS, as nibabel gives them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from ensemble.errors import InputRefused
from ensemble.families.cropping import MAX_NETWORK_VOXELS
from ensemble.geometry import Grid, describe_size_limit, is_too_large
from ensemble.types import FloatArray

SPACING_MM = (1.0, 1.0, 1.0)
#: Affines that differ by no more are the same to MONAI: nothing is resampled then.
_SAME = 1e-3


@dataclass(frozen=True)
class ResampleTo1Mm:
    """Resamples from an image's grid to 1 mm voxels that start at the same corner, and back."""

    size: tuple[int, ...]
    """Of the image."""
    affine: FloatArray
    """Of the image, float64."""
    fine_size: tuple[int, ...]
    """At 1 mm."""
    fine_affine: FloatArray
    """At 1 mm, float32."""

    @classmethod
    def of(cls, grid: Grid) -> ResampleTo1Mm:
        """Make it for a DWI grid. Raises InputRefused if the 1 mm grid would be larger than any brain needs."""
        affine = grid.affine_ras
        fine = _zoomed(affine, SPACING_MM)
        size = _fine_size(grid.size, affine, fine)
        if is_too_large(size, MAX_NETWORK_VOXELS):
            raise InputRefused(
                "the image is too large at the voxel size of a member",
                found=f"{' x '.join(map(str, size))} voxels of 1 mm; {describe_size_limit(MAX_NETWORK_VOXELS)}",
                do="check that its header is in mm and that it shows one head; or run only the other members (--members A,B)",
            )
        return cls(grid.size, affine, size, fine.astype(np.float32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (C, X, Y, Z) at 1 mm, float32."""
        return _resampled(images, self.affine.astype(np.float32), self.fine_affine, self.fine_size)

    def back(self, answers: torch.Tensor) -> torch.Tensor:
        """Resample network outputs (C, X, Y, Z) at 1 mm back to the image's grid, float32."""
        spacing = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        affine = _zoomed(self.fine_affine.astype(np.float64), spacing).astype(np.float32)
        return _resampled(answers, self.fine_affine, affine, self.size)


def normalise_channels(images: torch.Tensor) -> torch.Tensor:
    """Return each channel (C, X, Y, Z) with zero mean and unit (population) deviation over its nonzero voxels; zeros stay 0."""
    result = images.clone()
    for image in result:
        inside = image != 0
        values = image[inside]
        if values.numel():
            mean, deviation = values.mean().item(), values.std(unbiased=False).item()
            image[inside] = (values - mean) / (deviation or 1.0)
    return result


def _zoomed(affine: FloatArray, spacing: FloatArray | tuple[float, ...]) -> FloatArray:
    """Return the affine (4, 4) with another spacing, without shear, and the same first voxel."""
    matrix = affine[:3, :3]
    scales = np.linalg.cholesky(matrix.T @ matrix).T
    rotation = matrix @ np.linalg.inv(scales)
    zoomed = np.eye(4)
    zoomed[:3, :3] = rotation @ np.diag(np.sign(np.diag(scales)) * np.abs(np.asarray(spacing, float)))
    zoomed[:3, 3] = affine[:3, 3]
    return zoomed


def _fine_size(size: tuple[int, ...], affine: FloatArray, fine: FloatArray) -> tuple[int, ...]:
    """Return the number of voxels that covers the image's outermost voxel centres."""
    ends = np.array(np.meshgrid(*[(0.0, n - 1.0) for n in size], indexing="ij")).reshape(3, -1)
    corners = affine @ np.concatenate([ends, np.ones_like(ends[:1])])
    centred = np.linalg.inv(np.block([[fine[:3, :3], np.zeros((3, 1))], [np.eye(4)[3:]]])) @ corners
    return tuple(int(n) for n in np.round(np.ptp(centred[:3], axis=1) + 1.0))


def _resampled(images: torch.Tensor, source: FloatArray, target: FloatArray, size: tuple[int, ...]) -> torch.Tensor:
    """Resample images (C, X, Y, Z) from one affine to another, both float32: linear, with edge voxels repeated outside."""
    there = tuple(images.shape[1:])
    if there == tuple(size) and np.allclose(source, target, atol=_SAME):
        return images.float()
    steps = _solved(source, target).astype(np.float32)
    if there == tuple(size) and np.allclose(steps, np.eye(4), atol=_SAME):
        return images.float()
    theta = _unit(there) @ torch.from_numpy(steps.astype(np.float64)) @ torch.inverse(_unit(size))
    order = [2, 1, 0]
    theta[:3] = theta[order]
    theta[:, :3] = theta[:, order]
    positions = functional.affine_grid(theta[None, :3], [1, len(images), *size], align_corners=False)
    return functional.grid_sample(
        images[None].double(), positions, mode="bilinear", padding_mode="border", align_corners=False
    )[0].float()


def _solved(matrix: FloatArray, right: FloatArray) -> FloatArray:
    """Solve matrix X = right for X (4, 4) as LAPACK's `dgetf2` and `dtrsm` do without fused multiply-add.

    numpy's answer depends on the processor: its last digit, here some 1e-18, decides whether voxels beside a stripped brain are 0.
    """
    lower, answers = matrix.astype(float).tolist(), right.astype(float).tolist()
    rows = range(len(lower))
    for k in rows:
        pivot = max(rows[k:], key=lambda i: abs(lower[i][k]))
        lower[k], lower[pivot] = lower[pivot], lower[k]
        answers[k], answers[pivot] = answers[pivot], answers[k]
        reciprocal = 1 / lower[k][k]
        for i in rows[k + 1 :]:
            lower[i][k] *= reciprocal
            for j in rows[k + 1 :]:
                lower[i][j] -= lower[i][k] * lower[k][j]
            for column in rows:
                answers[i][column] -= lower[i][k] * answers[k][column]
    for k in reversed(rows):
        for column in rows:
            answers[k][column] /= lower[k][k]
            for i in rows[:k]:
                answers[i][column] -= lower[i][k] * answers[k][column]
    return np.array(answers)


def _unit(size: tuple[int, ...]) -> torch.Tensor:
    """Return the matrix (4, 4) from voxel indices to -1 ... 1 between the outer faces of the outermost voxels."""
    lengths = torch.tensor(size, dtype=torch.float64)
    matrix = torch.diag(torch.cat([2.0 / lengths, torch.ones(1, dtype=torch.float64)]))
    matrix[:3, 3] = 1.0 / lengths - 1.0
    return matrix
