"""The output of `members list` and `members check`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ensemble.config import RunConfig
from ensemble.errors import UsageError, UserError
from ensemble.families.base import InferenceSettings
from ensemble.families.registry import family_of
from ensemble.families.spec import MemberSpec
from ensemble.members.listing import describe_member
from ensemble.members.manifest import find_members, find_unsupported, open_member, verify_files
from ensemble.types import Modality, ignore_progress

log = logging.getLogger(__name__)

#: Below this, masks of one network by two programs differ by more than rounding (nnU-Net adds up windows in float16).
MIN_DICE = 0.999
_HEADINGS = ("name", "kind", "folds", "images", "spacing", "intensities", "licence", "size")


def log_members(config: RunConfig) -> tuple[MemberSpec, ...]:
    """Log a table of the members in the weights folder, and of other recognised weights. Returns the members."""
    specs = find_members(config.weights_folder, config.members)
    rows, remarks = [_HEADINGS], []
    for spec in specs:
        found = describe_member(spec)
        rows.append(
            (
                spec.name,
                spec.kind,
                _ranges(found.folds) or "?",
                ",".join(found.images) or "?",
                "x".join(f"{mm:.4g}" for mm in found.spacing_mm) + " mm" if found.spacing_mm else "?",
                spec.intensities,
                spec.licence or "not stated",
                f"{found.size_bytes / 1e6:.1f} MB",
            )
        )
        if spec.weight != 1:
            remarks.append(f"{spec.name}: its vote has the weight {spec.weight:g} (--member-weights)")
        if spec.min_lesion_ml:
            remarks.append(f"{spec.name}: it removes lesions below {spec.min_lesion_ml:g} ml (--min-lesion-ml)")
        remarks += [f"{spec.name}: {remark}" for remark in found.remarks]
    if config.platform_note:
        log.info("note: %s", config.platform_note)
    log.info("members in %s:", config.weights_folder)
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        log.info("  %s", "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for remark in remarks:
        log.info("  ! %s", remark)
    for other in find_unsupported(config.weights_folder):
        log.info("  not supported yet, does not vote: %s (%s, %s)", other.name, other.what, other.folder)
    return specs


def check_members(config: RunConfig, specs: Sequence[MemberSpec]) -> bool:
    """Load each member in turn and log whether it works. Returns True if all do."""
    from ensemble.inference.device import resolve_device

    settings = InferenceSettings.of(config, resolve_device(config.device))
    broken = 0
    for spec in specs:
        started = time.perf_counter()
        try:
            verify_files(spec, anew=True)
            open_member(spec, settings)
        except UserError as error:
            broken += 1
            log.info("%s: broken\n  %s", spec.name, error)
        else:
            files = "files unaltered" if spec.sha256 else "files of unknown origin (no digests)"
            log.info("%s: ok, loaded in %.1f s, %s", spec.name, time.perf_counter() - started, files)
    log.info("%s", f"{broken} of {len(specs)} members are broken" if broken else "all loaded")
    return not broken


def compare_members(config: RunConfig, specs: Sequence[MemberSpec], name: str, files: Mapping[Modality, Path]) -> None:
    """Segment one case with each member and with the program that its weights come from, and log the differences.

    Raises InputRefused for the case, WeightsBroken, and UsageError where there is nothing to compare with.
    """
    from ensemble.inference.device import resolve_device
    from ensemble.metrics import dice
    from ensemble.prepare.case import prepare_for_run
    from ensemble.readers.imagefile import read_case_files

    peers = {spec.name: peer for spec in specs if (peer := family_of(spec).reference()) is not None}
    if not peers:
        raise UsageError(
            "no member can be compared: --compare supports only nnU-Net v2 members",
            where=config.weights_folder,
            found=", ".join(f"{spec.name} is of kind {spec.kind}" for spec in specs),
            do="select nnU-Net v2 members (--weights, --members), or remove --compare",
        )
    settings = InferenceSettings.of(config, resolve_device(config.device))
    case = prepare_for_run(read_case_files(name, files), config, settings.device)
    for spec in specs:
        if spec.name not in peers:
            log.info("%s: not compared, because its kind is %s", spec.name, spec.kind)
            continue
        member = open_member(spec, settings)
        if lacking := ", ".join(sorted(modality.label for modality in member.requires - case.modalities)):
            log.info("%s: not compared, needs %s", spec.name, lacking)
            continue
        ours = member.predict(case, settings, ignore_progress).probability.array
        theirs = peers[spec.name].probability(member, case, settings)
        same, largest = dice(theirs > 0.5, ours > 0.5), float(abs(ours - theirs).max())
        log.info(
            "%s: compared with %s on %s: mask Dice %.5f, largest difference of probabilities %.2g",
            *(spec.name, peers[spec.name].title, case.name, same, largest),
        )
        if not same >= MIN_DICE:
            log.warning("%s: the masks differ by more than rounding errors (Dice below %g)", spec.name, MIN_DICE)


def _ranges(folds: Sequence[str]) -> str:
    """Write numbered folds in short: 0-4, or 0,2,3."""
    numbers = [int(fold) for fold in folds if fold.isdecimal()]
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(folds)
