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
        "| member | mode | wall time, median (largest) | CPU time, median (largest) | Dice, smallest | peak MB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    rows: dict[tuple[str, str], list[Results]] = {}
    for table in tables:
        for row in table["rows"]:
            rows.setdefault((table["member"], row["mode"]), []).append(row)
    for (member, mode), found in rows.items():
        wall, cpu = ([row[f"{what}_ratio"] for row in found] for what in ("wall", "cpu"))
        lines.append(
            f"| {member} | {mode} | {median(wall):.2f} ({max(wall):.2f}) | {median(cpu):.2f} ({max(cpu):.2f}) "
            f"| {min(row['dice'] for row in found):.5f} | {max(row['peak_mb'] for row in found):.0f} |"
        )
    return [*lines, "", "Times are shares of nnUNetPredictor's, Dice is with its mask."]


def _agreement(found: Results) -> list[str]:
    smallest: dict[str, float] = {}
    for row in found["rows"]:
        if row["member"] == "ensemble":
            smallest[row["mode"]] = min(row["dice"], smallest.get(row["mode"], 1.0))
    cases = sum(row["member"] == "ensemble" and row["mode"] == "gated" for row in found["rows"])
    dice = ", ".join(f"{mode} {smallest[mode]:.4f}" for mode in ("gated", "bf16", "none"))
    return [f"The ensemble's mask against that of full mirroring in float32, smallest Dice of {cases} cases: {dice}."]


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
        "## The shipped ensemble, all members, full mirroring in float32, files to mask",
        "",
        "| case | until ready, s | first case, s | next cases, s (CPU s) | peak MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    most = max(len(row["members"]) for row in rows)
    for row in rows:
        if len(row["members"]) == most:
            lines.append(
                f"| {row['case']} | {row['ready_wall_s']:.1f} | {row['first']['wall']:.1f} "
                f"| {row['warm']['wall']:.1f} ({row['warm']['cpu']:.1f}) | {row['peak_mb']:.0f} |"
            )
    return lines


def _growth(found: Sequence[Results]) -> list[str]:
    return [
        "## Growth with the brain's size (no mirroring)",
        "",
        "| member | voxels | windows | CPU s | CPU s a window, and besides | peak MB | formula MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_growth_row(member) for member in found),
    ]


def _growth_row(member: Results) -> str:
    rows, line = member["rows"], member["lines"]["windows"]
    first, last = rows[0], rows[-1]
    ranges = " | ".join(
        f"{first[key]:{style}}-{last[key]:{style}}"
        for key, style in (("voxels", "d"), ("windows", "d"), ("cpu_s", ".1f"))
    )
    memory = " | ".join(f"{first[key]:.0f}-{last[key]:.0f}" for key in ("peak_mb", "stated_mb"))
    return f"| {member['member']} | {ranges} | {line['slope']:.3f}, {line['intercept_s']:.2f} | {memory} |"


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
