"""How good the shipped members are: `python -m training.evaluate --real ../shared/cases --simulated 45 --cards`.

Runs the shipped pipeline on real cases with ground truth, on real lesion-free heads (`--normals`) and on the fixed simulated validation
set, and prints one table: Dice, lesion-wise F1, recall and precision of voxels, absolute volume difference (ml) and absolute lesion count
difference, of each member and of the ensemble; and how much of the simulated lesions is found by size, brightness and ADC. `--cards` also
writes the table into the members' model cards.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from ensemble.config import SHIPPED_WEIGHTS, RunConfig, Tta
from ensemble.memory import keep_freed_memory
from ensemble.metrics import absolute_lesion_count_difference, absolute_volume_difference_ml, dice, lesion_f1, volume_ml
from ensemble.pipeline import Ensemble, Result, load_from_config, segment_raw
from ensemble.prepare.case import PreparedCase
from ensemble.progress import SilentWatcher
from ensemble.readers.base import RawCase, RawImage
from ensemble.readers.imagefile import read_case_files, read_image
from ensemble.types import AnyArray, Modality
from ensemble.volume import Volume
from training.acquisition import Acquired
from training.bank import anterior_grid
from training.baseline import best_rule
from training.drafts import draft_of
from training.simulate import SHARED, validation_case

ENSEMBLE = "ensemble"
FALSE_ALARM_ML = 0.3  # in a lesion-free case
TABLE_BEGIN, TABLE_END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
COLUMNS = ("dice", "lesion_f1", "recall", "precision", "avd_ml", "alcd")
VISIBLE = 1.4  # DWI of a lesion's brightest tenth, times normal tissue
# Lesions by size (ml), least DWI of the brightest tenth, and least ADC of the brighter half (both times normal tissue).
LESION_CLASSES = (
    ("below 0.1 ml, visible", (0.0, 0.1), VISIBLE, 0.0),
    ("0.1-0.3 ml, visible", (0.1, 0.3), VISIBLE, 0.0),
    ("below 0.3 ml, visible", (0.0, 0.3), VISIBLE, 0.0),
    ("0.3-2 ml", (0.3, 2.0), 0.0, 0.0),
    ("0.3-2 ml, ADC > 0.95", (0.3, 2.0), 0.0, 0.95),
    ("above 2 ml", (2.0, 1e9), 0.0, 0.0),
)


@dataclass(frozen=True)
class Truth:
    """A case with its true mask (z, y, x), if there is one."""

    raw: RawCase
    mask: AnyArray | None


@dataclass(frozen=True)
class Score:
    """One mask of one case, measured."""

    group: str  # "real" or "simulated"
    case: str
    tta: str
    member: str
    truth_ml: float  # nan without a true mask
    found_ml: float
    dice: float
    lesion_f1: float
    recall: float
    precision: float
    avd_ml: float
    alcd: float
    seconds: float


@dataclass(frozen=True)
class Found:
    """One simulated lesion (a connected component of the true mask), and the part of it that one mask covers."""

    member: str
    tta: str
    volume_ml: float
    dwi: float
    """Brightest tenth, times normal tissue."""
    adc: float
    """Median in the brighter half, times normal tissue."""
    share: float


def real_cases(folder: Path) -> Iterator[Truth]:
    """Folders that hold dwi, adc, perhaps flair, and perhaps lesion_gt, as .nii.gz or .mha."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: give the folder of real cases with --real, or leave it out")
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = {
            path.name.split(".")[0]: path for path in sorted(case.iterdir()) if path.name.endswith((".nii.gz", ".mha"))
        }
        images = {modality: files[modality.value] for modality in Modality if modality.value in files}
        truth = read_image(files["lesion_gt"], Modality.DWI).volume.array > 0 if "lesion_gt" in files else None
        yield Truth(read_case_files(case.name, images), truth)


def lesion_free_heads(folder: Path) -> Iterator[Truth]:
    """Folders that hold `dwi.nii.gz` and `adc.nii.gz` of volunteers, with skull."""
    for head in sorted(path for path in folder.iterdir() if path.is_dir()):
        raw = read_case_files(head.name, {m: head / f"{m.value}.nii.gz" for m in (Modality.DWI, Modality.ADC)})
        yield Truth(raw, np.zeros(raw.images[Modality.DWI].volume.array.shape, bool))


