"""Studies: statistics against independent computations, coverage of intervals, tables as people save them, one page and its data."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.coverage import coverage
from conftest import GRID, REPOSITORY, tree, write_image
from ensemble.cli import main
from ensemble.errors import InputRefused, UsageError
from ensemble.evaluate.clinical import (
    ClinicalTable,
    check_case_names,
    correlate_with_scores,
    read_clinical_table,
    select_group_columns,
)
from ensemble.evaluate.compare import case_ranks, compare_methods, compare_pair, rank_methods
from ensemble.evaluate.intervals import (
    fleiss_kappa,
    holm_correction,
    kruskal_wallis,
    mean_interval,
    median_interval,
    proportion_interval,
    spearman,
    spearman_intervals,
    wilcoxon_p,
)
from ensemble.evaluate.methods import Method, method_names
from ensemble.evaluate.pairs import find_pairs
from ensemble.evaluate.scores import MEASURES, Score
from ensemble.evaluate.subgroups import summarise_subgroups
from ensemble.types import AnyArray
from json_schema import faults

SMALL = replace(GRID, size=(10, 12, 8))
HOSTILE = "<script>alert(1)</script> 张 $x_{$"


def scored(case: str, dice: float = 0.5, f1: float = 0.5, avd: float = 1.0, alcd: int = 1, **others: float) -> Score:
    given = {"truth_ml": 5.0, "predicted_ml": 4.0, "truth_lesions": 1, "predicted_lesions": 1} | others
    return Score(case, dice, f1, avd, alcd, **given, missed_lesions=0, false_lesions=0, lesions_ml=(), lesions_found=())  # type: ignore[arg-type]


def method(name: str, scores: Sequence[Score], refused: Sequence[str] = ()) -> Method:
    why = InputRefused("no mask")
    return Method(
        name, Path(name), {}, {Path(one.case): one for one in scores}, {Path(case): why for case in refused}, ()
    )


def drawn(name: str, n: int = 30, seed: int = 0, better: float = 0.0) -> Method:
    rng = np.random.default_rng(seed)
    return method(
        name,
        [
            scored(
                f"{k:03d}",
                float(np.clip(rng.beta(4, 2) + better, 0, 1)),
                round(float(rng.beta(3, 3)), 1),
                float(rng.lognormal()) * (1 - better),
                int(rng.poisson(2)),
                truth_ml=float(rng.lognormal(1, 1.5)),
                predicted_ml=float(rng.lognormal(1, 1.5)),
                truth_lesions=int(rng.poisson(2)) + 1,
                predicted_lesions=int(rng.poisson(2)),
            )
            for k in range(n)
        ],
    )


# Statistics against independent computations.


def test_intervals_and_corrections_agree_with_statsmodels() -> None:
    sm = pytest.importorskip("statsmodels.stats.api", reason="statsmodels is not installed (requirements-dev.txt)")
    from statsmodels.stats.inter_rater import fleiss_kappa as theirs
    from statsmodels.stats.multitest import multipletests

    rng = np.random.default_rng(3)
    for n in (3, 5, 12, 80):
        values = rng.gamma(2, size=n)
        assert mean_interval(values) == pytest.approx(sm.DescrStatsW(values).tconfint_mean())
        wins = (n + 1) // 3
        assert proportion_interval(wins, n) == pytest.approx(sm.proportion_confint(wins, n, method="beta"))
        p = rng.random(n) ** 3
        assert holm_correction([*p, None])[:-1] == pytest.approx(multipletests(p, method="holm")[1])
    assert proportion_interval(0, 5) == pytest.approx((0, 1 - 0.025 ** (1 / 5)))
    for raters in (2, 3, 7):
        counts = rng.multinomial(raters, (0.5, 0.3, 0.2), size=40)
        assert fleiss_kappa(counts) == pytest.approx(theirs(counts))
    assert holm_correction([None, None]) == [None, None]


@pytest.mark.parametrize("n", [3, 5, 6, 9, 20, 41])
def test_the_interval_of_a_median_holds_it_in_at_least_95_percent_and_is_the_narrowest(n: int) -> None:
    found = median_interval(np.random.default_rng(0).permutation(np.arange(1.0, n + 1)))
    outside = [sum(stats.binom.pmf(range(rank), n, 0.5)) for rank in range(n // 2 + 1)]
    allowed = [rank for rank, share in enumerate(outside) if share <= 0.025]
    assert found == ((max(allowed), n + 1 - max(allowed)) if max(allowed) else None)


def test_rank_tests_agree_with_independent_computations() -> None:
    rng = np.random.default_rng(5)
    for n in (5, 8, 60):
        x, y = rng.normal(size=n), np.round(rng.normal(size=n) * 2)
        rho, p = spearman(x, y) or (0, 0)
        assert rho == pytest.approx(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])
        if n < 30:
            exact = stats.permutation_test(
                (x,),
                lambda one, y=y: stats.spearmanr(one, y).statistic,
                permutation_type="pairings",
                n_resamples=2000,
                rng=1,
            )
            assert p == pytest.approx(exact.pvalue, abs=0.03)
        else:
            t = rho * np.sqrt((n - 2) / (1 - rho**2))
            assert p == pytest.approx(2 * stats.t.sf(abs(t), n - 2))
    for sizes in ((6, 9, 20), (2, 4, 3)):
        groups = [np.round(rng.normal(k, 1, size), 1) for k, size in enumerate(sizes)]
        h, p, source = kruskal_wallis(groups) or (0, 0, "")
        ranks = stats.rankdata(np.concatenate(groups))
        member = np.repeat(range(3), sizes)
        between = sum(size * (ranks[member == k].mean() - ranks.mean()) ** 2 for k, size in enumerate(sizes))
        assert h == pytest.approx((len(ranks) - 1) * between / ((ranks - ranks.mean()) ** 2).sum())
        assert source == ("chi-squared" if min(sizes) >= 5 else "permutation")
        assert source == "permutation" or p == pytest.approx(stats.chi2.sf(h, 2))
    differences = np.array([0.5, -1.5, 2.5, 3.5, 0.0, 4.5])  # all signs of the ranks, counted one by one
    sums = [
        sum(rank for rank, sign in zip(range(1, 6), signs, strict=True) if sign) for signs in product((0, 1), repeat=5)
    ]
    observed = min(2, 13)
    assert wilcoxon_p(differences) == pytest.approx(2 * np.mean([total <= observed for total in sums]))


def test_bootstrap_intervals_agree_with_scipy() -> None:
    rng = np.random.default_rng(8)
    true = rng.lognormal(size=40)
    ours, score = true * rng.lognormal(0, 0.5, 40), np.round(np.log(true) * 2 + rng.normal(size=40))
    found = spearman_intervals(ours, true, score)
    for interval, statistic in (
        (found[0], lambda a, b, c: stats.spearmanr(a, c).statistic),
        (found[2], lambda a, b, c: stats.spearmanr(a, c).statistic - stats.spearmanr(b, c).statistic),
    ):
        theirs = stats.bootstrap(
            (ours, true, score),
            statistic,
            paired=True,
            vectorized=False,
            n_resamples=300,
            method="percentile",
            rng=2,
        )
        assert interval == pytest.approx(tuple(theirs.confidence_interval), abs=0.06)


def test_the_ranking_is_that_of_isles22() -> None:
    """Against pandas, case by case and measure by measure; a method without a case is last there."""
    methods = [drawn("a", 12, 1), drawn("b", 12, 2, 0.1), drawn("c", 12, 3)]
    del methods[2].scores[Path("004")]  # type: ignore[attr-defined]
    table = pd.DataFrame(
        [
            {"method": m.name, "case": str(c), **{k: getattr(s, k) for k in MEASURES}}
            for m in methods
            for c, s in m.scores.items()
        ]
    )
    ranks = []
    for measure in MEASURES:
        wide = table.pivot(index="case", columns="method", values=measure)
        ranks.append(wide.rank(axis=1, ascending=measure in ("avd_ml", "alcd"), na_option="bottom"))
    wanted = sum(ranks) / 4
    assert case_ranks(methods, [Path(case) for case in wanted.index]) == pytest.approx(wanted.to_numpy())
    found = rank_methods(methods)
    assert found is not None
    assert {row.method: row.mean_rank for row in found.rows} == pytest.approx(wanted.mean().to_dict())
    assert [row.place for row in found.rows] == [1, 2, 3]
    assert {row.method: row.not_measured for row in found.rows} == {"a": 0, "b": 0, "c": 1}
    assert sum(row.first_share or 0 for row in found.rows) <= 1
    assert -1 <= (found.kendall_tau or 0) <= 1


def test_equal_methods_share_their_place() -> None:
    found = rank_methods([drawn("a"), drawn("b")])
    assert found is not None
    assert [(row.place, row.mean_rank, row.first_share) for row in found.rows] == [(1.5, 1.5, 0), (1.5, 1.5, 0)]
    assert found.kendall_tau is None
    for row in compare_methods([drawn("a"), drawn("b")]):
        assert (row.equal, row.win_rate, row.p, row.mean_ci_low, row.note) == (
            30,
            None,
            None,
            None,
            "equal in all cases",
        )


def test_a_known_effect_is_found_and_signs_are_right() -> None:
    first, second = drawn("a", 60, 1, 0.15), drawn("b", 60, 2)
    rows = {row.measure: row for row in compare_methods([first, second])}
    dice = np.array([first.scores[case].dice - second.scores[case].dice for case in first.scores])
    assert rows["dice"].mean_difference == pytest.approx(dice.mean())
    assert (rows["dice"].mean_ci_low or -1) > 0
    assert rows["dice"].first_better == (dice > 0).sum()
    assert (rows["dice"].p_holm or 1) >= (rows["dice"].p or 0)
    assert rows["avd_ml"].first_better == sum(
        first.scores[case].avd_ml < second.scores[case].avd_ml for case in first.scores
    )
    found = rank_methods([first, second])
    assert found is not None
    assert found.rows[0].method == "a"


def test_small_studies_say_why_something_is_not_told() -> None:
    five = compare_methods([drawn("a", 5, 1), drawn("b", 5, 2)])
    assert all((row.mean_ci_low is None) == (row.measure == "avd_ml") for row in five)
    assert all("at least 6 cases" in row.note for row in five)
    one = compare_methods([drawn("a", 1, 1), drawn("b", 1, 2)])
    assert all(row.mean_ci_low is None and row.note for row in one)
    alone = rank_methods([drawn("a", 1, 1), drawn("b", 1, 2)])
    assert alone is not None
    assert all(row.place_low is None and "one case" in row.note for row in alone.rows)
    differ = compare_pair("dice", ("a", "b"), np.full(9, 0.7), np.full(9, 0.5), True)
    assert (differ.mean_ci_low, differ.note) == (None, "all differences are equal")
    rounding = compare_pair("avd_ml", ("a", "b"), np.array([0.1 + 0.2]), np.array([0.3]), False)
    assert rounding.equal == 1


def test_the_intervals_cover_the_truth() -> None:
    """A small version of `python -m benchmarks.coverage`, whose figures stand in docs/studies.md."""
    found = coverage(studies=50, cases=25, resamples=199)
    assert len(found) > 20
    shares = {name: held / given for name, (held, given) in found.items()}
    assert min(shares.values()) >= 0.84, shares
    held, given = (sum(one[k] for name, one in found.items() if "median" not in name) for k in (0, 1))
    assert 0.92 <= held / given <= 0.985
    assert "mean difference of avd_ml" not in found, "too skewed: none is given"


# Tables as people save them.


def clinical(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("case,nihss,site\r\n001,3.5,A\r\n002,,B\r\n", "utf-8-sig"),
        ("case;nihss;site\r\n001;3,5;A\r\n002;n/a;B\r\n", "utf-8-sig"),
        ("sep=;\ncase;nihss;site\n001;3,5;A\n002;NaN;B\n", "utf-8"),
        ("Case\tNIHSS\tsite\n001\t3.5\tA\n002\t\tB\n\n", "utf-16"),
        (',case,nihss,site\n0," 001 ",3.5,A\n1,002,-,B\n', "utf-8"),
    ],
)
def test_tables_of_spreadsheets_are_read(tmp_path: Path, text: str, encoding: str) -> None:
    found = read_clinical_table(clinical(tmp_path / "c.csv", text, encoding), ())
    assert found.cases == {"001", "002"}
    assert {name.lower(): dict(of) for name, of in found.scores.items()} == {"nihss": {"001": 3.5}}
    assert any("site" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,nihss\n1,2\n", "no column 'case'"),
        ("case,nihss\n1,2\n1,3\n", "twice"),
        ("case,nihss\n,2\n", "names no case"),
        ("case,nihss,NIHSS\n1,2,3\n", "column appears twice"),
        ("case,nihss\n1,2\n2,unknown\n", "is not a number"),
        ("case,nihss\n1,2\n2,inf\n", "is not a number"),
        ("case,nihss\n1,2\n2,1e999\n", "is not a number"),
        ("case,nihss\n1,2\n2,1_000\n", "is not a number"),
        ("case,nihss\n1,2\n2,٣\n", "is not a number"),
        ('case,nihss\n1,"3,5"\n', "in a comma-separated table"),
        ("case;nihss;mrs\n1;3,5;2\n2;3.5;1\n", "decimal mark"),
        ("case;nihss\n1;1.234,5\n2;3\n", "is not a number"),
        ("case,nihss\n1,2,3\n", "more cells"),
        ('case,nihss\n1,"2\n', "not a text table"),
        ("", "no column 'case'"),
        ("case,nihss\n", "no row"),
    ],
)
def test_tables_that_make_no_sense_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputRefused) as refusal:
        read_clinical_table(clinical(tmp_path / "c.csv", text), ())
    assert said in str(refusal.value)
    assert str(tmp_path / "c.csv") in refusal.value.where
    for path, content in (
        (tmp_path / "x.xlsx", b"PK\x03\x04\xff\xfe\x00"),
        (tmp_path / "l.csv", "case,ä\n1,2".encode("latin-1")),
    ):
        path.write_bytes(content)
        with pytest.raises(InputRefused, match="not a text table"):
            read_clinical_table(path, ())


def test_names_that_a_spreadsheet_has_changed_are_refused(tmp_path: Path) -> None:
    path = clinical(tmp_path / "c.csv", "case,nihss\n1,2\n2,3\n010,4\n")
    found = read_clinical_table(path, ())
    with pytest.raises(InputRefused, match="similar to") as refusal:
        check_case_names(found, ["001", "002", "010"], path, tmp_path / "masks")
    assert "'1' for '001'" in refusal.value.found
    with pytest.raises(InputRefused, match="the clinical table and the masks have no case in common"):
        check_case_names(found, ["x", "y"], path, tmp_path / "masks")
    with pytest.raises(InputRefused, match="have the same name 1,") as refusal:
        check_case_names(found, ["1", "1"], path, tmp_path / "masks")
    assert refusal.value.where == str(tmp_path / "masks")
    said = check_case_names(found, ["1", "7"], path, tmp_path / "masks")
    assert "7" in said[0]
    assert "010, 2" in said[1]


def test_groups_are_columns_of_the_table(tmp_path: Path) -> None:
    found = read_clinical_table(clinical(tmp_path / "c.csv", "case,Tesla,age\n1,1.5,60\n2,3,70\n"), ["tesla"])
    assert set(found.scores) == {"age"}
    assert select_group_columns(found, ["tesla"], None) == {"Tesla": {"1": "1.5", "2": "3"}}
    with pytest.raises(UsageError, match="a column that the clinical table does not have"):
        select_group_columns(found, ["vendor"], tmp_path)
    with pytest.raises(UsageError, match="no table is given"):
        select_group_columns(None, ["vendor"], None)


def test_correlations_drop_missing_scores_together_and_say_how_many() -> None:
    ours = drawn("a", 40, 4)
    cases = list(ours.scores.values())
    rng = np.random.default_rng(0)
    known = {one.case: float(np.log(one.truth_ml) + rng.normal()) for one in cases[5:]}
    found = ClinicalTable(
        frozenset(known), {"nihss": known, "flat": dict.fromkeys(known, 2.0), "few": dict(list(known.items())[:5])}, {}
    )
    rows, differences = correlate_with_scores([ours], found)
    by = {(row.masks, row.quantity, row.score): row for row in rows}
    row = by["true masks", "volume_ml", "nihss"]
    assert row.n == 35
    assert row.rho == pytest.approx(
        pd.Series([c.truth_ml for c in cases[5:]]).corr(pd.Series(list(known.values())), method="spearman")
    )
    assert row.ci_low is not None
    assert row.ci_low < (row.rho or 0) < (row.ci_high or 0)
    flat, few = by["a", "volume_ml", "flat"], by["a", "volume_ml", "few"]
    assert (flat.rho, flat.p, flat.note) == (None, None, "all values of flat are equal")
    assert (few.n, few.ci_low, few.note) == (5, None, "an interval needs at least 20 cases")
    assert few.rho is not None
    told = differences[0]
    assert told.difference == pytest.approx((told.rho_predicted or 0) - (told.rho_true or 0))
    perfect = method(
        "p", [replace(one, predicted_ml=one.truth_ml, predicted_lesions=one.truth_lesions) for one in cases]
    )
    same = correlate_with_scores([perfect], found)[1][0]
    assert (same.difference, same.ci_low, same.note) == (0.0, None, "equal in all cases")


def test_subgroups_keep_small_groups_and_cases_without_lesion_apart() -> None:
    scores = [scored(f"{k}", dice=k / 20, truth_ml=0.5 * k, truth_lesions=k) for k in range(12)]
    known = {str(k): "one" if k == 1 else "AB"[k % 2] for k in range(1, 12)}
    summaries, tests, notes = summarise_subgroups([method("a", scores)], {"site": known})
    sites = {row.group: row for row in summaries if row.factor == "site" and row.measure == "dice"}
    assert {group: row.n for group, row in sites.items()} == {"A": 5, "B": 5, "one": 1}
    assert (sites["one"].mean_ci_low, sites["one"].note) == (None, "an interval needs at least 3 cases")
    assert notes == ["in no group of site: 0"]
    by = {(test.factor, test.measure): test for test in tests}
    assert by["site", "dice"].p_from == "permutation"
    assert by["site", "avd_ml"].note == "all values are equal"
    assert by["lesion_size", "dice"].n == 11, "the case without a lesion takes no part"
    numbers = ["no lesion", "1 lesion", "2 to 5 lesions", "more than 5 lesions"]
    assert list(dict.fromkeys(row.group for row in summaries if row.factor == "lesion_number")) == numbers
    assert all(row.mean_ci_high is None or row.mean_ci_high <= 1 for row in summaries if row.measure == "dice")
    with pytest.raises(InputRefused, match="too many groups"):
        summarise_subgroups(
            [method("a", [scored(str(k)) for k in range(40)])], {"age": {str(k): str(k) for k in range(40)}}
        )


# The command.


def test_methods_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    assert method_names([tmp_path / "x" / "masks", tmp_path / "y" / "masks"]) == ["x/masks", "y/masks"]
    assert method_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert method_names([tmp_path / "true masks"])[0] != "true masks"
    for paths in ([tmp_path / "a", tmp_path / "a"], [tmp_path / "a", tmp_path / "a" / "b"]):
        with pytest.raises(UsageError, match=r"folder of predictions (is given twice|contains another)"):
            method_names(paths)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cases, one without lesion; method b lacks one, and has one with other voxels."""
    root = tmp_path_factory.mktemp("study")
    for k in range(6):
        truth: AnyArray = np.zeros(SMALL.shape_zyx, np.uint8)
        if k:
            truth[2 : 3 + k % 3, 2:4, 2:7] = 1
            truth[6, 9, 8] = k % 2
        write_image(truth, root / "truth" / f"{k:03d}_gt.nii.gz", SMALL)
        write_image(truth, root / "a" / f"{k:03d}.nii.gz", SMALL)
        if k != 2:
            write_image(np.roll(truth, 1, axis=2), root / "b" / f"{k:03d}.nii.gz", SMALL)
    rows = [f"{k:03d};{k},5;{HOSTILE if k < 3 else '=2+2'};{'' if k == 4 else k % 3}" for k in range(6)]
    clinical(root / "c.csv", "\n".join(["case;nihss;scanner;mrs", *rows]), "utf-8-sig")
    return root


