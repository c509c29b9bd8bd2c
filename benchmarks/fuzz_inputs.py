"""Damaged files: does each end in a mask or a clean refusal, within 2 GB over the usual memory?

    python -m benchmarks.fuzz_inputs [--tries 10000] [--seed 0] [--networks 1000] [--journal FILE]

A small made-up case (48 x 56 x 20) in every kind of file that is read, DICOM archives among them. Each try damages DWI or ADC: it is cut
off, bits are flipped, a number of its header is replaced, its voxels get another size (of all axes or one), values become NaN, infinite,
hot or negative, or b-values are laid beside it. The case is read and prepared in a process of its own, and the prepared images are
thresholded in place of networks; every so many tries (--networks; 0 for never) the shipped members segment, without mirroring. A try
fails when it raises anything but a user's error that says what was found or what to do, crashes, hangs for a minute (ten with networks), or
asks for more than 2 GB of address space beyond what the undamaged case takes. A journal keeps what was tried, so that calling again goes
on. Printed: how the tries of each kind of damage ended, and which checks refused. Exit code 1 when a try failed (the damaged file is then
kept), or when less than a fifth ended in a mask.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from ensemble.config import RunConfig
from ensemble.errors import UserError
from ensemble.prepare.case import prepare_raw
from ensemble.readers.imagefile import read_case_files
from ensemble.types import AnyArray, Modality

SUFFIXES = (".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".nhdr", ".zip")
SURPLUS_BYTES, SECONDS = 2 << 30, 60
#: Share of the flips that hit the beginning, where headers are.
_HEADER, _HEADER_BYTES = 0.5, 700
MIN_MASKS = 0.2
MASK, REFUSED, FAILED = "mask", "refused", "failed"


@dataclass(frozen=True)
class Failure:
    """A try that ended as none should."""

    number: int
    kept: Path
    """The damaged file."""
    how: str


@dataclass
class Ends:
    """How tries ended."""

    counts: Counter[str]
    """Masks, refusals, failures."""
    by_damage: Counter[tuple[str, str]]
    """The same for each kind of damage."""
    checks: Counter[str]
    """What refused."""
    failures: list[Failure]


def fuzz(tries: int, seed: int, work: Path, networks_every: int = 0, journal: Path | None = None) -> Ends:
    """Run so many tries in `work`, but those that the journal knows. The same seed and number give the same damage."""
    _in_child(lambda: _write_case(work), limit=None)  # the parent never starts ITK's threads: a fork would lose them
    undamaged = {Modality.DWI: work / "dwi.mha", Modality.ADC: work / "adc.mha"}
    peak = work / "peak"
    _in_child(lambda: peak.write_text(str(_segment_and_peak(undamaged))), limit=None)
    limit = int(peak.read_text()) + SURPLUS_BYTES
    ends = Ends(Counter(), Counter(), Counter(), [])
    known = {entry["number"]: entry for entry in _entries(journal) if entry["seed"] == seed}
    for number in range(1, tries + 1):
        if number not in known:
            networks = networks_every > 0 and number % networks_every == 0
            known[number] = _try(seed, number, work, undamaged, limit, networks)
            if journal is not None:
                with journal.open("a") as file:
                    file.write(json.dumps(known[number]) + "\n")
        entry = known[number]
        how, check = entry["how"].split("\n")[0], ""
        if how.startswith(REFUSED):
            how, check = REFUSED, how.removeprefix(f"{REFUSED}: ")
        end = how if how in (MASK, REFUSED) else FAILED
        ends.counts[end] += 1
        ends.by_damage[entry["damage"], end] += 1
        ends.checks[check] += bool(check)
        if end == FAILED:
            ends.failures.append(Failure(number, Path(entry["kept"]), entry["how"]))
    return ends


def _entries(journal: Path | None) -> list[dict[str, Any]]:
    """What a journal holds; a last line that was cut off is none."""
    if journal is None or not journal.is_file():
        return []
    return [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]


def _try(
    seed: int, number: int, work: Path, undamaged: dict[Modality, Path], limit: int, networks: bool
) -> dict[str, Any]:
    draw = np.random.default_rng([seed, number])
    modality = (Modality.DWI, Modality.ADC)[int(draw.integers(2))]
    suffix = SUFFIXES[int(draw.integers(len(SUFFIXES)))]
    names, shares = zip(*DAMAGE.items(), strict=True)
    damage = str(draw.choice(names, p=shares))
    folder = Path(tempfile.mkdtemp(dir=work))
    damaged = folder / f"{modality}{suffix}"
    for source in work.glob(f"{modality}.*"):  # a header's data lie beside it
        if source.suffix in (damaged.suffix, ".gz", ".raw", ".zraw"):
            shutil.copy(source, folder)
    _in_child(lambda: _DAMAGES[damage](damaged, draw), limit=None)
    files = undamaged | {modality: damaged}
    # networks map their weights and start threads: the limit is for reading and preparing
    how = _in_child(lambda: _segment(files, networks), None if networks else limit)
    entry = {"seed": seed, "number": number, "damage": damage, "file": damaged.name, "how": how}
    if how != MASK and not how.startswith(REFUSED):
        entry["kept"] = str(shutil.copytree(folder, Path(tempfile.mkdtemp(prefix="fuzz-")) / "try"))
    shutil.rmtree(folder)
    return entry


def _write_case(work: Path) -> None:
    """A head with ventricles and a lesion, as image files of each kind and as archives of DICOM."""
    shape = (20, 56, 48)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    head = (x / 0.85) ** 2 + (y / 0.9) ** 2 + (z / 0.9) ** 2 < 1
    csf = (x / 0.25) ** 2 + (y / 0.4) ** 2 + (z / 0.4) ** 2 < 1
    lesion = (x - 0.5) ** 2 + (y + 0.2) ** 2 + z**2 < 0.04
    noise = np.random.default_rng(0).normal(1, 0.03, shape)
    arrays = {
        Modality.DWI: head * np.where(lesion, 600, np.where(csf, 100, 300)) * noise,
        Modality.ADC: head * np.where(lesion, 400, np.where(csf, 3000, 800)) * noise,
    }
    for modality, array in arrays.items():
        image = sitk.GetImageFromArray(array.round().astype(np.int16))
        image.SetSpacing((3.5, 3.5, 6.0))
        for suffix in SUFFIXES[:-1]:
            sitk.WriteImage(image, str(work / f"{modality}{suffix}"), suffix != ".nii")
        folder = work / f"{modality}-slices"
        _write_slices(image, folder, modality)
        shutil.make_archive(str(work / str(modality)), "zip", folder)


def _write_slices(image: sitk.Image, folder: Path, modality: Modality) -> None:
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    for number in range(image.GetSize()[2]):
        plane = image[:, :, number : number + 1]
        place = "\\".join(f"{mm:g}" for mm in plane.GetOrigin())
        uid = f"1.2.3.{1 + (modality is Modality.ADC)}"
        tags = {"0008|0016": "1.2.840.10008.5.1.4.1.1.4", "0008|0018": f"{uid}.{number}", "0020|000e": uid}
        tags |= {"0020|0032": place, "0020|0037": "1\\0\\0\\0\\1\\0", "0008|103e": str(modality)}
        for key, value in tags.items():
            plane.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{number:03d}.dcm"))
        writer.Execute(plane)


def _cut(path: Path, draw: np.random.Generator) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(draw.integers(len(content)))])


def _flip(path: Path, draw: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(int(draw.integers(1, 12))):
        end = min(_HEADER_BYTES, len(content)) if draw.random() < _HEADER else len(content)
        content[int(draw.integers(end))] ^= 1 << int(draw.integers(8))
    path.write_bytes(content)


def _other_number(path: Path, draw: np.random.Generator) -> None:
    """Another number in the place of one of the header's; of DICOM, a voxel size."""
    value = float(draw.choice(NUMBERS)) if draw.random() < 0.7 else float(np.exp(draw.normal(0, 3)))
    if path.suffix == ".zip":
        _rewrite(path, lambda image: image.SetSpacing([abs(value) if abs(value) > 1e-9 else 1e-9, 3.5, 6.0]))
    elif path.name.endswith((".nii", ".nii.gz")):
        packed = path.name.endswith(".gz")
        content = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
        offset, layout = NIFTI_FIELDS[int(draw.integers(len(NIFTI_FIELDS)))]
        within = {"h": 2**15 - 1, "B": 255}.get(layout)
        number = value if within is None else int(np.clip(np.nan_to_num(value), -within * (layout == "h"), within))
        struct.pack_into("<" + layout, content, offset, number)
        path.write_bytes(gzip.compress(bytes(content), 1) if packed else bytes(content))
    else:
        content = bytearray(path.read_bytes())
        end = min(len(content), _HEADER_BYTES)
        places = list(re.finditer(rb"(?<![\w.])-?\d+(\.\d+)?(?![\w.])", bytes(content[:end])))
        at = places[int(draw.integers(len(places)))]
        content[at.start() : at.end()] = f"{value:g}".encode()
        path.write_bytes(content)


