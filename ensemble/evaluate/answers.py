"""Score the answers of a reader study, unblinded by its key."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from ensemble import __version__
from ensemble.errors import InputRefused
from ensemble.evaluate.compare import PairedComparison, compare_pair, correct_p_values
from ensemble.evaluate.intervals import fleiss_kappa, interval_ends, proportion_interval
from ensemble.evaluate.output_files import refuse_overwriting_other_files, sibling_path, write_csv
from ensemble.files import cannot_open_error, read_json
from ensemble.outputs.report.parts import page_script, page_template
from ensemble.outputs.report.run_report import RESEARCH_USE, TOOL
from ensemble.publish import publish, write_json
from ensemble.tables import quote_names, read_table
from ensemble.text import replace_undecodable, replace_undecodable_in_json

log = logging.getLogger(__name__)

SCHEMA = 1
MAJORITY, EVERYBODY = "majority of the readers", "all answers"
GRADES = ("completeness", "precision")
_SIDES = ("left", "right")
_COLUMNS = ("study", "reader", "item", "preference", *(f"{side}_{grade}" for side in _SIDES for grade in GRADES))
_CHOICES = ("left", "equal", "right")
_GRADE_VALUES = ("1", "2", "3", "4", "5")


@dataclass(frozen=True)
class Preference:
    """How often a reader preferred each of two methods."""

    reader: str
    """A reader, the majority of the readers of each case, or all answers together."""
    first: str
    second: str
    answers: int
    first_better: int
    equal: int
    second_better: int
    share: float | None
    """Of the answers that prefer either, those that prefer the first."""
    ci_low: float | None
    """Exact binomial 95 % interval; none of all answers together, since readers judge the same cases."""
    ci_high: float | None
    p: float | None
    """Exact binomial test against one half, two-sided."""
    note: str = ""


@dataclass(frozen=True)
class GradeSummary:
    """The grades of one method, from 1 (poor) to 5 (excellent)."""

    grade: str
    method: str
    reader: str
    """A reader, or all answers together."""
    n: int
    mean: float
    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class _Answer:
    """One reader's answer for one case, by method."""

    reader: str
    case: int
    preference: str
    """The method that is better, `equal`, or nothing where it was not answered."""
    grades: Mapping[tuple[str, str], int]
    """By grade and method; without what was not answered."""


def score_answers(files: Sequence[Path], key: Path, out: Path) -> None:
    """Unblind the answers of a reader study. Writes preferences to `<out>`; beside it the grades, all results as JSON, and a page.

    Raises InputRefused for answers to another study, repeated answers, or invalid values.
    """
    tables = {
        out: _names(Preference),
        sibling_path(out, "grades.csv"): _names(GradeSummary),
        sibling_path(out, "grade_differences.csv"): _names(PairedComparison),
    }
    data_path, page_path = sibling_path(out, "readers.json"), sibling_path(out, "readers.html")
    refuse_overwriting_other_files(tables, data_path, page_path)
    study = _read_key(key)
    answers = [answer for readers in _read_all(files, study).values() for answer in readers]
    data = _found(study, answers)
    rows = (data["preferences"], data["grades"], data["grade_differences"])
    with publish(out.parent) as staging:
        for (path, columns), own in zip(tables.items(), rows, strict=True):
            write_csv(staging / path.name, columns, own)
        write_json(replace_undecodable_in_json(data), staging / data_path.name)
        page = page_template("answers.html").render(data=data, **page_script())
        (staging / page_path.name).write_text(replace_undecodable(page), encoding="utf-8")
    for row in data["preferences"]:
        told = "" if row["ci_low"] is None else f" [{row['ci_low']:.0%}, {row['ci_high']:.0%}]"
        share = (
            "no reader prefers one of the methods"
            if row["share"] is None
            else f"{row['share']:.0%}{told} prefer {row['first']}"
        )
        counts = row["first_better"], row["equal"], row["second_better"]
        log.info("%s: %s (%d better, %d equal, %d worse)", row["reader"], share, *counts)
    for note in data["notes"]:
        log.info("note: %s", note)
    log.info(
        "written: %s", ", ".join((str(out), *(path.name for path in [*tables][1:]), data_path.name, page_path.name))
    )


def _names(row: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(row))


