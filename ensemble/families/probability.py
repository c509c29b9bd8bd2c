"""Convert the softmax of two classes to a lesion probability for fusion."""

from __future__ import annotations

import numpy as np

from ensemble.types import FloatArray

_JUST_ABOVE_HALF = np.nextafter(np.float32(0.5), np.float32(1))


def lesion_probability_from_softmax(softmax: FloatArray) -> FloatArray:
    """Return the lesion class (a, b, c), float32, of the mean softmax (background and lesion, a, b, c).

    It is above 0.5 exactly where lesion is likelier than background: rounding and interpolation leave sums that are not quite 1.
    """
    background, lesion = softmax
    total = background + lesion
    share = np.divide(lesion, total, out=np.zeros_like(lesion), where=total > 0)
    return np.where(lesion > background, np.maximum(share, _JUST_ABOVE_HALF), np.minimum(share, np.float32(0.5)))
