"""One case of the contract: images in, mask and results below the output root."""

from __future__ import annotations

from pathlib import Path

from ensemble.config import EXTRAS, Extras
from ensemble.contract.isles22 import RESULTS, ContractCase, earlier_masks, refuse_unknown_masks
from ensemble.outputs.extras import write_extras
from ensemble.pipeline import Ensemble, Result, Watcher, segment
from ensemble.publish import publish, write_json, write_volume
from ensemble.readers.base import RawCase


def execute(
    found: ContractCase, raw: RawCase, output_root: Path, ensemble: Ensemble, extras: Extras, watcher: Watcher
) -> Result:
    """Segment a case and publish its outputs, all or nothing; those of an earlier case in the same folder go.

    Raises as `pipeline.segment` does; InputRefused when the files were exchanged meanwhile; UsageError where another mask lies.
    """
    refuse_unknown_masks(output_root, found)
    result = segment(raw, ensemble, watcher)
    found.refuse_if_changed()
    with publish(output_root, replaces=(*earlier_masks(output_root), *EXTRAS)) as staging:
        write_volume(result.fused.mask, staging / found.mask_path)
        write_extras(raw, result, ensemble, extras, staging, ".mha")
        write_json(found.results, staging / RESULTS)
    return result
