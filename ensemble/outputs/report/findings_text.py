"""Findings as phrases and tables, for pages and closing lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ensemble.findings.types import Findings, StructureVolume, UncertainCategory, UncertainQuantity

_PATTERNS = {"none": "no lesion", "single": "single lesion", "scattered": "scattered lesions"}


@dataclass(frozen=True)
class FindingRow:
    """A row of the page's table of findings."""

    name: str
    ml: str
    share: str
    """With its range, in percent."""


@dataclass(frozen=True)
class FindingTable:
    """A table of findings under a heading."""

    heading: str
    lines: tuple[FindingRow, ...]
    remark: str = ""


def describe_findings(findings: Findings) -> Iterator[str]:
    """Yield the findings (where the lesions lie) as short phrases, the most important first."""
    yield _PATTERNS[findings.pattern.value]
    if findings.pattern.value == "none":
        return
    if findings.places is None:
        yield f"location unknown: {', '.join(findings.registered.problems)}"
        return
    if findings.places.side is not None:
        yield f"side {format_category(findings.places.side)}"
    leading = max(findings.places.structures, key=lambda amount: amount.ml.value)
    yield f"most in {leading.name}, {format_share(leading.share)}"
    for atlas in findings.atlases:
        if atlas.leading is not None:
            sides = (
                f" {format_category(atlas.leading_side)}"
                if atlas.leading_side is not None and atlas.leading_side.value
                else ""
            )
            yield f"{atlas.name}: {format_category(atlas.leading)}{sides}"


def format_category(choice: UncertainCategory | None) -> str:
    """Return a category and, in brackets, its alternatives."""
    if choice is None:
        return ""
    others = [word or "none" for word in choice.possible[1:]]
    return (choice.value or "none") + (f" (or {', '.join(others)})" if others else "")


def format_share(share: UncertainQuantity) -> str:
    """Return a share with its range: `62 % (55-70)`."""
    low, high = _hull(share)
    spread = f" ({100 * low:.0f}\N{EN DASH}{100 * high:.0f})" if round(100 * low) != round(100 * high) else ""
    return f"{100 * share.value:.0f} %{spread}"


def format_volume(volume: UncertainQuantity) -> str:
    """Return a volume with its range."""
    low, high = _hull(volume)
    text = f"{volume.value:.2f}"
    return text + (f" ({low:.2f}\N{EN DASH}{high:.2f})" if f"{low:.2f}" != f"{high:.2f}" else "")


def _hull(quantity: UncertainQuantity) -> tuple[float, float]:
    """Return minimum and maximum over members and perturbed placements."""
    ranges = [quantity.members, *([quantity.placement] if quantity.placement else [])]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def findings_tables(findings: Findings) -> tuple[FindingTable, ...]:
    """Return the tables of findings on the page: that of the built-in atlas first, then those of the user's label maps."""
    if findings.places is None or not findings.lesions:
        return ()
    found = [
        FindingTable(heading, tuple(map(_line, amounts)))
        for heading, amounts in (
            ("Sides", findings.places.sides),
            ("Regions", findings.places.regions),
            ("Structures", findings.places.structures),
        )
    ]
    for atlas in findings.atlases:
        groups = (*atlas.groups, *atlas.sided_groups) or atlas.labels
        remark = "; ".join(filter(None, (f"space: {atlas.space}", atlas.mismatch)))
        found.append(FindingTable(atlas.name, tuple(map(_line, groups)), remark))
        if atlas.aspects is not None:
            scores = tuple(
                FindingRow(
                    f"{score.side}: 10 \N{MINUS SIGN} {len(score.affected)}",
                    f"{score.score.value:.0f}",
                    ", ".join(score.affected),
                )
                for score in atlas.aspects.scores
            )
            found.append(
                FindingTable(
                    f"{atlas.name}: score (research)",
                    scores,
                    f"ten minus the number of regions with over {100 * atlas.aspects.share_above:.0f} % lesion; not a validated score",
                )
            )
    return tuple(found)


def _line(amount: StructureVolume) -> FindingRow:
    return FindingRow(amount.name, format_volume(amount.ml), format_share(amount.share))