def _found(study: Mapping[str, Any], answers: Sequence[_Answer]) -> dict[str, Any]:
    """Return all results as data; the schema is docs/readers.schema.json."""
    first, second = study["methods"]
    readers = list(dict.fromkeys(answer.reader for answer in answers))
    notes = []
    for reader in readers:
        own = [answer for answer in answers if answer.reader == reader]
        complete = sum(bool(answer.preference) and len(answer.grades) == 4 for answer in own)
        if complete < len(study["items"]):
            notes.append(f"{reader} answered all questions for {complete} of {len(study['items'])} cases")
    preferences = [
        _preference(reader, (first, second), [a.preference for a in answers if a.reader == reader])
        for reader in readers
    ]
    if len(readers) > 1:
        preferences += [
            _preference(MAJORITY, (first, second), _majorities(answers)),
            _preference(EVERYBODY, (first, second), [answer.preference for answer in answers]),
        ]
    kappa, judged, why = _agreement(answers, len(readers), (first, "equal", second))
    return {
        "schema": SCHEMA,
        "tool": {"name": TOOL, "version": __version__},
        "notice": RESEARCH_USE,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "study": study["study"],
        "methods": [first, second],
        "readers": readers,
        "cases": len(study["items"]),
        "notes": notes,
        "preferences": [asdict(row) for row in preferences],
        "fleiss_kappa": kappa,
        "fleiss_kappa_cases": judged,
        "fleiss_kappa_note": why,
        "grades": [asdict(row) for row in _grades(answers, (first, second), readers)],
        "grade_differences": [asdict(row) for row in _grade_differences(answers, (first, second))],
    }


def _preference(reader: str, names: tuple[str, str], given: Sequence[str]) -> Preference:
    wins, equal, losses = (given.count(one) for one in (names[0], "equal", names[1]))
    decided = wins + losses
    note = "" if decided else "no answer prefers one of the methods"
    interval, p = proportion_interval(wins, decided), float(binomtest(wins, decided).pvalue) if decided else None
    if reader == EVERYBODY and decided:
        interval, p, note = None, None, "all readers judge the same cases: the interval is that of the majority answers"
    share = wins / decided if decided else None
    return Preference(
        reader, *names, wins + equal + losses, wins, equal, losses, share, *interval_ends(interval), p, note
    )


def _majorities(answers: Sequence[_Answer]) -> list[str]:
    """Return the majority answer for each case: the method that more readers prefer, else equal."""
    said = []
    for case in dict.fromkeys(answer.case for answer in answers):
        given = [answer.preference for answer in answers if answer.case == case and answer.preference]
        often = sorted(((given.count(one), one) for one in set(given) - {"equal"}), reverse=True)
        tied = not often or (len(often) > 1 and often[0][0] == often[1][0])
        said += ["equal" if tied else often[0][1]] * bool(given)
    return said


def _agreement(answers: Sequence[_Answer], readers: int, choices: Sequence[str]) -> tuple[float | None, int, str]:
    """Return Fleiss' kappa of the preferences over the cases that all readers judged, their number, and the reason if there is none."""
    counts = []
    for case in dict.fromkeys(answer.case for answer in answers):
        given = [answer.preference for answer in answers if answer.case == case and answer.preference]
        if len(given) == readers:
            counts.append([given.count(choice) for choice in choices])
    if readers < 2:
        return None, len(counts), "there is one reader"
    kappa = fleiss_kappa(np.array(counts).reshape(-1, len(choices)))
    why = "fewer than two cases were judged by all readers" if len(counts) < 2 else "all answers are the same"
    return kappa, len(counts), why if kappa is None else ""


def _grades(answers: Sequence[_Answer], names: Sequence[str], readers: Sequence[str]) -> list[GradeSummary]:
    rows = []
    for grade in GRADES:
        for method in names:
            for reader in (*readers, *([EVERYBODY] if len(readers) > 1 else [])):
                given = [
                    answer.grades[grade, method]
                    for answer in answers
                    if reader in (answer.reader, EVERYBODY) and (grade, method) in answer.grades
                ]
                if given:
                    q1, median, q3 = (float(q) for q in np.quantile(given, (0.25, 0.5, 0.75)))
                    rows.append(GradeSummary(grade, method, reader, len(given), float(np.mean(given)), median, q1, q3))
    return rows


def _grade_differences(answers: Sequence[_Answer], names: tuple[str, str]) -> list[PairedComparison]:
    """Compare the grades of both methods case by case: the mean over the readers who graded both."""
    rows = []
    for grade in GRADES:
        both: dict[int, list[tuple[int, int]]] = {}
        for answer in answers:
            if all((grade, name) in answer.grades for name in names):
                pair = answer.grades[grade, names[0]], answer.grades[grade, names[1]]
                both.setdefault(answer.case, []).append(pair)
        if both:
            means = np.array([np.mean(pairs, axis=0) for pairs in both.values()])
            rows.append(compare_pair(grade, names, means[:, 0], means[:, 1], larger_is_better=True))
    return correct_p_values(rows)


