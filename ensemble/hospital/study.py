"""`study`: segment one examination into mask, page and DICOM objects; also as a module of the mercure orchestrator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ensemble.config import ExtraOutputs
from ensemble.errors import InputRefused, UsageError
from ensemble.hospital.examination import ExaminationCase, read_examination
from ensemble.outputs.artifacts import SegmentedCase
from ensemble.outputs.dicom.study import require_one_study
from ensemble.outputs.layouts import folder, objects
from ensemble.pipeline import Ensemble, Watcher, segment_raw
from ensemble.program import command_line
from ensemble.publish import check_writable, publish_folder
from ensemble.readers.dicom.read import is_read_as_dicom

#: Variables by which mercure passes folders to a module (mercure documentation, "Processing modules"); no others are read.
IN_DIR, OUT_DIR = "MERCURE_IN_DIR", "MERCURE_OUT_DIR"

Load = Callable[[], Ensemble]


def segment_study(
    path: Path, out: Path, image_suffix: str, extras: ExtraOutputs, load: Load, watcher: Watcher
) -> SegmentedCase:
    """Segment the examination in a folder or .zip; write mask, page, report and DICOM objects into `out`, all or none.

    Raises as `read_examination` and `pipeline.segment_raw` do, and UsageError where they can't be written.
    """
    check_writable(out)
    case = _segmented(_read(path, path.name, extras), extras, load, watcher)
    folder.publish_run_outputs(case, extras, out, image_suffix)
    return case


def segment_into_objects(
    path: Path, name: str, out: Path, extras: ExtraOutputs, load: Load, watcher: Watcher
) -> SegmentedCase:
    """Segment an examination and write only DICOM objects into the folder `out` (mercure), all or none."""
    check_writable(out)
    case = _segmented(_read(path, name, extras), extras, load, watcher)
    objects.publish_dicom_objects(case, extras, out)
    return case


def segment_to_send(
    path: Path,
    name: str,
    target_and_scratch: tuple[Path, Path],
    extras: ExtraOutputs,
    ensemble: Ensemble,
    watcher: Watcher,
) -> SegmentedCase:
    """Segment an examination and write its DICOM objects into a new folder, which appears only when complete (`listen`)."""
    case = _segmented(_read(path, name, extras), extras, lambda: ensemble, watcher)
    target, scratch = target_and_scratch
    with publish_folder(target, scratch) as staging:
        objects.write_dicom_objects(case, extras, staging)
    return case


def mercure_folders(environment: Mapping[str, str]) -> tuple[Path, Path] | None:
    """Return the input and output folder that mercure sets; None outside mercure. Raises UsageError if only one is set."""
    given = {name: environment.get(name, "") for name in (IN_DIR, OUT_DIR)}
    if not any(given.values()):
        return None
    if lacking := [name for name, value in given.items() if not value]:
        raise UsageError(
            f"the environment variable {lacking[0]} is not set", do=f"set both {IN_DIR} and {OUT_DIR}, as mercure does"
        )
    return Path(given[IN_DIR]), Path(given[OUT_DIR])


def _read(path: Path, name: str, extras: ExtraOutputs) -> ExaminationCase:
    if not is_read_as_dicom(path):
        raise InputRefused(
            "no examination was found",
            where=path,
            found="neither a folder nor a .zip" if path.exists() else "nothing is there",
            do="give a folder or .zip of DICOM; for image files such as NIfTI, use instead: "
            f"{command_line('run --dwi FILE --adc FILE --out DIR')}",
        )
    examined = read_examination(path, name)
    require_one_study(examined.raw, extras)
    return examined


def _segmented(examined: ExaminationCase, extras: ExtraOutputs, load: Load, watcher: Watcher) -> SegmentedCase:
    ensemble = load()
    return SegmentedCase.of(
        examined.raw, segment_raw(examined.raw, ensemble, watcher), ensemble, extras, examined.record
    )