def told(path: Path) -> list[Mapping[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_study_of_two_methods_is_whole_and_says_what_is_missing(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "m.csv"
    paths = [str(study / "a"), str(study / "b"), str(study / "truth")]
    asked = ["--clinical", str(study / "c.csv"), "--by", "scanner"]
    for _ in range(2):  # the second one replaces the first
        assert main(["evaluate", paths[0], "--out", str(out), *paths[1:], *asked]) == 3
    endings = ("summary.csv", "plots.png", "paired.csv", "ranking.csv", "clinical.csv", "clinical_differences.csv")
    endings += ("groups.csv", "group_tests.csv", "study.json", "study.html")
    assert set(tree(out.parent)) == {"m.csv", *(f"m_{ending}" for ending in endings)}
    log = capsys.readouterr().out
    assert "note: b was not measured in 1 cases: 002; it is ranked last there" in log
    assert "mrs is missing for: 004" in log
    table = told(out)
    assert [(row["method"], row["case"]) for row in table if row["status"] != "measured"] == [("b", "002")]
    assert len(table) == 12
    data = json.loads((out.parent / "m_study.json").read_text())
    assert list(faults(data, json.loads((REPOSITORY / "docs" / "study.schema.json").read_text()))) == []
    assert [row["method"] for row in data["ranking"]] == ["a", "b"]
    assert data["ranking"][1]["not_measured"] == 1
    dice = next(row for row in data["paired"] if row["measure"] == "dice")
    assert (dice["n"], dice["first_better"], dice["equal"]) == (5, 4, 1)
    page = (out.parent / "m_study.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "002" in page
    assert {row["group"] for row in told(out.parent / "m_groups.csv")} >= {HOSTILE, "'=2+2"}
    # and one method, without more, leaves nothing of it
    assert main(["evaluate", paths[0], paths[2], "--out", str(out)]) == 0
    assert set(tree(out.parent)) == {"m.csv", "m_summary.csv", "m_plots.png"}


def test_two_cases_of_one_name_share_no_row_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sites' sub-1 got the one row."""
    for place in ("a/A", "a/B", "t/A", "t/B"):
        write_image(
            np.pad(np.ones((2, 2, 2), np.uint8), 3),
            tmp_path / place / "sub-1_mask.nii.gz",
            replace(SMALL, size=(8, 8, 8)),
        )
    table = clinical(tmp_path / "c.csv", "case,nihss\nsub-1,1\n")
    paths = [str(tmp_path / name) for name in "at"]
    assert main(["evaluate", *paths, "--clinical", str(table), "--out", str(tmp_path / "o" / "m.csv")]) == 3
    assert "have the same name sub-1," in capsys.readouterr().err


def test_one_method_with_only_sizes_as_groups(study: Path, tmp_path: Path) -> None:
    arguments = [str(study / "a"), str(study / "truth"), "--out", str(tmp_path / "m.csv"), "--by", "lesion_size"]
    assert main(["evaluate", *arguments]) == 0
    data = json.loads((tmp_path / "m_study.json").read_text())
    assert {row["factor"] for row in data["groups"]} == {"lesion_size", "lesion_number"}
    assert data["paired"] == data["ranking"] == []
    assert list(faults(data, json.loads((REPOSITORY / "docs" / "study.schema.json").read_text()))) == []


def test_predictions_of_another_method_are_no_true_masks(tmp_path: Path) -> None:
    """BIDS derivatives lie in the tree of the true masks: each method's own were left out, the others' taken for true."""
    for place in ("sub-1_msk", "derivatives/a/sub-1_mask", "derivatives/b/sub-1_mask"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{place}.nii.gz").touch()
    one, other = tmp_path / "derivatives" / "a", tmp_path / "derivatives" / "b"
    ((pair,), _) = find_pairs(one, tmp_path, [other])
    assert pair.truth == (tmp_path / "sub-1_msk.nii.gz",)


def test_what_is_refused_leaves_nothing(study: Path, tmp_path: Path) -> None:
    a, truth, table = str(study / "a"), str(study / "truth"), str(study / "c.csv")
    out = ["--out", str(tmp_path / "new" / "m.csv")]
    assert main(["evaluate", a, *out]) == 2
    assert main(["evaluate", *out]) == 2
    assert main(["evaluate", a, a, truth, *out]) == 2
    assert main(["evaluate", a, truth, "--by", "scanner", *out]) == 2
    assert main(["evaluate", a, truth, "--clinical", table, "--by", "vendor", *out]) == 2
    assert main(["evaluate", a, truth, "--clinical", str(tmp_path / "none.csv"), *out]) == 3
    assert main(["evaluate", a, truth, "--key", "x.json", *out]) == 2
    assert main(["evaluate", a, truth, "--nonsense", *out]) == 2
    assert tree(tmp_path) == {}
    (tmp_path / "m_paired.csv").write_text("case,nihss\n1,2\n")
    assert main(["evaluate", a, truth, "--out", str(tmp_path / "m.csv")]) == 2
    assert set(tree(tmp_path)) == {"m_paired.csv"}
