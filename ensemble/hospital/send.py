"""Send results by C-STORE: each object once to each destination, retried until it is acknowledged.

An object whose acknowledgement was not heard, or not put on record before a kill, may have arrived: C-FIND asks the destination first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pydicom
from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind  # type: ignore[attr-defined]

from ensemble.errors import UsageError
from ensemble.hospital.node import storage_contexts
from ensemble.hospital.spool import Spool, StudyJournal

log = logging.getLogger(__name__)

#: Seconds until a failure is tried again: twice as long each time, up to the last.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 2.0, 600.0
_CONNECT_S, _ANSWER_S = 10.0, 60.0


@dataclass(frozen=True)
class Destination:
    """A DICOM node that receives results."""

    aet: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.aet}@{self.host}:{self.port}"


def parse_destinations(text: str) -> tuple[Destination, ...]:
    """Parse AET@HOST:PORT, several separated by commas. Raises UsageError."""
    return tuple(_destination(part.strip()) for part in text.split(",") if part.strip())


def _destination(text: str) -> Destination:
    aet, _, address = text.partition("@")
    host, _, port = address.rpartition(":")
    if not (is_ae_title(aet) and host and port.isdigit() and 0 < int(port) < 65536):
        raise UsageError("a destination for the results is not valid", found=text, do="use --send-to AET@HOST:PORT")
    return Destination(aet, host.strip("[]"), int(port))


def is_ae_title(text: str) -> bool:
    """Return whether a text is a valid AE title (PS3.5 6.2): 1 to 16 ASCII characters, no backslash, not only spaces."""
    return 0 < len(text) <= 16 and text.isascii() and text.isprintable() and "\\" not in text and bool(text.strip())


class ResultSender:
    """A thread that sends results to all destinations."""

    def __init__(self, spool: Spool, aet: str, to: Sequence[Destination]) -> None:
        self._spool, self._aet, self._to = spool, aet, to
        self._next: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(_ANSWER_S)

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            for study in self._spool.studies():
                if study.state != "sending" or time.monotonic() < self._next.get(study.key, 0.0):
                    continue
                wait = min(_FIRST_WAIT_S * 2 ** min(study.tries, 16), _LONGEST_WAIT_S)
                self._next[study.key] = time.monotonic() + wait
                try:
                    self._try(study, wait)
                except Exception:  # whatever is wrong with one study, others are to be sent, and this one again
                    log.exception("study %s: its results could not be sent; next try in %.0f s", study.key[:12], wait)

    def _try(self, study: StudyJournal, wait: float) -> None:
        failures = [why for to in self._to if (why := self._send(study, to))]
        if not failures:
            self._spool.sent_all(study.key, study.since)
            log.info("study %s: results sent", study.key[:12])
            return
        self._spool.not_sent(study.key, "; ".join(failures))
        log.warning("study %s: results not sent: %s; next try in %.0f s", study.key[:12], "; ".join(failures), wait)

    def _send(self, study: StudyJournal, to: Destination) -> str:
        """Send the objects that a destination has not acknowledged. Returns the error; empty if all were sent."""
        told = set(study.sent.get(str(to), ()))
        objects = [pydicom.dcmread(path) for path in self._spool.results_of(study.key)]
        objects = [dataset for dataset in objects if dataset.SOPInstanceUID not in told]
        if not objects:
            return ""
        ae = AE(ae_title=self._aet)
        ae.requested_contexts = storage_contexts([dataset.SOPClassUID for dataset in objects])
        perhaps_there = study.offered.get(str(to))
        if perhaps_there:
            ae.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
        ae.connection_timeout, ae.acse_timeout, ae.dimse_timeout = _CONNECT_S, _CONNECT_S, _ANSWER_S
        association = ae.associate(to.host, to.port, ae_title=to.aet)
        if not association.is_established:
            return f"{to} {'rejects us' if association.is_rejected else 'does not answer'}"
        failures: dict[str, None] = {}
        try:
            for dataset in objects:
                instance = str(dataset.SOPInstanceUID)
                if instance == perhaps_there and _holds(association, dataset):
                    self._spool.sent(study.key, str(to), instance)
                    continue
                self._spool.offer(study.key, str(to), instance)
                try:
                    status = association.send_c_store(dataset).get("Status", None)
                except ValueError:
                    failures[f"{to} does not accept {dataset.SOPClassUID.name}"] = None
                    continue
                except RuntimeError:
                    failures[f"{to} ended the association"] = None
                    break
                if status is None:  # it may have arrived, and is asked for before it or another one is sent
                    failures[f"{to} did not answer"] = None
                    break
                if status == 0x0000 or status >> 12 == 0xB:  # success, or a warning
                    self._spool.sent(study.key, str(to), instance)
                else:
                    failures[f"{to} answered with status {status:04X}"] = None
        finally:
            if association.is_established:
                association.release()
        return "; ".join(failures)


def _holds(association: Association, dataset: Dataset) -> bool:
    """Return whether a destination confirms that it holds an object (C-FIND, PS3.4 C.6.2); False if it can't be asked."""
    asked = Dataset()
    asked.QueryRetrieveLevel = "IMAGE"
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(asked, name, str(getattr(dataset, name)))
    try:
        answers = association.send_c_find(asked, StudyRootQueryRetrieveInformationModelFind)
        found = [str(answer.get("SOPInstanceUID", "")) for _, answer in answers if answer is not None]
    except (ValueError, RuntimeError):  # it has not accepted the question
        return False
    return asked.SOPInstanceUID in found
