"""Segment the cases of a dataset one after the other, for commands that use all results together (`members fit-reference`, `diagnose`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from ensemble.batch.layouts import FoundCase
from ensemble.errors import InputRefused, MembersFailed
from ensemble.pipeline import Ensemble, Result, segment_raw
from ensemble.progress import SilentWatcher
from ensemble.readers.imagefile import read_case_files

log = logging.getLogger(__name__)


def segment_each(cases: Sequence[FoundCase], ensemble: Ensemble) -> Iterator[Result]:
    """Yield the result of each case in order. A case that is refused, or for which members fail, is skipped with a log message."""
    for number, case in enumerate(cases, start=1):
        try:
            if case.problem is not None:
                raise case.problem
            result = segment_raw(read_case_files(case.name, case.files), ensemble, SilentWatcher())
        except (InputRefused, MembersFailed) as error:
            log.warning("%s is skipped: %s", case.name, error)
            continue
        yield result
        log.info("%s: %d of %d", case.name, number, len(cases))