def _read_key(path: Path) -> dict[str, Any]:
    """Read the key that `write_reader_study` wrote. Raises InputRefused."""
    try:
        key: dict[str, Any] = read_json(path)
        methods = [str(name) for name in key["methods"]]
        sides = all({item["left"], item["right"]} == set(methods) and item["item"] for item in key["items"])
        if key["tool"]["name"] == TOOL and key["study"] and len(set(methods)) == 2 and sides and key["items"]:
            return key
    except OSError as error:
        raise cannot_open_error("the key", path, error) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise InputRefused(
        "the file is not the key of a reader study",
        where=path,
        found="no JSON, or JSON without the study, methods and items of a key",
        do="give as --key the .json file that was written together with the reader-study page (.html)",
    )


def _read_all(files: Sequence[Path], study: Mapping[str, Any]) -> dict[str, list[_Answer]]:
    """Read the answers of all files, by reader. Raises InputRefused if one reader is in two files."""
    found: dict[str, list[_Answer]] = {}
    origin: dict[str, Path] = {}
    for path in files:
        own: dict[str, list[_Answer]] = {}
        for answer in _read(path, study):
            own.setdefault(answer.reader, []).append(answer)
        for reader in own:
            if (alike := next((one for one in origin if one.casefold() == reader.casefold()), None)) is not None:
                raise InputRefused(
                    "two answer files of the reader study have the same reader",
                    where=path,
                    found=f"{reader!r}, also in {origin[alike]}",
                    do="give only the file that this reader saved last; if two readers share the name, rename one in the column 'reader'",
                )
            if reader in (MAJORITY, EVERYBODY):
                raise InputRefused(
                    "a reader has a name that is reserved for the tables of results",
                    where=path,
                    found=repr(reader),
                    do="rename the reader in the column 'reader'",
                )
        origin |= dict.fromkeys(own, path)
        found |= own
    return found


def _read(path: Path, study: Mapping[str, Any]) -> list[_Answer]:
    """Read the answers of a file. Raises InputRefused."""
    try:
        sheet = read_table(path, "the answer file of the reader study")
    except OSError as error:
        raise cannot_open_error("the answer file of the reader study", path, error) from error
    columns = [heading.lower() for heading in sheet.headings]
    missing = [name for name in _COLUMNS if name not in columns]
    if wrong_columns := missing or [name for name in _COLUMNS if columns.count(name) > 1]:
        raise InputRefused(
            f"the answer file of the reader study {'lacks columns' if missing else 'has a column twice'}",
            where=path,
            found=quote_names(wrong_columns),
            do="give the .csv file as the reader-study page saved it, unchanged",
        )
    places = {name: columns.index(name) for name in _COLUMNS}
    items = {item["item"]: (number, item) for number, item in enumerate(study["items"])}
    answers, seen = [], set()
    for line, cells in sheet.rows:
        row = {name: cells[place] if place < len(cells) else "" for name, place in places.items()}
        wrong = ""
        if row["study"] != study["study"]:
            wrong = "belongs to a different study from the key"
        elif row["item"] not in items:
            wrong = "names an item that is not in the key"
        elif not row["reader"]:
            wrong = "has no reader"
        elif (row["reader"].casefold(), row["item"]) in seen:
            wrong = "repeats an answer"
        elif row["preference"] not in ("", *_CHOICES):
            wrong = "has an invalid preference"
        elif bad := [name for name in _COLUMNS[4:] if row[name] not in ("", *_GRADE_VALUES)]:
            wrong = f"has an invalid grade in the column {bad[0]!r}"
        if wrong:
            raise InputRefused(
                f"a row in an answer file of the reader study {wrong}",
                where=f"{path}, line {line}",
                found=" | ".join(cells),
                do="give the .csv file as the reader-study page saved it, unchanged, with the key of the same study",
            )
        seen.add((row["reader"].casefold(), row["item"]))
        number, item = items[row["item"]]
        grades = {
            (grade, item[side]): int(cell) for side in _SIDES for grade in GRADES if (cell := row[f"{side}_{grade}"])
        }
        preference = (
            item.get(row["preference"], row["preference"]) if row["preference"] in _SIDES else row["preference"]
        )
        answers.append(_Answer(row["reader"], number, preference, grades))
    if not answers:
        raise InputRefused(
            "the answer file of the reader study has no answers",
            where=path,
            found="no row below the column names",
            do="give the .csv file that the reader-study page saved",
        )
    return answers
