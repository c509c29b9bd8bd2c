"""What an evaluation reports beyond one method's table: comparisons, clinical scores and subgroups; as JSON, tables and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from ensemble import __version__
from ensemble.evaluate.blinded import ReaderStudyRequest
from ensemble.evaluate.clinical import (
    ClinicalTable,
    Correlation,
    CorrelationDifference,
    check_case_names,
    correlate_with_scores,
    read_clinical_table,
    select_group_columns,
)
from ensemble.evaluate.compare import MethodRank, PairedComparison, Ranking, compare_methods, rank_methods
from ensemble.evaluate.methods import Method
from ensemble.evaluate.output_files import sibling_path, write_csv
from ensemble.evaluate.scores import MEASURES
from ensemble.evaluate.statistics import MeasureSummary
from ensemble.evaluate.study_plots import draw_correlation_plots, draw_difference_plot, draw_forest_plots
from ensemble.evaluate.subgroups import LESION_NUMBER, LESION_SIZE, GroupSummary, GroupTest, summarise_subgroups
from ensemble.outputs.report.parts import page_script, page_template
from ensemble.outputs.report.run_report import RESEARCH_USE, TOOL
from ensemble.publish import write_json
from ensemble.text import replace_undecodable, replace_undecodable_in_json

#: Increased when a field changes its meaning or is removed, not when one is added (docs/study.schema.json).
SCHEMA = 1


@dataclass(frozen=True)
class StudyRequest:
    """What an evaluation is to report besides the table of measures."""

    clinical: Path | None = None
    by: tuple[str, ...] = ()
    readers: ReaderStudyRequest | None = None

    @property
    def anything(self) -> bool:
        """Whether study outputs were requested."""
        return self.clinical is not None or bool(self.by)


@dataclass(frozen=True)
class StudyResults:
    """All results of comparing methods on the same cases."""

    truth: Path
    methods: Sequence[Method]
    summaries: Mapping[str, Sequence[MeasureSummary]]
    """By method."""
    paired: list[PairedComparison]
    ranking: Ranking | None
    clinical: ClinicalTable | None
    correlations: list[Correlation]
    differences: list[CorrelationDifference]
    groups: list[GroupSummary]
    group_tests: list[GroupTest]
    notes: list[str]

    @property
    def tables(self) -> dict[str, Sequence[Any]]:
        """The rows of the tables that are written as files of their own, by the suffix of the file name (see TABLES)."""
        return {
            "paired": self.paired,
            "ranking": self.ranking.rows if self.ranking else [],
            "clinical": self.correlations,
            "clinical_differences": self.differences,
            "groups": self.groups,
            "group_tests": self.group_tests,
        }


#: Columns of each table by what ends the name of its file.
TABLES = {
    name: tuple(field.name for field in fields(row))
    for name, row in {
        "paired": PairedComparison,
        "ranking": MethodRank,
        "clinical": Correlation,
        "clinical_differences": CorrelationDifference,
        "groups": GroupSummary,
        "group_tests": GroupTest,
    }.items()
}
PAGE, DATA = "study.html", "study.json"


def make_study(
    methods: Sequence[Method],
    summaries: Sequence[Sequence[MeasureSummary]],
    truth: Path,
    request: StudyRequest,
    clinical: ClinicalTable | None,
) -> StudyResults:
    """Compare methods, and relate them to clinical scores and groups.

    Raises InputRefused if cases of the clinical table and the masks do not match, UsageError for an unknown group.
    """
    names = list({path: one.case for method in methods for path, one in method.scores.items()}.values())
    notes = _left_out(methods)
    rows: list[Correlation] = []
    differences: list[CorrelationDifference] = []
    if clinical is not None and request.clinical is not None:
        notes += [
            *check_case_names(clinical, names, request.clinical, truth),
            *clinical.notes,
            *_without_score(clinical, names),
        ]
        rows, differences = correlate_with_scores(methods, clinical)
    columns = select_group_columns(clinical, requested_columns(request.by), request.clinical)
    groups, tests, said = summarise_subgroups(methods, columns) if request.by else ([], [], [])
    return StudyResults(
        truth,
        methods,
        {method.name: own for method, own in zip(methods, summaries, strict=True)},
        compare_methods(methods),
        rank_methods(methods),
        clinical,
        rows,
        differences,
        groups,
        tests,
        notes + said,
    )


def read_and_check_request(request: StudyRequest) -> ClinicalTable | None:
    """Read the clinical table and check the grouping columns, before any mask is read. Raises InputRefused, UsageError."""
    clinical = None if request.clinical is None else read_clinical_table(request.clinical, request.by)
    select_group_columns(clinical, requested_columns(request.by), request.clinical)
    return clinical


def requested_columns(by: Sequence[str]) -> list[str]:
    """Return which of the requested groups are table columns; lesion size and number are not."""
    return [name for name in by if name.lower() not in (LESION_SIZE, LESION_NUMBER)]


def write_study(study: StudyResults, out: Path) -> list[str]:
    """Write tables, JSON and page beside the table of measures. Returns their names."""
    written = {}
    for name, rows in study.tables.items():
        if rows:
            written[name] = sibling_path(out, f"{name}.csv")
            write_csv(written[name], TABLES[name], map(asdict, rows))
    data = as_json(study)
    write_json(replace_undecodable_in_json(data), sibling_path(out, DATA))
    sibling_path(out, PAGE).write_text(_page(study, data), encoding="utf-8")
    return [path.name for path in (*written.values(), sibling_path(out, DATA), sibling_path(out, PAGE))]


def as_json(study: StudyResults) -> dict[str, Any]:
    """Return all results as data; the schema is docs/study.schema.json."""
    return {
        "schema": SCHEMA,
        "tool": {"name": TOOL, "version": __version__},
        "notice": RESEARCH_USE,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "truth": str(study.truth),
        "methods": [
            {
                "name": method.name,
                "path": str(method.path),
                "measured": len(method.scores),
                "not_measured": [
                    {"case": method.pairs[path].case, "why": " ".join(str(error).split())}
                    for path, error in method.refused.items()
                ],
                "without_truth": list(method.without_truth),
            }
            for method in study.methods
        ],
        "notes": study.notes,
        "cases": [{"method": method.name} | asdict(one) for method in study.methods for one in method.scores.values()],
        "summary": [{"method": name} | asdict(row) for name, summaries in study.summaries.items() for row in summaries],
        "ranking_kendall_tau": study.ranking and study.ranking.kendall_tau,
    } | {name: [asdict(row) for row in rows] for name, rows in study.tables.items()}


def _left_out(methods: Sequence[Method]) -> list[str]:
    """Return messages about the cases that a method lacks, and the cases that no two methods share."""
    notes = []
    for method in methods:
        if missing := [method.pairs[path].case for path in method.refused]:
            last = "; it is ranked last there, and these cases are not compared" if len(methods) > 1 else ""
            notes.append(f"{method.name} was not measured in {len(missing)} cases: {', '.join(missing)}{last}")
        if method.without_truth:
            notes.append(f"{method.name}: skipped, because they have no true mask: {', '.join(method.without_truth)}")
    notes += [
        f"{first.name} and {second.name} have no case in common and are not compared"
        for first, second in combinations(methods, 2)
        if not set(first.scores) & set(second.scores)
    ]
    return notes


def _without_score(clinical: ClinicalTable, names: Sequence[str]) -> list[str]:
    missing = {
        score: [name for name in names if name in clinical.cases and name not in known]
        for score, known in clinical.scores.items()
    }
    return [f"{score} is missing for: {', '.join(cases)}" for score, cases in missing.items() if cases]


def _page(study: StudyResults, data: Mapping[str, Any]) -> str:
    figures = {
        "differences": draw_difference_plot(study.paired),
        "clinical": draw_correlation_plots(study.methods, study.clinical, study.correlations),
        "groups": draw_forest_plots(study.groups),
    }
    text: str = page_template("study.html").render(
        data=data, names=[method.name for method in study.methods], measures=MEASURES, figures=figures, number=_number, **page_script()
    )  # fmt: skip
    return replace_undecodable(text)


def _number(value: Any) -> str:
    """Return a number as the page's tables show it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"
    return str(value)
