"""All side-by-side timings in one command; the last results stand in RESULTS.md.

    python -m benchmarks --cases ../shared/cases --rounds 4 --threads 2 [--only engines,ensemble,growth,monai] [--write]

engines   (a) ours in every mode and nnU-Net's predictor on each shipped member, turn by turn (see engines.py)
monai     (b) our engine and MONAI's SlidingWindowInferer on one TorchScript SegResNet (skipped, saying so, without MONAI)
ensemble  (c) the whole shipped ensemble: cold by stage, warm by stage, with each number of members, peak memory
growth    (d) seconds and memory on 1, 2, 4, 8 times the voxels
agreement masks of all modes on real and simulated cases (see agreement.py; simulated ones need ../shared)

`--merge A/results.json B/results.json` writes RESULTS.md from several runs. On a machine with a GPU, `--device cuda --full-size` runs (a)
on a full-size 3d_fullres of random weights with five folds.
Wall time counts on an idle machine; on a busy one only CPU seconds mean something: the load average is printed with the results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import agreement, engines, monai_inferer
from benchmarks.growth import growth
from benchmarks.results import plot, write_markdown
from ensemble.config import SHIPPED_WEIGHTS
from ensemble.members.manifest import find_members
from ensemble.types import Modality

HERE = Path(__file__).resolve().parent
PARTS = ("engines", "agreement", "monai", "ensemble", "growth")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.merge:
        merged = _merged([json.loads(path.read_text()) for path in options.merge])
        _write(merged | {"notes": [*merged["notes"], *options.note]})
        return
    command = shlex.join(["python", "-m", "benchmarks", *(sys.argv[1:] if arguments is None else arguments)])
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "machine": _machine(options.threads),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "notes": options.note,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for part in options.only:
            print(f"== {part}", flush=True)
            results[part] = _PARTS[part](options, Path(scratch) / part)
            results["load_after"] = os.getloadavg()[0]
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "results.json").write_text(json.dumps(results))
    plot(results, options.out / "results.png")
    print(write_markdown(results))
    if options.write:
        _write(results)


def _write(results: Mapping[str, Any]) -> None:
    (HERE / "RESULTS.md").write_text(write_markdown(results))
    (HERE / "results.json").write_text(json.dumps(results) + "\n")
    plot(results, HERE / "results.png")


def _merged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Runs of several commands on one machine as one: their tables one after the other."""
    merged: dict[str, Any] = dict(runs[0])
    for run in runs[1:]:
        merged["command"] += "\n    " + run["command"]
        merged["load_before"] = max(merged["load_before"], run["load_before"])
        merged["load_after"] = max(merged["load_after"], run["load_after"])
        merged["notes"] = list(dict.fromkeys([*merged.get("notes", ()), *run.get("notes", ())]))
        for part in PARTS:
            if isinstance(run.get(part), list):
                merged[part] = merged.get(part, []) + run[part]
            elif part in run:
                merged[part] = run[part]
    return merged


