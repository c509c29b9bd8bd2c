"""Do all modes give the mask of full mirroring in float32? On real and simulated cases, each shipped member by itself and all together.

    python -m benchmarks.agreement [--real ../shared/cases] [--simulated 6] [--modes gated,bf16,none] [--cache FOLDER] [--json FILE]

Also tells for which certainty gated mirroring would have spared windows that mirroring changes: the threshold is chosen on simulated
cases. Simulated cases are the first of training's validation set (`training.evaluate.simulated_cases`, kept in the folder `--cache`), and
need `../shared` (the simulator's material). The file is written after each case.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble.config import SHIPPED_WEIGHTS
from ensemble.families.base import InferenceSettings, MemberPrediction
from ensemble.families.nnunet_v2.member import NnunetV2Member
from ensemble.families.spec import MIN_DISPUTED_ML
from ensemble.fusion import fuse
from ensemble.inference import engine
from ensemble.members.manifest import find_members
from ensemble.memory import keep_freed_memory
from ensemble.metrics import dice
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.types import ignore_progress
from training.evaluate import real_cases, simulated_cases
from training.simulate import SHARED

CERTAINTIES = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
MODES = {
    "mirror": InferenceSettings(),
    "gated": InferenceSettings(tta="gated"),
    "bf16": InferenceSettings(precision="bf16"),
    "none": InferenceSettings(tta="none"),
}


@dataclass(frozen=True)
class Row:
    """One mode of one member (or of the ensemble) in one case."""

    case: str
    member: str
    mode: str
    voxels: int
    differ: int
    dice: float
    cpu_s: float
    error: float
    """Mean difference of the probabilities where full mirroring is in doubt (0.2 to 0.8); 0 where it nowhere is."""


@dataclass(frozen=True)
class WindowSeen:
    """One window of a case: how certain its plain pass was, and what mirroring changed."""

    case: str
    member: str
    certainty: float
    """Smallest probability of a voxel's likeliest class."""
    foreground: int
    """Voxels above 0.5 by all flips."""
    changed: int
    """Voxels that are foreground by the plain pass or by all flips, but not by both."""


def main() -> None:
    parser = argparse.ArgumentParser(description="agreement of all modes with full mirroring in float32")
    parser.add_argument("--real", type=Path, default=SHARED / "cases")
    parser.add_argument("--simulated", type=int, default=6)
    parser.add_argument("--modes", default=",".join(list(MODES)[1:]), help="to be held against full mirroring")
    parser.add_argument("--cache", type=Path, help="folder where simulated cases are kept")
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases, modes = prepared_cases(options.real, options.simulated, options.cache), ("mirror", *options.modes.split(","))
    for content in run(cases, options.weights, options.threads, modes):
        if options.json:
            options.json.write_text(json.dumps(content))
    print("\n".join(tables(content)))


def run(
    cases: Iterable[PreparedCase], weights: Path, threads: int, modes: Sequence[str] = tuple(MODES)
) -> Iterator[dict[str, Any]]:
    """Rows and windows of all cases so far, ready for JSON."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    for rows, windows in measure(cases, weights, modes):
        yield {"rows": [asdict(row) for row in rows], "windows": [asdict(window) for window in windows]}


def tables(content: Mapping[str, Any]) -> list[str]:
    """What `run` gave, as Markdown."""
    agreement = agreement_table([Row(**row) for row in content["rows"]])
    certainty = certainty_table([WindowSeen(**window) for window in content["windows"]])
    return [
        "## Masks of other modes against full mirroring in float32: Dice (voxels that differ)",
        "",
        *agreement.splitlines(),
        "",
        "## Windows that gated mirroring would spare, and voxels that mirroring changes in them",
        "",
        *certainty.splitlines(),
    ]


def measure(
    cases: Iterable[PreparedCase], weights: Path, modes: Sequence[str]
) -> Iterator[tuple[list[Row], list[WindowSeen]]]:
    """Modes, "mirror" first, of all members in all cases so far; prints each row."""
    rows: list[Row] = []
    windows: list[WindowSeen] = []
    members = [{mode: NnunetV2Member.load(spec, MODES[mode]) for mode in modes} for spec in find_members(weights)]
    for case in cases:
        predictions: dict[str, dict[str, MemberPrediction]] = {mode: {} for mode in modes}
        for by_mode in members:
            member = by_mode["mirror"]
            if member.requires - case.modalities:
                continue
            for mode in modes:
                with _watching(case, member, windows) if mode == "mirror" else nullcontext():
                    prediction, cpu = _timed(partial(predict, by_mode[mode], case, mode))
                predictions[mode][member.name] = prediction
                reference = predictions["mirror"][member.name].probability.array
                error = _error(prediction.probability.array, reference)
                rows.append(_row(case.name, member.name, mode, prediction.mask.array, reference > 0.5, cpu, error))
                print(rows[-1], flush=True)
        fused = {mode: _fused(by_member) for mode, by_member in predictions.items()}
        for mode in modes:
            rows.append(_row(case.name, "ensemble", mode, fused[mode], fused["mirror"]))
            print(rows[-1], flush=True)
        yield rows, windows


def predict(member: NnunetV2Member, case: PreparedCase, mode: str) -> MemberPrediction:
    """One member's prediction in one of MODES."""
    return member.predict(case, MODES[mode], ignore_progress)