def _scale(path: Path, draw: np.random.Generator) -> None:
    """Voxels of another size: of all axes, or one."""
    factor = float(draw.choice(SCALES)) if draw.random() < 0.7 else float(np.exp(draw.normal(0, 0.15)))
    axes = (0, 1, 2) if draw.random() < 0.5 else (int(draw.integers(3)),)

    def change(image: sitk.Image) -> None:
        image.SetSpacing([mm * (factor if axis in axes else 1) for axis, mm in enumerate(image.GetSpacing())])

    _rewrite(path, change)


def _values(path: Path, draw: np.random.Generator) -> None:
    """NaN, infinite, hot or negative values in a voxel, a row or a block, anywhere."""
    value = float(draw.choice(VALUES))
    kind = np.int16 if path.suffix == ".zip" else np.float32
    low, high = (np.iinfo(np.int16).min, np.iinfo(np.int16).max) if kind is np.int16 else (-3e38, 3e38)

    def change(array: AnyArray) -> AnyArray:
        array = array.astype(kind)
        start = [int(draw.integers(n)) for n in array.shape]
        length = [(1, 1, 1), (1, 1, 99), (4, 4, 4), (1, 99, 99)][int(draw.choice(4, p=(0.5, 0.2, 0.2, 0.1)))]
        where = tuple(slice(first, first + n) for first, n in zip(start, length, strict=True))
        array[where] = value if kind is np.float32 else np.clip(np.nan_to_num(value), low, high)
        return array

    _rewrite(path, lambda image: None, change)


