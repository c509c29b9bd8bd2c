"""Choose one image per modality by the names of the files; docs/batch.md has the rule. If the names do not decide, none is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ensemble.batch.layouts import FoundImage
from ensemble.readers.b_values import USUAL_B
from ensemble.types import Modality


@dataclass(frozen=True)
class ChosenImages:
    """The images chosen for a case."""

    taken: Mapping[Modality, FoundImage]
    undecided: Mapping[Modality, Sequence[FoundImage]]
    """Modalities with several images among which the names do not decide."""
    notes: Mapping[Modality, str]
    """Which image was chosen from which candidates."""


def choose_images(images: Sequence[FoundImage]) -> ChosenImages:
    """Choose one image per modality; acquired images are preferred to derived ones.

    Beside an ADC, the trace or the DWI of b = 1000 is preferred; of several runs, the last one that has both.
    """
    given = {modality: [image for image in images if image.modality is modality] for modality in Modality}
    with_adc = bool(given[Modality.ADC])
    best = {modality: _best(several, with_adc=with_adc) for modality, several in given.items() if several}
    pair = [best[modality] for modality in (Modality.DWI, Modality.ADC) if modality in best]
    if any(len(several) > 1 for several in pair):
        last = _last_common_run(pair)
        for modality in (Modality.DWI, Modality.ADC):
            if last is not None and modality in best:
                best[modality] = [image for image in best[modality] if image.run == last]
    if len(best.get(Modality.FLAIR, ())) > 1 and (last := _last_common_run([best[Modality.FLAIR]])) is not None:
        best[Modality.FLAIR] = [image for image in best[Modality.FLAIR] if image.run == last]
    return ChosenImages(
        {modality: several[0] for modality, several in best.items()},
        {modality: several for modality, several in best.items() if len(several) > 1},
        {
            modality: f"{modality.label}: {several[0].path.name} is used, not "
            + ", ".join(sorted(other.path.name for other in given[modality] if other is not several[0]))
            for modality, several in best.items()
            if len(several) == 1 < len(given[modality])
        },
    )


def _best(images: Sequence[FoundImage], *, with_adc: bool) -> list[FoundImage]:
    """Return the images of one modality to which no other one is preferred."""

    def rank(image: FoundImage) -> tuple[object, ...]:
        if (
            image.modality is not Modality.DWI or not with_adc
        ):  # a DWI of more volumes may be what an ADC is computed of
            return (image.derived,)
        told = image.b is not None or image.trace
        return image.derived, not told, abs(image.b - USUAL_B) if image.b is not None else 0.0, not image.trace

    ranks = [rank(image) for image in images]
    first = min(ranks)
    return [image for image, its in zip(images, ranks, strict=True) if its == first]


def _last_common_run(modalities: Sequence[Sequence[FoundImage]]) -> int | None:
    """Return the highest run that has exactly one image of each modality; None if images differ in more than the run."""
    runs: list[set[int]] = []
    for images in modalities:
        numbers = [image.run for image in images]
        if None in numbers or len(set(numbers)) < len(images) or len({image.without_run for image in images}) > 1:
            return None
        runs.append({number for number in numbers if number is not None})
    common = set.intersection(*runs)
    return max(common) if common else None
