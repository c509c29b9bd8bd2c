"""What `python -m benchmarks` found, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.agreement import tables

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
    return "\n".join(lines).rstrip() + "\n"


def _engines(tables: Sequence[Results]) -> list[str]:
    lines = [
        "## Same member, case and threads, turn by turn (files to mask; medians; ratio = time / nnUNetPredictor's)",
        "",
        "| case | member | mode | wall s | CPU s | wall ratio | CPU ratio | Dice | voxels that differ | peak MB |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for table in tables:
        for row in table["rows"]:
            lines.append(
                f"| {table['case']} | {table['member']} | {row['mode']} | {row['wall_s']:.2f} | {row['cpu_s']:.2f} "
                f"| {row['wall_ratio']:.2f} | {row['cpu_ratio']:.2f} | {row['dice']:.5f} "
                f"| {row['differ']} of {row['voxels']} | {row['peak_mb']:.0f} |"
            )
    lines += [
        "",
        "Dice is that of a mode's mask with nnUNetPredictor's. Worst of all cases and members above:",
        "",
        "| mode | wall ratio, largest | CPU ratio, largest | Dice, smallest | start (imports and weights), CPU s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    rows = [row for table in tables for row in table["rows"]]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        of_mode = [row for row in rows if row["mode"] == mode]
        lines.append(
            f"| {mode} | {max(r['wall_ratio'] for r in of_mode):.2f} | {max(r['cpu_ratio'] for r in of_mode):.2f} "
            f"| {min(r['dice'] for r in of_mode):.5f} | {max(r['start_cpu_s'] for r in of_mode):.1f} |"
        )
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
    lines += ["", "Stages of the warm case (s; read and write in CPU s, the others wall):", ""]
    for row in rows:
        stages = ", ".join(f"{name.removesuffix(' cpu')} {spent:.2f}" for name, spent in row["warm"]["stages"].items())
        lines.append(f"* {row['case']}, {len(row['members'])} member(s): {stages}")
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
    "agreement": tables,
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