def _b_values(path: Path, draw: np.random.Generator) -> None:
    name = path.name.split(".")[0]
    path.with_name(f"{name}.bval").write_text(B_VALUES[int(draw.integers(len(B_VALUES)))])


def _rewrite(
    path: Path, header: Callable[[sitk.Image], object], values: Callable[[AnyArray], AnyArray] = lambda array: array
) -> None:
    """The undamaged image with another header or other values, in the kind of file that the path names."""
    image = sitk.ReadImage(str(path.parent.parent / f"{path.name.split('.')[0]}.mha"))
    changed = sitk.GetImageFromArray(values(sitk.GetArrayFromImage(image)))
    changed.CopyInformation(image)
    header(changed)
    if path.suffix != ".zip":
        sitk.WriteImage(changed, str(path), path.suffix != ".nii")
        return
    folder = path.parent / "slices"
    _write_slices(changed, folder, Modality(path.name.split(".")[0]))
    shutil.make_archive(str(path.with_suffix("")), "zip", folder)


#: Kinds of damage and their shares.
DAMAGE = {"cut": 0.08, "flips": 0.22, "number": 0.2, "scale": 0.2, "values": 0.2, "b-values": 0.1}
_DAMAGES = {
    "cut": _cut,
    "flips": _flip,
    "number": _other_number,
    "scale": _scale,
    "values": _values,
    "b-values": _b_values,
}
NUMBERS = (0, -1, 1, 2, 3, 0.1, 10, 1e-3, 1e3, 1e-6, 1e6, 1e-30, 1e30, 255, 32767, float("nan"), float("inf"))
SCALES = (0.1, 10, 1e-3, 1e3, 0.01, 100, 0.5, 2, 3, 1 / 3, 1e-6, 1.2)
VALUES = (float("nan"), float("inf"), -float("inf"), 2.0**32, -(2.0**32), 65535, 3e38, -3e38, -1, 0, 4095, 1e-30)
B_VALUES = ("1000", "0", "2500", "0 1000", "", "nan", "a b", "1000 1000 1000", "-5", "500\n", "1e9")
#: Offsets and layouts of the numbers of a NIfTI-1 header.
NIFTI_FIELDS = (
    *((offset, "h") for offset in (40, 42, 44, 46, 48, 70, 72, 252, 254)),
    *((offset, "f") for offset in (76, 80, 84, 88, 92, 108, 112, 116, *range(256, 328, 4))),
    (123, "B"),
)


