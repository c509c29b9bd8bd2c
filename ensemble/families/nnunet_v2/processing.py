"""nnU-Net v2's pre- and postprocessing on plain arrays.

Order of steps as in nnunetv2's DefaultPreprocessor: transpose, crop to what is not zero, normalise, resample; and back: resample
logits, softmax, paste into background, transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ensemble.families.cropping import CropResampleGeometry, bounding_box, nonzero_region
from ensemble.families.nnunet_v2.plans import NnunetV2Plans, Normalisation
from ensemble.geometry import Triple
from ensemble.types import BoolArray, FloatArray

#: Smallest standard deviation or maximum that nnU-Net divides by.
EPSILON = 1e-8


def preprocess(
    images: FloatArray, spacing_zyx_mm: Triple, plans: NnunetV2Plans
) -> tuple[FloatArray, CropResampleGeometry]:
    """Crop, normalise and resample images (channels, z, y, x), in the network's axis order. Also return the geometry.

    Returns the float32 array (channels, a, b, c) and the way back. The images are left as they are.
    Raises ValueError when a channel's values can't be what its normalisation expects.
    """
    order = plans.transpose_forward
    transposed = images.transpose(0, *[axis + 1 for axis in order])
    spacing = _in_order(spacing_zyx_mm, order)
    # 2-D networks keep the spacing between slices
    target: Triple = (spacing[0], *plans.spacing_mm) if plans.dims == 2 else plans.spacing_mm  # type: ignore[assignment]
    region = nonzero_region(transposed)
    box = bounding_box(region)
    cropped = np.stack(
        [
            normalise_channel(image[box], region[box], normalisation)
            for image, normalisation in zip(transposed, plans.normalisation, strict=True)
        ]
    )
    placement = CropResampleGeometry(region.shape, box, spacing, target, order)
    return placement.to_network(cropped, plans.resample_image), placement


def postprocess(logits: FloatArray, placement: CropResampleGeometry, plans: NnunetV2Plans) -> FloatArray:
    """Return the probability (z, y, x) of the lesion classes on the image's grid, float32, from logits (classes, a, b, c).

    nnU-Net resamples logits, then applies softmax.
    """
    resampling = plans.resample_logits
    if len(logits) == 2 and resampling.order <= 1 and resampling.order_z <= 1:
        # with two classes and linear resampling the difference of the logits is sufficient, at half the cost
        margin = placement.from_network(logits[1:] - logits[:1], resampling)[0]
        return placement.paste(_sigmoid(margin))
    probabilities = _softmax(placement.from_network(logits, resampling))
    return placement.paste(probabilities[list(plans.lesion_classes)].sum(0))


def normalise_channel(image: FloatArray, region: BoolArray, normalisation: Normalisation) -> FloatArray:
    """Return one channel (z, y, x) float32 normalised as the plans say; `region` is where the images are nonzero."""
    return _SCHEMES[normalisation.scheme](
        image.astype(np.float32), region if normalisation.use_mask else None, normalisation.intensities
    )


def _z_score(image: FloatArray, region: BoolArray | None, _: Mapping[str, float]) -> FloatArray:
    where = slice(None) if region is None else region
    values = image[where]
    image[where] = (values - values.mean()) / max(values.std(), EPSILON)
    return image


def _ct(image: FloatArray, _: BoolArray | None, training: Mapping[str, float]) -> FloatArray:
    clipped = np.clip(image, training["percentile_00_5"], training["percentile_99_5"])
    return ((clipped - training["mean"]) / max(training["std"], EPSILON)).astype(np.float32)


def _untouched(image: FloatArray, _: BoolArray | None, __: Mapping[str, float]) -> FloatArray:
    return image


def _rescale(image: FloatArray, _: BoolArray | None, __: Mapping[str, float]) -> FloatArray:
    image = image - image.min()
    return image / max(image.max(), EPSILON)


def _rgb(image: FloatArray, _: BoolArray | None, __: Mapping[str, float]) -> FloatArray:
    if image.min() < 0 or image.max() > 255:
        raise ValueError(f"normalised as 8-bit colour, but values run from {image.min():g} to {image.max():g}")
    return image / np.float32(255)


#: nnU-Net's normalisation classes. Each takes a float32 copy that it may change, the region (None: everywhere), and statistics.
_SCHEMES: dict[str, Callable[[FloatArray, BoolArray | None, Mapping[str, float]], FloatArray]] = {
    "ZScoreNormalization": _z_score,
    "CTNormalization": _ct,
    "NoNormalization": _untouched,
    "RescaleTo01Normalization": _rescale,
    "RGBTo01Normalization": _rgb,
}


def _in_order(values: Triple, order: tuple[int, int, int]) -> Triple:
    return values[order[0]], values[order[1]], values[order[2]]


def _sigmoid(margin: FloatArray) -> FloatArray:
    from scipy.special import expit

    probability: FloatArray = expit(margin)
    return probability


def _softmax(logits: FloatArray) -> FloatArray:
    """Compute the softmax over the first axis."""
    exponentials = np.exp(logits - logits.max(axis=0))
    return exponentials / exponentials.sum(axis=0)
