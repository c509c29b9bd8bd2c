"""`listen`: a DICOM node. Studies arrive by C-STORE, results are returned by C-STORE, and a status page shows progress."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from ensemble.errors import InputRefused, UsageError
from ensemble.folders import exclusive_writer, unwritable_error
from ensemble.hospital.node import DicomNode, NodeConfig
from ensemble.hospital.segmentation_process import ProcessDied, SegmentationProcess, StudyJob
from ensemble.hospital.send import Destination, ResultSender, is_ae_title
from ensemble.hospital.spool import MAX_ATTEMPTS, Spool, StudyJournal
from ensemble.hospital.status import StatusServer, check_ports
from ensemble.serve.worker import CaseDone, CaseFailed, WorkerConfig
from ensemble.text import TrustedLines

log = logging.getLogger(__name__)

#: Seconds between looks for a study that is complete, and until results that could not be written are tried again.
_LOOK_S, _AGAIN_S = 0.2, 5.0


@dataclass(frozen=True)
class ListenConfig:
    """The options of `listen`."""

    address: NodeConfig
    to: tuple[Destination, ...]
    spool: Path
    most_bytes: int
    quiet_s: float
    keep_s: float
    status_port: int

    def __post_init__(self) -> None:
        if odd := [aet for aet in (self.address.aet, *self.address.callers) if not is_ae_title(aet)]:
            raise UsageError(
                "an AE title (--aet, --allow) must have 1 to 16 ASCII characters, no backslash, not only spaces",
                found=repr(odd[0]),
            )
        if not self.to:
            raise UsageError("no destination is given for the results", do="add --send-to AET@HOST:PORT")
        for option, value, allowed, accepted in (
            ("--quiet-seconds", self.quiet_s, "more than 0 and at most 3600", 0 < self.quiet_s <= 3600),
            ("--keep-hours", self.keep_s / 3600, "0 or more", self.keep_s >= 0),
            ("--spool-gb", self.most_bytes / 1e9, "more than 0", self.most_bytes > 0),
        ):
            if not accepted:
                raise UsageError(f"{option} must be {allowed}", found=f"{value:g}")
        if self.address.most_associations < 1:
            raise UsageError("--most-associations must be at least 1", found=str(self.address.most_associations))
        check_ports(self.address.port, self.status_port)


def listen(config: ListenConfig, worker_config: WorkerConfig) -> None:
    """Receive and segment studies until a signal. Raises UserError if ports, spool or members can't be opened."""
    with exclusive_writer(config.spool):
        try:
            spool = Spool(config.spool, config.most_bytes)
        except OSError as error:
            raise unwritable_error(config.spool, error) from error
        process = SegmentationProcess(worker_config)
        page = StatusServer(config.address.host, config.status_port, spool, lambda: process.ready is not None)
        node = DicomNode(config.address, spool, config.quiet_s)
        sender = ResultSender(spool, config.address.aet, config.to)
        page.start()
        node.start()
        sender.start()
        log.info(
            "listening as %s on port %d; results go to %s; status page on port %d",
            config.address.aet,
            node.port,
            ", ".join(map(str, config.to)),
            page.port,
        )
        try:
            process.open()
            log.info("ready; members: %s", ", ".join(process.ready.members if process.ready else ()))
            while True:
                try:
                    _look(config, spool, process)
                except OSError as error:  # a full disk, say, which passes
                    log.error("the spool can't be written: %s; next try in %.0f s", error.strerror or error, _AGAIN_S)
                    time.sleep(_AGAIN_S)
        finally:
            node.stop()
            process.close()
            sender.stop()
            page.stop()


def _look(config: ListenConfig, spool: Spool, process: SegmentationProcess) -> None:
    """Process the next complete study, if there is one."""
    spool.forget_finished(config.keep_s)
    study = spool.next_complete(config.quiet_s)
    if study is None:
        time.sleep(_LOOK_S)
        return
    if study.attempts >= MAX_ATTEMPTS:
        spool.end(study.key, "failed", f"it was started {study.attempts} times, but never finished", "see the log")
        return
    _segment(study, spool, process)


def _segment(study: StudyJournal, spool: Spool, process: SegmentationProcess) -> None:
    key = study.key
    log.info("study %s: segmenting %d images", key[:12], study.images)
    try:
        with spool.taken(key) as images:
            answer = process.segment(StudyJob(f"study-{key[:12]}", images, *spool.results_folder(key)))
    except ProcessDied as died:
        again = spool.died(key)
        log.error("study %s: the segmenting process died (%s)%s", key[:12], died, "; again" if again else "")
        if not again:
            spool.end(key, "failed", f"the segmenting process died ({died})", "give it more memory")
        return
    except BaseException:
        spool.interrupted(key)
        raise
    if isinstance(answer, CaseFailed) and answer.exit_code == UsageError.exit_code:  # the disk may be full: that passes
        log.error("study %s: %s; next try in %.0f s", key[:12], TrustedLines(answer), _AGAIN_S)
        time.sleep(_AGAIN_S)
    elif isinstance(answer, CaseDone):
        spool.done_with(key, int(answer.summary["lesions"]), float(answer.summary["lesion_ml"]))
        log.info("study %s: %d lesions, %.2f ml", key[:12], answer.summary["lesions"], answer.summary["lesion_ml"])
    else:
        _refuse(key, answer, spool)


def _refuse(key: str, answer: CaseFailed, spool: Spool) -> None:
    """Record a refusal. The status page shows only our own words; details may hold text of the images and go to the log alone."""
    refused = answer.exit_code == InputRefused.exit_code
    what = answer.what if answer.exit_code != 1 else "a bug in the tool; see the log"
    spool.end(key, "refused" if refused else "failed", what, answer.details.get("do", ""))
