"""One case of the ISLES'22 contract: read the images, write mask and results below the output root."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ensemble.config import ExtraOutputs
from ensemble.contract.isles22 import ContractCase
from ensemble.outputs.artifacts import SegmentedCase
from ensemble.outputs.dicom.study import require_one_study
from ensemble.outputs.layouts.contract import publish_contract_outputs, refuse_unknown_masks
from ensemble.pipeline import Ensemble, Result, Watcher, segment_raw
from ensemble.publish import check_writable
from ensemble.readers.base import RawCase
from ensemble.readers.imagefile import read_case_files


def run_case(
    found: ContractCase, output_root: Path, load: Callable[[], Ensemble], extras: ExtraOutputs, watcher: Watcher
) -> Result:
    """Read, segment and publish a case, in exec and invoke mode alike. Raises as `read_case_files`, `load` and `segment_and_publish` do.

    Networks are loaded last, so that a bad file or folder is refused at once.
    """
    check_writable(output_root)
    raw = read_case_files(found.name, found.files)
    require_one_study(raw, extras)
    return segment_and_publish(found, raw, output_root, load(), extras, watcher)


def segment_and_publish(
    found: ContractCase, raw: RawCase, output_root: Path, ensemble: Ensemble, extras: ExtraOutputs, watcher: Watcher
) -> Result:
    """Segment a case and publish its outputs, all or none. Outputs of an earlier case in the same folder are removed.

    Raises as `pipeline.segment_raw` does; InputRefused if the input files changed during the run; UsageError if the
    output folder holds a mask that this program did not write.
    """
    refuse_unknown_masks(output_root, found.mask_name)
    result = segment_raw(raw, ensemble, watcher, shows_images=extras.show_images)
    found.refuse_if_changed()
    publish_contract_outputs(
        SegmentedCase.of(raw, result, ensemble, extras), extras, output_root, found.mask_name, found.results
    )
    return result