def _engines(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    if options.full_size:
        return full_size_rows(options, scratch)
    tables = []
    modes = [mode for mode in engines.MODES if mode.name in options.modes]
    for name, files in _cases(options).items():
        for spec in find_members(options.weights, options.members):
            takes_flair = any("FLAIR" in channel.upper() for channel in spec.channels or ())
            if takes_flair and Modality.FLAIR not in files:
                continue
            # both engines get what the member takes, and no more
            taken = {
                modality: path for modality, path in files.items() if takes_flair or modality is not Modality.FLAIR
            }
            rows = engines.table(
                engines.compare(
                    spec.name,
                    taken,
                    modes,
                    weights=options.weights,
                    threads=options.threads,
                    rounds=options.rounds,
                    device=options.device,
                    scratch=scratch / name / spec.name,
                )
            )
            tables.append({"case": name, "member": spec.name, "rows": rows})
            for row in rows:
                print(name, spec.name, {key: value for key, value in row.items() if key != "stages"}, flush=True)
    return tables


def full_size_folder(scratch: Path, folds: tuple[str, ...] = ("0", "1", "2", "3", "4")) -> Path:
    """nnU-Net's usual 3d_fullres with random weights."""
    sys.path.insert(0, str(HERE.parent / "test"))
    from nnunet_folders import FolderSpec, build_folder

    return build_folder(
        scratch / "full_size",
        FolderSpec(
            patch=(128, 128, 128),
            spacing_mm=(1.0, 1.0, 1.0),
            features=32,
            strides=((1, 1, 1), *((2, 2, 2),) * 5),
            folds=folds,
        ),
    )


def full_size_rows(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Ours and nnUNetPredictor on five such folds: times only, the masks mean nothing."""
    folder, tables = full_size_folder(scratch), []
    for name, files in _cases(options).items():
        modes = [mode for mode in engines.MODES if mode.name in ("nnUNetPredictor", "ours", "ours, gated")]
        (spec,) = find_members(folder.parent)
        measured = engines.compare(
            spec.name,
            files,
            modes,
            weights=folder.parent,
            threads=options.threads,
            rounds=options.rounds,
            device=options.device,
            scratch=scratch / name,
        )
        tables.append({"case": name, "member": "full size, 5 folds, random weights", "rows": engines.table(measured)})
    return tables


def ensemble_rows(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Cold start by stage, then warm cases, with one member, two, and all."""
    scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    names = [spec.name for spec in find_members(options.weights, options.members)]
    for case, files in _cases(options).items():
        counts = [names] if case != next(iter(_cases(options))) else [names[:n] for n in range(1, len(names) + 1)]
        for members in counts:
            job = {
                "engine": "ours",
                "threads": options.threads,
                "device": options.device,
                "tta": "mirror",
                "precision": "auto",
                "session": "auto",
                "weights": str(options.weights),
                "members": members,
                "files": {str(modality): str(path) for modality, path in files.items()},
            }
            started = time.perf_counter()
            worker = engines.Worker(job, scratch, f"{case}_{len(members)}")
            ready = time.perf_counter() - started
            runs = [worker.run() for _ in range(max(2, options.rounds))]
            worker.close()
            first, *warm = runs
            warm.sort(key=lambda run: run["wall"])
            row = {
                "case": case,
                "members": members,
                "ready_wall_s": ready,
                "start": worker.loaded["stages"],
                "first": first,
                "warm": warm[len(warm) // 2],
                "peak_mb": runs[-1]["peak_mb"],
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def _growth(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Of the first 3-D and the first 2-D member."""
    return [growth(options.weights, member, options.threads) for member in options.growth_members.split(",")]


def _agreement(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    cases = agreement.prepared_cases(options.cases, options.simulated)
    return list(agreement.run(cases, options.weights, options.threads))[-1]


def _monai(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    return monai_inferer.compare(options.threads, options.rounds, options.device)


_PARTS = {"engines": _engines, "agreement": _agreement, "monai": _monai, "ensemble": ensemble_rows, "growth": _growth}


def _cases(options: argparse.Namespace) -> dict[str, dict[Modality, Path]]:
    """Folders with dwi, adc, perhaps flair, as .nii.gz or .mha; or those given by another program."""
    if options.files:
        return dict(options.files)
    cases = {}
    for folder in sorted(path for path in options.cases.iterdir() if path.is_dir()):
        images = {p.name.split(".")[0]: p for p in sorted(folder.iterdir()) if p.name.endswith((".nii.gz", ".mha"))}
        files = {modality: images[modality.value] for modality in Modality if modality.value in images}
        if Modality.DWI in files and (not options.case or folder.name in options.case):
            cases[folder.name] = files
    return cases


def _machine(threads: int) -> str:
    cpu = next(
        (row.split(":")[1].strip() for row in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in row),
        "unknown processor",
    )
    import torch

    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu}{amx}, {len(os.sched_getaffinity(0))} cores, {threads} threads used, {gpu}, torch {torch.__version__}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="All side-by-side timings.")
    parser.add_argument("--cases", type=Path, default=HERE.parent.parent / "shared" / "cases", help="folder of cases")
    parser.add_argument("--case", action="append", help="only this case of the folder (may be repeated)")
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS)
    parser.add_argument("--members", type=lambda text: tuple(text.split(",")), help="only these")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--modes", type=lambda text: text.split("|"), default=[mode.name for mode in engines.MODES])
    parser.add_argument("--growth-members", default="iso3d,slice2d")
    parser.add_argument("--simulated", type=int, default=6, help="how many simulated cases for agreement")
    parser.add_argument("--rounds", type=int, default=4, help="the first one warms up and isn't counted")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--full-size", action="store_true", help="(a) with five folds of a full-size network instead")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "benchmarks")
    parser.add_argument("--write", action="store_true", help="into benchmarks/RESULTS.md, results.json and results.png")
    parser.add_argument(
        "--merge", type=Path, nargs="+", help="write RESULTS.md from results.json of several runs instead"
    )
    parser.add_argument("--note", action="append", default=[], help="a sentence for RESULTS.md (may be repeated)")
    parser.set_defaults(files={})
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"no part is called {', '.join(unknown)}")
    return options


if __name__ == "__main__":
    main()
