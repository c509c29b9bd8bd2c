"""Measure several methods against one set of true masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ensemble.errors import InputRefused, UsageError
from ensemble.evaluate.pairs import MaskPair, find_pairs
from ensemble.evaluate.scores import Score, score_pair
from ensemble.readers.names import stem
from ensemble.text import escape_invisible, replace_undecodable

#: Name of the true masks in tables of several methods.
TRUTH = "true masks"


@dataclass(frozen=True)
class Method:
    """The masks of one method, and their measures."""

    name: str
    path: Path
    pairs: Mapping[Path, MaskPair]
    """By true mask, as all that follows."""
    scores: Mapping[Path, Score]
    refused: Mapping[Path, InputRefused]
    """Why a case can't be measured."""
    without_truth: tuple[str, ...]
    """Predictions that no true mask belongs to."""


def measure_methods(predictions: Sequence[Path], truths: Path) -> list[Method]:
    """Measure every case of every method.

    Raises InputRefused if a method has no measurable case, UsageError as `method_names` does.
    """
    names = method_names(predictions)
    methods = []
    for name, path in zip(names, predictions, strict=True):
        found, without = find_pairs(path, truths, [other for other in predictions if other is not path])
        pairs = _told_apart(found, truths) if len(predictions) > 1 else found
        by_truth = {true: pair for pair in pairs for true in pair.truth}
        scores: dict[Path, Score] = {}
        refused: dict[Path, InputRefused] = {}
        for pair in pairs:
            try:
                scores[pair.truth[0]] = score_pair(pair)
            except InputRefused as error:
                refused |= dict.fromkeys(pair.truth, error)
        if not scores:
            raise next(iter(refused.values()))
        methods.append(Method(name, path, by_truth, scores, refused, tuple(without)))
    return methods


def method_names(predictions: Sequence[Path]) -> list[str]:
    """Name methods by their folders, with as many parent folders as needed to make the names unique.

    Raises UsageError if one path is given twice, or lies in another.
    """
    places = [path.resolve() for path in predictions]
    for place in places:
        twice = places.count(place) > 1
        if twice or any(place != other and place.is_relative_to(other) for other in places):
            raise UsageError(
                "a folder of predictions is given twice" if twice else "one folder of predictions contains another",
                found=", ".join(map(str, predictions)),
                do="give a separate folder for each method, and the true masks last",
            )
    parts = [(*place.parts[1:-1], stem(place) if place.is_file() else place.name) for place in places]
    taken = (TRUTH,)
    depth = next(deep for deep in range(1, 999) if len({taken, *(one[-deep:] for one in parts)}) > len(parts))
    return [replace_undecodable(escape_invisible("/".join(one[-depth:]))) for one in parts]


def _told_apart(pairs: Sequence[MaskPair], truths: Path) -> list[MaskPair]:
    """Name cases of equal name by the paths of their true masks, so that they are not confused."""
    often = Counter(pair.case for pair in pairs)
    places = [pair.truth[0].relative_to(truths).as_posix() if truths.is_dir() else pair.truth[0].name for pair in pairs]
    return [
        replace(pair, case=f"{pair.case} ({replace_undecodable(place)})") if often[pair.case] > 1 else pair
        for pair, place in zip(pairs, places, strict=True)
    ]