def simulated_cases(count: int, shared: Path, cache: Path | None = None) -> Iterator[Truth]:
    """The first `count` cases of the fixed validation set; kept in the folder `cache`, if given."""
    for index in range(count):
        name = f"simulated_{index:03d}"
        path = cache / f"{name}.pt" if cache else None
        if path and path.exists():
            case = Acquired(**torch.load(path, weights_only=True))
        else:
            case = validation_case(index, shared)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                with draft_of(path) as draft:
                    torch.save(vars(case), draft)
        yield Truth(as_raw(name, case), case.lesion.numpy() > 0)


def found_lesions(truth: Truth, tta: str, result: Result) -> list[Found]:
    """Return the part of each true lesion that each mask covers."""
    if truth.mask is None or not truth.mask.any():
        return []
    dwi, adc = (result.case.tissue_normalized[m].array for m in (Modality.DWI, Modality.ADC))
    components, count = ndimage.label(truth.mask, structure=np.ones((3, 3, 3)))
    rows = []
    for number in range(1, count + 1):
        lesion = components == number
        bright = lesion & (dwi >= np.median(dwi[lesion]))
        about = {
            "volume_ml": float(lesion.sum()) * result.case.grid.voxel_ml,
            "dwi": float(np.percentile(dwi[lesion], 90)),
            "adc": float(np.median(adc[bright])),
        }
        rows += [
            Found(member, tta, **about, share=float(mask[lesion].mean())) for member, mask, _ in _masks(result, 0.0)
        ]
    return rows


def as_raw(name: str, case: Acquired) -> RawCase:
    """Return a simulated case in the form that readers return."""
    grid = anterior_grid(case.brain.shape, case.spacing_mm)
    arrays = {Modality.DWI: case.dwi, Modality.ADC: case.adc, Modality.FLAIR: case.flair}
    return RawCase(name, {m: RawImage(Path(f"{name}_{m}"), Volume(a.numpy(), grid)) for m, a in arrays.items()})


def scores_of(truth: Truth, group: str, tta: str, result: Result, seconds: float) -> list[Score]:
    """Measure every member's mask, and the fused one."""
    spacing = result.case.grid.spacing_zyx_mm
    return [score_of(truth, group, tta, member, mask, spacing, took) for member, mask, took in _masks(result, seconds)]


def _masks(result: Result, seconds: float) -> list[tuple[str, AnyArray, float]]:
    """Each voter's mask and the fused one, with the time each took."""
    masks = [(o.member, o.prediction.mask.array, o.seconds) for o in result.outcomes if o.prediction]
    return [*masks, (ENSEMBLE, result.fused.mask.array > 0, seconds)]


def score_of(
    truth: Truth,
    group: str,
    tta: str,
    member: str,
    mask: AnyArray,
    spacing_zyx_mm: tuple[float, float, float],
    seconds: float,
) -> Score:
    """Measure one mask (z, y, x)."""
    numbers = dict.fromkeys(COLUMNS, float("nan"))
    true_ml = float("nan")
    if truth.mask is not None:
        true_ml = volume_ml(truth.mask, spacing_zyx_mm)
        numbers = {
            "dice": dice(truth.mask, mask),
            "lesion_f1": lesion_f1(truth.mask, mask),
            "recall": float(mask[truth.mask].mean()) if truth.mask.any() else float("nan"),
            "precision": float(truth.mask[mask > 0].mean()) if (mask > 0).any() else float("nan"),
            "avd_ml": absolute_volume_difference_ml(truth.mask, mask, spacing_zyx_mm),
            "alcd": float(absolute_lesion_count_difference(truth.mask, mask)),
        }
    found_ml = volume_ml(mask, spacing_zyx_mm)
    return Score(group, truth.raw.name, tta, member, true_ml, found_ml, **numbers, seconds=seconds)


@dataclass(frozen=True)
class EvaluatedCase:
    """A segmented case: its prepared images, and the lesions found."""

    truth: Truth
    group: str
    case: PreparedCase
    found: list[Found]


