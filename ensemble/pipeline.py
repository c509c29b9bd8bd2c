"""The main path: images of one case in, fused lesion mask out.

load(config)  ->  Ensemble                        load the networks, once
segment(raw, ensemble)  ->  Result                prepare the case, let each member predict, fuse
segment_prepared(prepared, ensemble)  ->  Result  the same for a case that is already prepared (batches prepare ahead)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ensemble.config import RunConfig
from ensemble.errors import InputRefused, MembersFailed, UsageError
from ensemble.families.base import InferenceSettings, Member, MemberPrediction
from ensemble.families.spec import MemberSpec
from ensemble.fusion import FusedPrediction, fuse
from ensemble.inference.device import resolve_device
from ensemble.members.listing import describe_member
from ensemble.members.manifest import apply_member_defaults, find_members, find_unsupported, open_member, weight_digests
from ensemble.memory import MORE_MEMORY, is_out_of_memory
from ensemble.metrics import lesion_count, volume_ml
from ensemble.prepare.case import PreparedCase, prepare_for_run
from ensemble.readers.base import RawCase
from ensemble.types import FloatArray, Modality
from ensemble.volume import Volume

log = logging.getLogger(__name__)

#: Beginning of the reason if a member failed because memory ran out.
_NO_ROOM = "not enough memory"


class Watcher(Protocol):
    """Receives progress: shown as a progress bar, as log lines, or not at all."""

    def stage(self, name: str) -> None:
        """Handle the start of a stage."""

    def windows(self, done: int, total: int) -> None:
        """Handle the number of windows predicted so far, and the total, within a member's stage."""


@dataclass(frozen=True)
class Ensemble:
    """The loaded members, ready for any number of cases."""

    config: RunConfig
    settings: InferenceSettings
    specs: tuple[MemberSpec, ...]
    members: tuple[Member, ...]
    seconds: float
    """How long loading took."""
    digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By member: SHA-256 of each file that determines its predictions."""
    takes_flair: bool = True
    """Whether a member uses FLAIR, or the trust score does."""


@dataclass(frozen=True)
class MemberOutcome:
    """What happened to one member in one case. A missing prediction stays missing: nothing ever replaces it."""

    member: str
    status: Literal["voted", "failed", "not applicable"]
    seconds: float = 0.0
    reason: str = ""
    """Why it did not vote; or, if it voted, which input it lacked."""
    prediction: MemberPrediction | None = None


@dataclass(frozen=True)
class Result:
    """The segmentation of a case, with everything that reports and outputs need."""

    case: PreparedCase
    outcomes: tuple[MemberOutcome, ...]
    fused: FusedPrediction
    lesion_ml: float
    lesion_count: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by stage."""

    @property
    def mask(self) -> Volume:
        """The lesion, bool, on the grid of the DWI."""
        return self.fused.mask

    @property
    def probability(self) -> Volume:
        """Mean lesion probability of the members that voted, float32, on the grid of the DWI."""
        return self.fused.mean


def load_from_config(config: RunConfig) -> Ensemble:
    """Load the configured members.

    Raises WeightsBroken when a member can't be loaded, since none is omitted silently. Raises UsageError when more members must vote than
    exist.
    """
    started = time.perf_counter()
    settings = InferenceSettings.of(config, resolve_device(config.device))
    if config.platform_note:
        log.info("note: %s", config.platform_note)
    specs = find_members(config.weights_folder, config.members)
    if config.min_members is not None and config.min_members > len(specs):
        raise UsageError(
            "--min-members asks for more members than there are",
            found=f"--min-members {config.min_members}, members: {len(specs)} ({', '.join(spec.name for spec in specs)})",
            do="lower --min-members, or let more members take part (--members, --weights)",
        )
    config = apply_member_defaults(config, specs)
    for other in find_unsupported(config.weights_folder):
        log.warning("not supported yet, does not vote: %s (%s)", other.name, other.what)
    members = tuple(open_member(spec, settings) for spec in specs)
    described = {spec.name: describe_member(spec) for spec in specs}
    for name, summary in described.items():
        for remark in summary.remarks:
            log.info("note: member %s: %s", name, remark)
    digests = {spec.name: weight_digests(spec) for spec in specs}
    # a network that does not state its channels may take any
    takes_flair = config.trust or any(
        not shown.images or any(Modality.FLAIR.label in image for image in shown.images) for shown in described.values()
    )
    return Ensemble(config, settings, specs, members, time.perf_counter() - started, digests, takes_flair)