def _segment(files: dict[Modality, Path], networks: bool) -> AnyArray:
    """The mask; raises whatever goes wrong."""
    raw = read_case_files("fuzz", files)
    if networks:
        from ensemble.pipeline import load_from_config, segment_raw
        from ensemble.progress import SilentWatcher

        return segment_raw(
            raw, load_from_config(RunConfig(device="cpu", tta="none", skull_strip="never")), SilentWatcher()
        ).fused.mask.array
    case = prepare_raw(raw, "never")
    return (case.tissue_normalized[Modality.DWI].array > 1.5) & (case.tissue_normalized[Modality.ADC].array < 0.75)


def _segment_and_peak(files: dict[Modality, Path]) -> int:
    """Segment, then tell the most address space that it took, in bytes."""
    _segment(files, networks=False)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmPeak"))
    return int(line.split()[1]) * 1024


def _in_child(work: Callable[[], object], limit: int | None) -> str:
    """Run in a forked process with so much address space; how it ended: MASK, REFUSED and the check, or what went wrong."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(SECONDS if limit is not None else 10 * SECONDS)
        said = MASK
        try:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            work()
        except UserError as error:
            said = f"{REFUSED}: {error.what}" if error.found or error.do else f"a refusal that helps nobody: {error}"
        except BaseException:
            said = traceback.format_exc()[-3000:]
        finally:
            os.write(writer, said.encode(errors="replace"))
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return said or "ended without a word"


def main() -> None:
    parser = argparse.ArgumentParser(description="damaged files: a mask or a clean refusal?")
    parser.add_argument("--tries", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--networks", type=int, default=1000, metavar="N", help="every Nth try runs the shipped members"
    )
    parser.add_argument("--journal", type=Path, help="file that keeps what was tried")
    options = parser.parse_args()
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ends = fuzz(options.tries, options.seed, Path(folder), options.networks, options.journal)
    for failure in ends.failures:
        print(f"try {failure.number}: {failure.kept}\n{failure.how}\n")
    for damage in DAMAGE:
        print(f"{damage}: {_listed({end: ends.by_damage[damage, end] for end in (MASK, REFUSED, FAILED)})}")
    print("refused by:", *(f"  {count} {check}" for check, count in ends.checks.most_common()), sep="\n")
    seconds = time.perf_counter() - started
    print(f"{options.tries} tries (seed {options.seed}) in {seconds:.0f} s: {_listed(ends.counts)}")
    sys.exit(bool(ends.failures) or ends.counts[MASK] < MIN_MASKS * options.tries)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[end]} {end}" for end in (MASK, REFUSED, FAILED))


if __name__ == "__main__":
    main()
