"""From a data set to members: folds that don't leak, training that goes on where it was stopped, weights that run."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ensemble.cli import main as product
from ensemble.config import SHIPPED_WEIGHTS, RunConfig
from ensemble.errors import InputRefused, UsageError, WeightsBroken
from ensemble.families.base import InferenceSettings
from ensemble.families.registry import family_of
from ensemble.members.manifest import find_members, open_member
from ensemble.pipeline import Ensemble, segment_prepared
from ensemble.progress import SilentWatcher
from ensemble.trust.judge import judge
from ensemble.trust.reference import CALIBRATION, FOLDER, MIN_CASES, read_references
from labelled_data import write_isles22
from training import dataset, fit
from training import train as training_of
from training.bank import Scan, as_prepared, scan
from training.batches import Bank, Batches, Mixed
from training.calibrate import Patient, Rule, choose_rule, worth_of
from training.draw import Draw
from training.folds import check_folds, make_folds, read_folds, write_folds
from training.members import MEMBERS, MemberSpec
from training.train import CHECKPOINT, Length, Recipe, Training, train


def tiny(spec: MemberSpec) -> MemberSpec:
    return replace(spec, batch=6, features=(16,) * 5, convolutions=(1,) * 5, decoder_convolutions=(1,) * 4)


def scans(volumes: Sequence[float], patients: Sequence[str] | None = None) -> list[Scan]:
    names = patients or [f"p{number}" for number in range(len(volumes))]
    return [
        Scan(Path(f"case_s{number}.npz"), patient, ml, f"digest {number}", True)
        for number, (ml, patient) in enumerate(zip(volumes, names, strict=True))
    ]


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    from test_training_simulator import write_tiny_case

    (tmp_path / "bank").mkdir()
    for seed in range(4):
        write_tiny_case(tmp_path / "bank", seed)
    return tmp_path / "bank"


@pytest.mark.slow
def test_isles22_to_members_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """12 patients in ISLES'22's layout -> bank -> slice2d, 2 folds x 60 steps -> weights -> run -> evaluate."""
    monkeypatch.setitem(MEMBERS, "slice2d", tiny(MEMBERS["slice2d"]))
    release, made, weights = tmp_path / "release", tmp_path / "bank", tmp_path / "weights"
    write_isles22(release, [1])
    write_isles22(release, range(2, 13), flair=False)
    assert dataset.main([str(release), "--out", str(made)]) == 0
    asked = ["slice2d", "--bank", str(made), "--out", str(weights), "--folds", "2", "--steps", "60"]
    asked += ["--rate", "0.01", "--tta", "none"]
    assert fit.main(asked) == 2  # no statement
    assert "licence and consent" in capfd.readouterr().err
    stated = [*asked, "--licence", "CC-BY-4.0", "--consent", "phantoms | of nobody"]
    assert fit.main(stated) == 0
    card = (weights / "slice2d" / "README.md").read_text()
    assert "CC-BY-4.0" in card
    assert "phantoms / of nobody" in card
    with (weights / "out_of_fold.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    for name in ("out_of_fold_summary.csv", "out_of_fold_plots.png", "out_of_fold_worst.png"):
        assert (weights / name).stat().st_size > 200
    splits = json.loads((weights / "splits_final.json").read_text())
    assert [len(fold["val"]) for fold in splits] == [6, 6]
    assert not set(splits[0]["train"]) & set(splits[0]["val"])
    assert (json.loads((weights / "manifest.json").read_text())["members"][0]["licence"]) == "CC-BY-4.0"
    case = release / "rawdata" / "sub-strokecase0001" / "ses-0001"
    images = {name: str(case / f"sub-strokecase0001_ses-0001_{name}.nii.gz") for name in ("dwi", "adc")}
    out = tmp_path / "out"
    ran = ["run", "--dwi", images["dwi"], "--adc", images["adc"], "--out", str(out), "--weights", str(weights)]
    assert product([*ran, "--tta", "none"]) == 0
    mask = next(release.glob("derivatives/*0001/*/*_msk.nii.gz"))
    assert product(["evaluate", str(out / "mask.nii.gz"), str(mask), "--out", str(tmp_path / "scores.csv")]) == 0
    with (tmp_path / "scores.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["dice"]) > 0.5
    assert fit.main([*stated, "--seed", "2"]) == 2  # another training lies in the work folder
    assert "it differs in" in capfd.readouterr().err


@pytest.mark.slow
def test_all_members_are_fitted_together(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, spec in MEMBERS.items():
        small = replace(tiny(spec), batch=2, features=(4,) * 5)
        smaller = replace(small, training_patch=(16, 16, 16), patch=(16, 16, 16))
        monkeypatch.setitem(MEMBERS, name, smaller if spec.dimensions == 3 else small)
    weights = tmp_path / "weights"
    asked = ["all", "--bank", str(bank), "--out", str(weights), "--folds", "2", "--steps", "1", "--tta", "none"]
    assert fit.main([*asked, "--simulated", str(bank)]) == 3
    assert "simulated bank" in capfd.readouterr().err
    assert fit.main(asked) == 0  # simulated patients need no statement
    specs = find_members(weights)
    assert [spec.name for spec in specs] == ["flair3d", "iso3d", "slice2d"]
    assert {spec.name: len(family_of(spec).folds(spec.folder)) for spec in specs} == dict.fromkeys(MEMBERS, 2)
    card = (weights / "iso3d" / "README.md").read_text()
    assert "| ensemble, calibrated on the other folds |" in card
    splits = weights / "splits_final.json"
    states = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("weights.work/*/state.pt"))]
    assert len(states) == 6
    assert fit.main([*asked, "--splits", str(splits)]) == 0  # the same folds: nothing is trained again
    verified = [open_member(spec, InferenceSettings()) for spec in find_members(weights)]
    assert len(verified) == 3


def test_the_first_fold_is_what_the_trust_score_takes_for_usual(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub_ensemble: Callable[..., Ensemble]
) -> None:
    from test_training_simulator import write_tiny_case
    from test_trust import Seeing

    for seed in range(4, MIN_CASES):
        write_tiny_case(bank, seed)
    weights, digests, asked = tmp_path / "weights", {"a": {"fold_0/checkpoint_final.pth": "0" * 64}}, []

    def load(config: RunConfig) -> Ensemble:
        asked.append(config)
        return replace(stub_ensemble(Seeing("a"), weights=config.weights, trust=config.trust), digests=digests)

    monkeypatch.setattr(fit, "load_from_config", load)
    first = [scan(path) for path in sorted(bank.glob("case_*.npz"))]
    fit.write_usual(weights, first[1:], "cpu")
    assert (asked, weights.exists()) == ([], False)  # too few
    fit.write_usual(weights, first, "cpu")
    assert [(config.tta, config.trust) for config in asked] == [("none", True)]
    read = read_references(weights, digests)
    assert (read.missing, read.members["a"].whole.spectrum.n) == ((), MIN_CASES)
    told = json.loads((weights / FOLDER / CALIBRATION).read_text(encoding="utf-8"))
    assert (told["weights"], told["about"]["looks_of"]) == (digests, f"{MIN_CASES} cases of bank")
    for one in first:  # each looks like the others
        seen = judge(segment_prepared(as_prepared(one.path)[0], load(asked[0]), SilentWatcher()), load(asked[0]))
        assert (seen.verdict, seen.expected_dice) == ("good", None)


@pytest.mark.parametrize("member", sorted(MEMBERS))
def test_shipped_weights_can_be_fine_tuned(member: str) -> None:
    path = fit._checkpoint(SHIPPED_WEIGHTS, member, 3)
    Training(MEMBERS[member], "cpu").load_weights(path)


@pytest.mark.parametrize("killed_at", [3])
def test_training_in_steps_goes_on_to_the_very_same_weights(
    killed_at: int, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(tiny(MEMBERS["slice2d"]), training_patch=(48, 48), features=(8,) * 5)
    recipe = Recipe(Length(steps=6), seed=3)
    step = Training.step

    def run(name: str, stops: int | None = None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        def dies(self: Training, *batch: torch.Tensor | float) -> tuple[float, float]:
            if self.steps == stops:
                raise KeyboardInterrupt
            return step(self, *batch)  # type: ignore[arg-type]

        monkeypatch.setattr(Training, "step", dies)
        folder = tmp_path / name
        state = folder / "state.pt"
        torch.manual_seed(3)
        train(spec, Bank(bank), folder, state, recipe, resume=state.exists())
        content = torch.load(state, weights_only=True)
        return content["network"], torch.load(folder / CHECKPOINT, weights_only=True)["network_weights"]

    whole = run("whole")
    monkeypatch.setattr(training_of, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(training_of, "LOG_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        run("killed", killed_at)
    again = run("killed")
    for one, other in zip(whole, again, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    steps = [int(row[0]) for row in csv.reader((tmp_path / "killed" / "training.csv").open()) if row[0] != "step"]
    assert steps == [2, 4, 6]


@pytest.mark.parametrize(("member", "window"), [("iso3d", "30,48,48"), ("iso3d", "48,48"), ("slice2d", "0,80")])
def test_windows_that_no_network_takes_are_refused(
    bank: Path, tmp_path: Path, member: str, window: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        training_of.main([member, "--bank", str(bank), "--out", str(tmp_path), "--minutes", "1", "--window", window])
    assert "each a multiple of 16" in capfd.readouterr().err


def test_workers_draw_the_same_batches(bank: Path) -> None:
    batches = Batches(tiny(MEMBERS["slice2d"]), Mixed(Bank(bank), Bank(bank), 0.5), seed=2)
    ahead, own = batches.since(5, workers=2), batches.since(5, workers=0)
    for _ in range(3):
        for one, other in zip(next(ahead), next(own), strict=True):
            assert torch.equal(one, other)


def test_states_of_earlier_trainings_are_still_gone_on_from(bank: Path, tmp_path: Path) -> None:
    """`.train/bank/*_state.pt` of hours of training have these fields, and no more."""
    spec = tiny(MEMBERS["slice2d"])
    training = Training(spec, "cpu")
    old = {"network": training.network.state_dict(), "average": training.average.state_dict()}
    old |= {"optimiser": training.optimiser.state_dict(), "steps": 7, "seconds": 30.0}
    torch.save(old, tmp_path / "old.pt")
    assert train(spec, Bank(bank), tmp_path, tmp_path / "old.pt", Recipe(Length(minutes=0.501)), resume=True)
    assert torch.load(tmp_path / "old.pt", weights_only=True)["steps"] > 7


def test_real_scans_get_no_artefacts_that_they_did_not_have(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def rescan(images: torch.Tensor, draw: Draw, *, artefacts: bool = True) -> torch.Tensor:
        seen.append(artefacts)
        return images

    monkeypatch.setattr("training.batches.rescan", rescan)
    path = next(bank.glob("case_*.npz"))
    content = dict(np.load(path))
    np.savez(path, **content, real=True)  # type: ignore[arg-type]
    Bank(bank, paths=[path]).draw(Draw(0), at_2mm=True)
    Bank(bank, paths=sorted(bank.glob("*.npz"))[1:2]).draw(Draw(0), at_2mm=True)
    assert seen == [False, True]
    assert scan(path).real


def test_folds_hold_patients_together_and_volumes_apart() -> None:
    volumes = [float(2**number) for number in range(10)]
    folds = make_folds(scans(volumes + volumes, [f"p{n}" for n in range(10)] * 2), 5, seed=0)
    assert folds == make_folds(scans(volumes + volumes, [f"p{n}" for n in range(10)] * 2), 5, seed=0)
    for fold in folds:
        patients = {one.patient for one in fold}
        assert len(fold) == 4
        assert len(patients) == 2
        assert {int(patient[1:]) < 5 for patient in patients} == {True, False}  # a small one and a large one
    check_folds(folds)


def test_folds_can_be_stated_as_nnunet_has_them(tmp_path: Path) -> None:
    ours = scans([1.0, 2.0, 3.0, 4.0])
    folds = make_folds(ours, 2, seed=0)
    write_folds(folds, tmp_path / "splits_final.json")
    assert read_folds(tmp_path / "splits_final.json", ours) == folds
    with pytest.raises(InputRefused, match="in no fold"):
        read_folds(tmp_path / "splits_final.json", [*ours, *scans([0.0] * 5)[4:]])
    (tmp_path / "splits_final.json").write_text('[{"val": ["s0", "s1", "s0"]}, {"val": ["s2", "s3"]}]')
    with pytest.raises(InputRefused, match="named twice"):
        read_folds(tmp_path / "splits_final.json", ours)
    (tmp_path / "splits_final.json").write_text('[{"val": ["nobody"]}]')
    with pytest.raises(InputRefused, match="folds can't be read"):
        read_folds(tmp_path / "splits_final.json", ours)


def test_what_would_leak_is_refused() -> None:
    one, two, three = scans([1.0, 2.0, 3.0])
    copied = replace(two, path=Path("case_copy.npz"), patient="other")
    for folds, beside, words in (
        (((one, replace(three, patient=one.patient)), (two,)), (), None),
        (((one,), (replace(three, patient=one.patient), two)), (), "one patient lie in two folds"),
        (((one, two), (copied, three)), (), "one image lies in two folds"),
        (((one, two), (three,)), (copied,), "simulated bank"),
        (((replace(one, lesion_ml=0.0),), (replace(two, lesion_ml=0.0),)), (), "no scan of the bank has a lesion"),
        (((one,), (replace(two, lesion_ml=0.0),)), (), "trained without a lesion"),
    ):
        if words is None:
            check_folds(folds, beside)
            continue
        with pytest.raises(InputRefused, match=words):
            check_folds(folds, beside)


def test_too_few_patients_or_folds() -> None:
    with pytest.raises(InputRefused, match="fewer patients than folds") as refused:
        make_folds(scans([1.0, 2.0, 3.0], ["a", "a", "b"]), 3, seed=0)
    assert "--folds 2" in refused.value.do
    with pytest.raises(UsageError, match="tested on others"):
        make_folds(scans([1.0, 2.0]), 1, seed=0)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda out: (out.mkdir(), (out / "thesis.doc").touch()), 2, "something else"),
        (lambda out: None, 2, "holds no weights of slice2d"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    change: Callable[[Path], object],
    code: int,
    words: str,
    bank: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    change(tmp_path / "out")
    asked = ["slice2d", "--bank", str(bank), "--out", str(tmp_path / "out"), "--folds", "2", "--steps", "1"]
    assert fit.main([*asked, "--start-from", str(tmp_path)]) == code
    assert words in capfd.readouterr().err


def test_weights_to_begin_with_are_looked_for_before_any_member_is_trained(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(fit, "train", lambda spec, *_, **__: trained.append(spec.name) or True)
    (tmp_path / "given" / "flair3d" / "fold_0").mkdir(parents=True)
    (tmp_path / "given" / "flair3d" / CHECKPOINT).touch()
    asked = ["all", "--bank", str(bank), "--out", str(tmp_path / "out"), "--folds", "2", "--steps", "1"]
    assert fit.main([*asked, "--start-from", str(tmp_path / "given")]) == 2
    assert "holds no weights of iso3d" in capfd.readouterr().err
    assert trained == []


def test_fine_tuning_begins_with_the_weights_that_are_given(bank: Path, tmp_path: Path) -> None:
    """What is trained is what was loaded: not a copy that the optimiser doesn't know. Another network's weights are refused."""
    spec = tiny(MEMBERS["slice2d"])
    first = Training(spec, "cpu")
    training_of.export(spec, first.network, tmp_path)
    training = Training(spec, "cpu")
    training.load_weights(tmp_path / CHECKPOINT)
    known = {parameter.data_ptr() for group in training.optimiser.param_groups for parameter in group["params"]}
    assert known == {parameter.data_ptr() for parameter in training.network.parameters()}
    for one, other in zip(first.network.parameters(), training.network.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-3)
    with pytest.raises(WeightsBroken, match="another network than iso3d"):
        Training(MEMBERS["iso3d"], "cpu").load_weights(tmp_path / CHECKPOINT)


def patients(sizes: Sequence[int]) -> list[Patient]:
    """Member `sure` finds the lesion; `keen` finds it, and a speck beside it that both call lesion."""
    made = []
    for size in sizes:
        lesion = np.zeros((6, 14, 14), bool)
        lesion[1:5, 1:4, 1 : 1 + size] = True
        speck = np.zeros_like(lesion)
        speck[2, 12, 12] = True
        said = {"keen": np.where(lesion | speck, 0.9, 0.02), "sure": np.where(lesion | speck, 0.9, 0.02)}
        made.append(Patient(lesion, {name: image.astype(np.float16) for name, image in said.items()}, 0.01))
    return made


def test_a_smallest_lesion_is_chosen_where_it_helps() -> None:
    made = patients([4, 6, 8])
    rule = choose_rule(made, 0.0)
    assert rule.min_lesion_ml == 0.02
    assert worth_of(made, rule).f1 == 1


def test_a_vote_counts_more_where_that_helps() -> None:
    """Two members miss each lesion at every threshold, and one finds it."""
    made = []
    for patient in patients([4, 6, 8]):
        found = np.where(patient.lesion, 0.9, 0.02).astype(np.float16)
        noise = np.where(np.roll(patient.lesion, 7, axis=1), 0.9, 0.04).astype(np.float16)
        made.append(Patient(patient.lesion, {"a": noise, "b": found}, 0.01))
    rule = choose_rule(made, 0.0)
    assert rule.weights.get("b", 1.0) > 1 or rule.thresholds["a"] != 0.5
    assert worth_of(made, rule).dice > 0.95


def test_cutting_changes_no_measure() -> None:
    made = patients([4, 6, 8])
    rule = Rule({"keen": 0.4, "sure": 0.5}, 0.0)
    assert worth_of(made, rule) == worth_of([patient.cut() for patient in made], rule)
    assert made[0].cut().lesion.size < made[0].lesion.size