def agreement_table(rows: list[Row]) -> str:
    """Markdown: by case and member, Dice (differing voxels) and error of each mode beside full mirroring in float32."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    others = [mode for mode in modes if mode != "mirror"]
    lines = [
        f"| case | member | voxels | {' | '.join(others)} | error: {', '.join(others)} | CPU s: {', '.join(modes)} |",
        f"| --- | --- | ---: |{' ---: |' * len(others)} --- | --- |",
    ]
    for key in dict.fromkeys((row.case, row.member) for row in rows):
        by_mode = {row.mode: row for row in rows if (row.case, row.member) == key}
        agree = [f"{by_mode[mode].dice:.4f} ({by_mode[mode].differ})" for mode in others]
        seconds, errors = "", ""
        if key[1] != "ensemble":
            seconds = ", ".join(f"{by_mode[mode].cpu_s:.1f}" for mode in modes)
            errors = ", ".join(f"{by_mode[mode].error:.4f}" for mode in others)
        lines.append(
            f"| {key[0]} | {key[1]} | {by_mode['mirror'].voxels} | {' | '.join(agree)} | {errors} | {seconds} |"
        )
    return "\n".join(lines)


def certainty_table(windows: list[WindowSeen]) -> str:
    """Markdown: for each certainty, windows that would be spared, and voxels that mirroring changes in them."""
    lines = ["| certainty | " + " | ".join(_groups(windows)) + " |", "| --- |" + " --- |" * len(_groups(windows))]
    for certainty in CERTAINTIES:
        cells = []
        for seen in _groups(windows).values():
            spared = [window for window in seen if window.certainty >= certainty]
            cells.append(f"{len(spared)} of {len(seen)} spared, {sum(w.changed for w in spared)} voxels changed")
        lines.append(f"| {certainty} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _groups(windows: list[WindowSeen]) -> dict[str, list[WindowSeen]]:
    groups: dict[str, list[WindowSeen]] = {}
    for window in windows:
        kind = "simulated" if window.case.startswith("simulated") else "real"
        groups.setdefault(f"{window.member}, {kind}", []).append(window)
    return groups


@contextmanager
def _watching(case: PreparedCase, member: NnunetV2Member, seen: list[WindowSeen]) -> Iterator[None]:
    """While a case is predicted with all flips, take note of its windows by the first pass and by all."""
    original = engine._answers

    def spy(windows: Any, runner: Any, config: Any, passes: Any) -> torch.Tensor:
        passed: list[torch.Tensor] = []

        def keeping(windows: torch.Tensor, flips: Any) -> torch.Tensor:
            answer: torch.Tensor = runner(windows, flips)
            passed.append(answer.clone() if not passed else passed[0])
            return answer

        watched: Any = keeping
        answers, plain = original(windows, watched, config, passes), passed[0]
        for one, all_flips in zip(plain.softmax(1), answers.softmax(1), strict=True):
            here, there = one[0] < 0.5, all_flips[0] < 0.5
            certainty = float(one.amax(0).min())
            seen.append(WindowSeen(case.name, member.name, certainty, int(there.sum()), int((here != there).sum())))
        return answers

    engine._answers = spy
    try:
        yield
    finally:
        engine._answers = original


def _fused(predictions: dict[str, MemberPrediction]) -> np.ndarray:
    return fuse({name: p.probability for name, p in predictions.items()}, "majority", MIN_DISPUTED_ML).mask.array


def _row(
    case: str, member: str, mode: str, mask: np.ndarray, reference: np.ndarray, cpu: float = 0.0, error: float = 0.0
) -> Row:
    differ = int((mask != reference).sum())
    return Row(case, member, mode, int(mask.sum()), differ, float(dice(reference, mask)), cpu, error)


def _error(probability: np.ndarray, reference: np.ndarray) -> float:
    doubt = (reference > 0.2) & (reference < 0.8)
    return float(np.abs(probability - reference)[doubt].mean()) if doubt.any() else 0.0


def _timed(run: Callable[[], MemberPrediction]) -> tuple[MemberPrediction, float]:
    started = time.process_time()
    return run(), time.process_time() - started


def prepared_cases(real: Path, simulated: int, cache: Path | None = None) -> Iterator[PreparedCase]:
    """Real cases, and the first of training's simulated ones."""
    found = real_cases(real) if real.is_dir() else ()
    for truth in chain(found, simulated_cases(simulated, SHARED, cache)):
        yield prepare_raw(truth.raw)


if __name__ == "__main__":
    main()