def evaluate(
    cases: Iterable[Truth], group: str, ensemble: Ensemble, tta: str
) -> tuple[list[Score], list[EvaluatedCase]]:
    """Segment and measure cases, printing each as it is done."""
    rows: list[Score] = []
    seen: list[EvaluatedCase] = []
    for truth in cases:
        started = time.perf_counter()
        result = segment_raw(truth.raw, ensemble, SilentWatcher())
        new = scores_of(truth, group, tta, result, time.perf_counter() - started)
        rows += new
        seen.append(EvaluatedCase(truth, group, result.case, found_lesions(truth, tta, result)))
        for score in new:
            print(_line(score), flush=True)
    return rows, seen


def baseline_scores(seen: Sequence[EvaluatedCase]) -> list[Score]:
    """What the best threshold rule for the real cases (the simulated ones, if there is no real one with a truth) does on all."""
    known = [(s.case, s.truth.mask) for s in seen if s.group == "real" and s.truth.mask is not None]
    known = known or [(s.case, s.truth.mask) for s in seen if s.truth.mask is not None and s.truth.mask.any()]
    if not known:
        return []
    rule = best_rule(known)
    return [
        score_of(s.truth, s.group, "-", str(rule), rule.mask(s.case), s.case.grid.spacing_zyx_mm, 0.0) for s in seen
    ]


def _line(score: Score) -> str:
    return (
        f"| {score.case} | {score.tta} | {score.member} | {score.truth_ml:.2f} | {score.found_ml:.2f} | {score.dice:.3f} "
        f"| {score.lesion_f1:.3f} | {score.recall:.2f} | {score.precision:.2f} | {score.avd_ml:.2f} "
        f"| {score.alcd:.0f} | {score.seconds:.0f} |"
    )


