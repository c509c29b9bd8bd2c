"""What `python -m benchmarks` found, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Results = Mapping[str, Any]


def write_markdown(results: Results) -> str:
    """RESULTS.md: tables by part."""
    load = max(results["load_before"], results.get("load_after", 0))
    lines = [
        "# Results",
        "",
        f"{results['date']}; {results['machine']}; load average up to {load:.1f}.",
        "",
        f"    {results['command']}",
        "",
    ]
    if load > results["cores"] + 0.5:
        lines += [
            "The machine ran other jobs: wall times and their ratios below mean nothing, CPU seconds (of one process, all its threads) do.",
            "",
        ]
    lines += [*(f"* {note}" for note in results.get("notes", ())), ""]
    for part, write in _PARTS.items():
        if part in results:
            lines += [*write(results[part]), ""]
    lines += ["![CPU time by mode, and growth](results.png)", "", "All cases and stages: [results.json](results.json)."]
    return "\n".join(lines) + "\n"


def _engines(tables: Sequence[Results]) -> list[str]:
    lines = [
        "## Same member, case and threads, turn by turn (files to mask)",
        "",
        "| member | mode | wall ratio, median (largest) | CPU ratio, median (largest) | Dice, smallest | start, CPU s | peak MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows: dict[tuple[str, str], list[Results]] = {}
    for table in tables:
        for row in table["rows"]:
            rows.setdefault((table["member"], row["mode"]), []).append(row)
    for (member, mode), found in rows.items():
        wall, cpu = ([row[f"{what}_ratio"] for row in found] for what in ("wall", "cpu"))
        lines.append(
            f"| {member} | {mode} | {median(wall):.2f} ({max(wall):.2f}) | {median(cpu):.2f} ({max(cpu):.2f}) "
            f"| {min(row['dice'] for row in found):.5f} | {max(row['start_cpu_s'] for row in found):.1f} "
            f"| {max(row['peak_mb'] for row in found):.0f} |"
        )
    return [*lines, "", "Ratio: time / nnUNetPredictor's. Dice: with its mask. Start: imports and weights."]


def _agreement(found: Results) -> list[str]:
    lines = [
        "## Masks of other modes against full mirroring in float32: smallest Dice of all cases",
        "",
        "| member | cases | gated | bf16 | no mirroring |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for member in dict.fromkeys(row["member"] for row in found["rows"]):
        of_mode: dict[str, list[float]] = {}
        for row in found["rows"]:
            if row["member"] == member:
                of_mode.setdefault(row["mode"], []).append(row["dice"])
        smallest = " | ".join(f"{min(of_mode[mode]):.4f}" for mode in ("gated", "bf16", "none"))
        lines.append(f"| {member} | {len(of_mode['gated'])} | {smallest} |")
    return lines


def _monai(found: Results) -> list[str]:
    lines = ["## MONAI's SlidingWindowInferer and our engine on one SegResNet (no mirroring; medians)", ""]
    if "skipped" in found:
        return [*lines, f"Not measured: {found['skipped']}"]
    lines += ["| engine | wall s | CPU s | mean difference of logits |", "| --- | ---: | ---: | ---: |"]
    return lines + [
        f"| {name} | {row['wall_s']:.2f} | {row['cpu_s']:.2f} | {row['mean_difference']:.1e} |"
        for name, row in found.items()
    ]


def _ensemble(rows: Sequence[Results]) -> list[str]:
    lines = [
        "## The shipped ensemble, files to mask",
        "",
        "| case | members | imports CPU s | weights CPU s | ready, wall s | first case, wall s | warm case, wall s (CPU s) | peak MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        start = row["start"]
        lines.append(
            f"| {row['case']} | {', '.join(row['members'])} | {start['imports cpu']:.2f} | {start['weights cpu']:.2f} "
            f"| {row['ready_wall_s']:.1f} | {row['first']['wall']:.1f} "
            f"| {row['warm']['wall']:.1f} ({row['warm']['cpu']:.1f}) | {row['peak_mb']:.0f} |"
        )
    return lines


def _growth(found: Sequence[Results]) -> list[str]:
    lines = [
        "## Growth with the brain's size (no mirroring, one process a size)",
        "",
        "| member | voxels | windows | CPU s | wall s | peak MB | formula MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for member in found:
        for row in member["rows"]:
            lines.append(
                f"| {member['member']} | {row['voxels']} | {row['windows']} | {row['cpu_s']:.2f} | {row['wall_s']:.2f} "
                f"| {row['peak_mb']:.0f} | {row['stated_mb']:.0f} |"
            )
    lines.append("")
    lines += [
        f"* {member['member']}: {_line(member['lines']['windows'], 1, 'window')}; "
        f"{_line(member['lines']['voxels'], 1e6, 'million voxels')}"
        for member in found
    ]
    return lines


def _line(line: Mapping[str, float], unit: float, name: str) -> str:
    return (
        f"{line['slope'] * unit:.3f} CPU s a {name} and {line['intercept_s']:.2f} s besides "
        f"(no size lies more than {line['farthest_s']:.2f} s off that line)"
    )


_PARTS: dict[str, Callable[[Any], list[str]]] = {
    "engines": _engines,
    "agreement": _agreement,
    "monai": _monai,
    "ensemble": _ensemble,
    "growth": _growth,
}


def plot(results: Results, path: Path) -> None:
    """Ratios by mode, and growth; nothing when neither was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not {"engines", "growth"} & set(results):
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for table in results.get("engines", []) for row in table["rows"]]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for at, mode in enumerate(modes):
        ratios = [row["cpu_ratio"] for row in rows if row["mode"] == mode]
        left.barh(at, sorted(ratios)[len(ratios) // 2], color="0.8")
        left.plot(ratios, [at] * len(ratios), "k.", markersize=4)
    left.set_yticks(range(len(modes)), modes)
    left.invert_yaxis()
    left.set_xlabel("CPU time / nnUNetPredictor's (dots: cases and members; bars: medians)")
    for member in results.get("growth", []):
        voxels = [row["voxels"] / 1e6 for row in member["rows"]]
        right.plot(voxels, [row["cpu_s"] for row in member["rows"]], "o-", label=member["member"])
    right.set_xlabel("million voxels")
    right.set_ylabel("CPU seconds, no mirroring")
    right.legend()
    FigureCanvasAgg(figure).print_png(str(path))
