"""Truncated and bit-flipped files: does each end in a mask or a clean refusal, within 2 GB over the usual memory?

    python -m benchmarks.fuzz_inputs [--tries 10000] [--seed 0] [--networks 1000]

A small made-up case (48 x 56 x 20) in every kind of file that is read, DICOM archives among them. Each try damages DWI or ADC, reads
and prepares the case in a process of its own, and thresholds the prepared images in place of networks; every so many tries (--networks;
0 for never) the shipped members segment instead, without mirroring. A try fails when it raises anything but a user's error, crashes,
hangs for a minute (ten with networks), or asks for more than 2 GB of address space beyond what the undamaged case takes. Damage that
leaves a readable file (a flipped bit in an uncompressed voxel) rightly gives a mask. Exit code 1 when a try failed; the damaged file is
then kept.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ensemble.case import prepare
from ensemble.config import RunConfig
from ensemble.errors import UserError
from ensemble.readers.imagefile import read_case
from ensemble.types import AnyArray, Modality

SUFFIXES = (".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".nhdr", ".zip")
SURPLUS_BYTES, SECONDS = 2 << 30, 60
#: Shares of the tries that are cut off, and of the flips that hit the beginning, where headers are.
_CUT, _HEADER, _HEADER_BYTES = 0.3, 0.5, 700
MASK, REFUSED, FAILED = "mask", "refused", "failed"


@dataclass(frozen=True)
class Failure:
    """A try that ended as none should."""

    number: int
    kept: Path
    """The damaged file."""
    how: str


def fuzz(tries: int, seed: int, work: Path, networks_every: int = 0) -> tuple[Counter[str], list[Failure]]:
    """Run so many tries in `work`. Returns how they ended, and those that failed; the same seed gives the same damage."""
    draw = np.random.default_rng(seed)
    _in_child(lambda: _write_case(work), limit=None)  # the parent never starts ITK's threads: a fork would lose them
    undamaged = {Modality.DWI: work / "dwi.mha", Modality.ADC: work / "adc.mha"}
    peak = work / "peak"
    _in_child(lambda: peak.write_text(str(_segment_and_peak(undamaged))), limit=None)
    limit = int(peak.read_text()) + SURPLUS_BYTES
    counts: Counter[str] = Counter()
    failures: list[Failure] = []
    for number in range(1, tries + 1):
        modality = (Modality.DWI, Modality.ADC)[int(draw.integers(2))]
        suffix = SUFFIXES[int(draw.integers(len(SUFFIXES)))]
        damaged = _damage(work / f"{modality}{suffix}", draw)
        files = undamaged | {modality: damaged}
        networks = networks_every > 0 and number % networks_every == 0
        # networks map their weights and start threads: the limit is for reading and preparing
        how = _in_child(lambda files=files, networks=networks: _segment(files, networks), None if networks else limit)  # type: ignore[misc]
        counts[how if how in (MASK, REFUSED) else FAILED] += 1
        if how not in (MASK, REFUSED):
            kept = Path(tempfile.mkdtemp(prefix="fuzz-")) / damaged.name
            shutil.copy(damaged, kept)
            failures.append(Failure(number, kept, how))
    return counts, failures


def _write_case(work: Path) -> None:
    """A head with ventricles and a lesion, as image files of each kind and as archives of DICOM."""
    shape = (20, 56, 48)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    head = (x / 0.85) ** 2 + (y / 0.9) ** 2 + (z / 0.9) ** 2 < 1
    fluid = (x / 0.25) ** 2 + (y / 0.4) ** 2 + (z / 0.4) ** 2 < 1
    lesion = (x - 0.5) ** 2 + (y + 0.2) ** 2 + z**2 < 0.04
    noise = np.random.default_rng(0).normal(1, 0.03, shape)
    arrays = {
        Modality.DWI: head * np.where(lesion, 600, np.where(fluid, 100, 300)) * noise,
        Modality.ADC: head * np.where(lesion, 400, np.where(fluid, 3000, 800)) * noise,
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


def _damage(path: Path, draw: np.random.Generator) -> Path:
    """A damaged copy, under a name that keeps a header beside its data file."""
    content = bytearray(path.read_bytes())
    if draw.random() < _CUT:
        content = content[: int(draw.integers(len(content)))]
    else:
        for _ in range(int(draw.integers(1, 12))):
            end = min(_HEADER_BYTES, len(content)) if draw.random() < _HEADER else len(content)
            content[int(draw.integers(end))] ^= 1 << int(draw.integers(8))
    damaged = path.with_name(f"damaged-{path.name}")
    damaged.write_bytes(content)
    return damaged


def _segment(files: dict[Modality, Path], networks: bool) -> AnyArray:
    """The mask; raises whatever goes wrong."""
    raw = read_case("fuzz", files)
    if networks:
        from ensemble.pipeline import load, segment
        from ensemble.progress import Silent

        return segment(raw, load(RunConfig(device="cpu", tta="none", skull_strip="never")), Silent()).fused.mask.array
    case = prepare(raw, "never")
    return (case.physical[Modality.DWI].array > 1.5) & (case.physical[Modality.ADC].array < 0.75)


def _segment_and_peak(files: dict[Modality, Path]) -> int:
    """Segment, then tell the most address space that it took, in bytes."""
    _segment(files, networks=False)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmPeak"))
    return int(line.split()[1]) * 1024


def _in_child(work: Callable[[], object], limit: int | None) -> str:
    """Run in a forked process with so much address space; how it ended: MASK, REFUSED, or what went wrong."""
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
        except UserError:
            said = REFUSED
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
    options = parser.parse_args()
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts, failures = fuzz(options.tries, options.seed, Path(folder), options.networks)
    for failure in failures:
        print(f"try {failure.number}: {failure.kept}\n{failure.how}\n")
    ends = ", ".join(f"{counts[end]} {end}" for end in (MASK, REFUSED, FAILED))
    print(f"{options.tries} tries (seed {options.seed}) in {time.perf_counter() - started:.0f} s: {ends}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