HEADER = (
    "| case | TTA | member | true ml | found ml | Dice | lesion F1 | recall | precision | AVD ml | ALCD | s |\n"
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def table(scores: Sequence[Score], found: Sequence[Found] = ()) -> str:
    """Real cases one by one, the simulated set by lesion size, and lesion-free cases, as Markdown."""
    real = [s for s in scores if s.group == "real"]
    lines = [
        "Real cases (ISLES'22 public samples; no lesion of theirs was trained on, but hemispheres without one were):",
        "",
        HEADER,
        *map(_line, real),
    ]
    lines += [_mean_line(group) for group in _by_member([s for s in real if not np.isnan(s.dice)])]
    simulated = [s for s in scores if s.group == "simulated"]
    lesioned, free = [s for s in simulated if s.truth_ml > 0], [s for s in simulated if s.truth_ml == 0]
    sizes = (("of any size", 0.0, 1e9), ("below 1 ml", 0.0, 1.0), ("1-10 ml", 1.0, 10.0), ("above 10 ml", 10.0, 1e9))
    for title, low, high in sizes:
        groups = _by_member([s for s in lesioned if low < s.truth_ml <= high])
        if groups:
            lines += ["", f"Simulated validation cases, lesions {title}:", "", HEADER, *map(_mean_line, groups)]
    if found:
        lines += ["", "Simulated lesions, mean share of each that is found (and share of which some voxel is):", ""]
        lines += _found_lines(found)
    heads = [s for s in scores if s.group == "normal"]
    if heads:
        lines += [
            "",
            "Real lesion-free heads (backgrounds of the last training, so no independent test), ml found:",
            "",
        ]
        lines += [
            f"* {group[0].member}, TTA {group[0].tta}: " + ", ".join(f"{s.case} {s.found_ml:.2f}" for s in group)
            for group in _by_member(heads)
        ]
    if free:
        lines += ["", f"Simulated lesion-free cases, share with more than {FALSE_ALARM_ML} ml found:", ""]
        for group in _by_member(free):
            alarms = sum(s.found_ml > FALSE_ALARM_ML for s in group)
            lines.append(f"* {group[0].member}, TTA {group[0].tta}: {alarms} of {len(group)}")
    return "\n".join(lines)


def _found_lines(found: Sequence[Found]) -> list[str]:
    masks = dict.fromkeys((f.tta, f.member) for f in found)
    lines = ["| lesions | n | " + " | ".join(f"{member} ({tta})" for tta, member in masks) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(masks))
    for title, (low, high), dwi, adc in LESION_CLASSES:
        chosen = [f for f in found if low <= f.volume_ml < high and f.dwi > dwi and f.adc > adc]
        cells = []
        for mask in masks:
            shares = [f.share for f in chosen if (f.tta, f.member) == mask]
            cells.append(f"{np.mean(shares):.2f} ({np.mean(np.array(shares) > 0):.2f})" if shares else "-")
        lines.append(f"| {title} | {len(chosen) // len(masks)} | " + " | ".join(cells) + " |")
    return lines


def _by_member(scores: Sequence[Score]) -> list[list[Score]]:
    keys = dict.fromkeys((s.tta, s.member) for s in scores)
    return [[s for s in scores if (s.tta, s.member) == key] for key in keys]


def _mean_line(scores: Sequence[Score]) -> str:
    columns = ("truth_ml", "found_ml", *COLUMNS, "seconds")
    means = {name: _mean([getattr(s, name) for s in scores]) for name in columns}
    first = scores[0]
    return _line(Score(first.group, f"mean of {len(scores)}", first.tta, first.member, **means))


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are not nan (the precision of an empty mask is nan)."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def machine() -> str:
    """The kind of machine, for the record."""
    cpu = next(
        (row.split(":")[1].strip() for row in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in row),
        "?",
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, {gpu}"


def write_cards(weights: Path, text: str) -> None:
    """Put the text between the evaluation marks of every member's README.md."""
    for card in sorted(weights.glob("*/README.md")):
        content = card.read_text()
        head, _, rest = content.partition(TABLE_BEGIN)
        tail = rest.partition(TABLE_END)[2]
        card.write_text(f"{head}{TABLE_BEGIN}\n{text}\n{TABLE_END}{tail}")


def write_csv(path: Path, scores: Sequence[Score]) -> None:
    """Every number, one row a mask."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Score.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(vars(score) for score in scores)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description="Measure the members and their ensemble."
    )
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS)
    parser.add_argument("--members", help="comma-separated; all by default")
    parser.add_argument("--real", type=Path, help="folder of real cases")
    parser.add_argument("--normals", type=Path, help="folder of real lesion-free heads")
    parser.add_argument("--cache", type=Path, help="folder in which simulated cases are kept between calls")
    parser.add_argument("--simulated", type=int, default=0, help="how many cases of the simulated validation set")
    parser.add_argument("--tta", default="mirror,none", help="for real cases: mirror, none or both")
    parser.add_argument("--simulated-tta", default="none")
    parser.add_argument("--min-disputed-ml", type=float, help="as of process.py")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with anatomy/ and lesions/")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--csv", type=Path, help="where to write every number")
    parser.add_argument("--cards", action="store_true", help="write the table into the model cards")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    members = tuple(options.members.split(",")) if options.members else None
    scores: list[Score] = []
    found: list[Found] = []
    seen: dict[tuple[str, str], EvaluatedCase] = {}
    plan = [("real", tta) for tta in options.tta.split(",") if options.real]
    plan += [("normal", tta) for tta in options.tta.split(",") if options.normals]
    plan += [("simulated", tta) for tta in options.simulated_tta.split(",") if options.simulated]
    for group, tta in plan:
        config = RunConfig(options.weights, members, options.device, _tta(tta), min_disputed_ml=options.min_disputed_ml)
        ensemble = load_from_config(config)
        rows, cases_seen = evaluate(_cases(group, options), group, ensemble, tta)
        scores += rows
        found += [row for one in cases_seen if group == "simulated" for row in one.found]
        seen.update({(one.group, one.truth.raw.name): one for one in cases_seen})
    scores += baseline_scores(list(seen.values()))
    command = shlex.join(["python", "-m", "training.evaluate", *(sys.argv[1:] if arguments is None else arguments)])
    text = f"{time.strftime('%Y-%m-%d')}, {machine()}, `{command}`\n\n{table(scores, found)}"
    print("\n" + text)
    if options.csv:
        write_csv(options.csv, scores)
    if options.cards:
        write_cards(options.weights, text)


def _cases(group: str, options: argparse.Namespace) -> Iterator[Truth]:
    if group == "real":
        return real_cases(options.real)
    if group == "normal":
        return lesion_free_heads(options.normals)
    return simulated_cases(options.simulated, options.shared, options.cache)


def _tta(name: str) -> Tta:
    choices: dict[str, Tta] = {"mirror": "mirror", "none": "none", "gated": "gated"}
    return choices[name]


if __name__ == "__main__":
    main()