def segment_raw(raw: RawCase, ensemble: Ensemble, watcher: Watcher, *, shows_images: bool = True) -> Result:
    """Segment one case as read. FLAIR is registered only if a member takes it, or an output shows it (`shows_images`).

    Raises InputRefused when the images can't be segmented safely, MembersFailed when fewer members voted than required.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "prepare", watcher):
        needed = shows_images or ensemble.takes_flair
        case = prepare_for_run(raw, ensemble.config, ensemble.settings.device, flair_is_needed=needed)
    return segment_prepared(case, ensemble, watcher, seconds)


def segment_prepared(
    case: PreparedCase, ensemble: Ensemble, watcher: Watcher, spent: Mapping[str, float] | None = None
) -> Result:
    """Segment a prepared case. `spent` is the wall time (s) of earlier stages. Raises as `segment_raw` does."""
    seconds = dict(spent or {})
    for repair in case.repairs:
        log.info("note: %s", repair)
    outcomes: list[MemberOutcome] = []
    for member in ensemble.members:
        with _timed(seconds, f"member {member.name}", watcher):
            outcomes.append(_predict_member(member, case, ensemble.settings, watcher))
    _require_votes(outcomes, ensemble.config.min_members)
    with _timed(seconds, "fuse", watcher):
        predictions = {o.member: o.prediction.probability for o in outcomes if o.prediction is not None}
        config = ensemble.config
        fused = fuse(
            predictions,
            config.fusion,
            config.min_disputed_ml or 0.0,
            weights=config.member_weights,
            min_lesion_ml=config.min_lesion_ml or 0.0,
        )
        mask, spacing = fused.mask.array, case.grid.spacing_zyx_mm
        if fused.small:
            log.info("note: %d lesion(s) smaller than %g ml removed", fused.small, config.min_lesion_ml)
        if fused.dropped_components:
            log.info(
                "note: %d disputed lesion(s) below %g ml removed: the members' mean probability is low in all their voxels",
                fused.dropped_components,
                config.min_disputed_ml,
            )
        result = Result(case, tuple(outcomes), fused, volume_ml(mask, spacing), lesion_count(mask), seconds)
    return result


def _predict_member(member: Member, case: PreparedCase, settings: InferenceSettings, watcher: Watcher) -> MemberOutcome:
    """Return one member's prediction, or the reason why there is none."""
    if missing := member.requires - case.modalities:
        needs = ", ".join(sorted(modality.label for modality in missing))
        log.info("member %s is not applicable: needs %s", member.name, needs)
        return MemberOutcome(member.name, "not applicable", reason=f"needs {needs}")
    started = time.perf_counter()
    try:
        prediction = member.predict(case, settings, watcher.windows)
        if prediction.probability.grid != case.grid:
            raise RuntimeError("its probabilities are not on the DWI grid")
        if not _are_probabilities(prediction.probability.array):
            raise RuntimeError("it returned values outside 0 to 1")
    except InputRefused as refused:
        refused.notes += (f"refused by member {member.name}",)
        raise
    except Exception as error:
        # whatever a member raises is an outcome on record; whether the others may vote is policy
        short = is_out_of_memory(error)
        log.error("member %s failed%s", member.name, f": {_NO_ROOM}: {error}" * short, exc_info=not short)
        reason = f"{f'{_NO_ROOM}: ' * short}{type(error).__name__}: {error}"
        return MemberOutcome(member.name, "failed", time.perf_counter() - started, reason)
    return MemberOutcome(member.name, "voted", time.perf_counter() - started, prediction.remark, prediction)


def _are_probabilities(array: FloatArray) -> bool:
    """Return whether all values lie in 0..1, up to rounding. NaN does not."""
    return bool(array.min() >= -1e-4 and array.max() <= 1 + 1e-4)


def _require_votes(outcomes: list[MemberOutcome], min_members: int | None) -> None:
    """Raise MembersFailed unless enough members voted: `min_members`, or by default every applicable one."""
    voted = [o.member for o in outcomes if o.status == "voted"]
    required = min_members if min_members is not None else sum(o.status != "not applicable" for o in outcomes)
    if len(voted) >= max(required, 1):
        return
    silent = "; ".join(f"{o.member} {o.status} ({o.reason})" for o in outcomes if o.status != "voted")
    raise MembersFailed(
        f"{len(voted)} of {len(outcomes)} members voted; {max(required, 1)} are required",
        found=silent,
        do=f"{MORE_MEMORY if _NO_ROOM in silent else 'fix the cause (see the log)'}, or accept fewer votes with --min-members",
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str, watcher: Watcher) -> Iterator[None]:
    watcher.stage(stage)
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = round(time.perf_counter() - started, 3)
