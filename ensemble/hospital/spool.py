"""The spool of studies: images, results and a journal for each, all on disk before anything is acknowledged.

A kill at any moment loses nothing: an image is acknowledged once it and the journal are on disk; a study changes its state by a single
rename; unfinished files are in `scratch` and deleted at the next start. A step that the journal records as done is not repeated.

    receiving -> working -> sending -> done          a study that went well
                         -> refused, failed          one that did not: visible, until it is sent again
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from ensemble.errors import UserError
from ensemble.files import read_json
from ensemble.publish import flush_to_disk, write_text_atomically

log = logging.getLogger(__name__)

State = Literal["receiving", "working", "sending", "done", "refused", "failed"]
FINISHED: tuple[State, ...] = ("done", "refused", "failed")
#: Of one study; more is an archive, not an examination (as `readers/dicom/files.py` has it).
MAX_IMAGES = 20_000
#: Studies in the spool, finished ones too.
MAX_STUDIES = 5_000
#: How often a study may be begun, and how often the process that segments may die of it.
MAX_ATTEMPTS, MAX_DEATHS = 20, 3
#: Left free on the disk, for journals and results.
SPARE_BYTES = 256 << 20
_JOURNAL, _IMAGES, _RESULTS, _TAKEN = "journal.json", "images", "results", "taken"


class SpoolFull(Exception):
    """There is no room for an image; the sender must try again later."""


@dataclass(frozen=True)
class StudyJournal:
    """The journal of a study. It contains no patient name or ID."""

    key: str
    """Of its folder."""
    uid: str
    state: State = "receiving"
    since: str = ""
    """When it came into this state, UTC."""
    received: str = ""
    """When its first image came."""
    images: int = 0
    passed_over: int = 0
    """Objects that are no MR images, which were not kept."""
    unfinished: bool = False
    """Whether an association is in the midst of sending it, or broke off."""
    turned_away: tuple[str, ...] = ()
    """Images that found no room and have not come again, by digest."""
    taken: tuple[str, ...] = ()
    """The image files from which results were made, or for which the failure was found."""
    attempts: int = 0
    deaths: int = 0
    what: str = ""
    """Why there are no results, or why they have not been sent yet; contains no text from outside."""
    do: str = ""
    lesion_ml: float | None = None
    lesions: int | None = None
    sent: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By destination: the SOP instances that it has acknowledged."""
    offered: dict[str, str] = field(default_factory=dict)
    """By destination: the SOP instance that was sent to it last, acknowledged or not."""
    tries: int = 0
    """Failures of sending in a row."""


class Spool:
    """The folder in which received studies wait, and their journals. Methods may be called from any thread."""

    def __init__(self, root: Path, most_bytes: int, now: Callable[[], float] = time.monotonic) -> None:
        self.root = root
        self._most_bytes, self._now = most_bytes, now
        self._lock = threading.RLock()
        self._scratch = root / "scratch"
        self._studies: dict[str, StudyJournal] = {}
        self._last: dict[str, float] = {}  # when the last image of a study came
        self._senders: dict[str, set[int]] = {}  # associations in the midst of sending a study
        self._broken: set[str] = set()  # studies of which one has broken off, and no other has begun since
        self._bytes = 0
        shutil.rmtree(self._scratch, ignore_errors=True)
        for folder in (self._scratch, root / "studies"):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in sorted((root / "studies").iterdir()):
            self._take_up(folder)

    def studies(self) -> list[StudyJournal]:
        """Return all studies, the latest first."""
        with self._lock:
            return sorted(self._studies.values(), key=lambda study: (study.received, study.key), reverse=True)

    def folder(self, key: str) -> Path:
        return self.root / "studies" / key

    @property
    def used_bytes(self) -> int:
        """Return the disk space that images use."""
        return self._bytes

    # receiving

    def keep(self, uid: str, instance: str, content: bytes, sender: int) -> None:
        """Store an image. On return, it and the journal of its study are on disk.

        A repeated image changes nothing, except that a study without results is tried again. Raises SpoolFull, OSError.
        """
        name = f"{_digest(instance.encode())}-{_digest(content)}.dcm"
        with self._lock:
            study = self._begun(uid, sender)
            folder = self.folder(study.key) / _IMAGES
            known = (folder / name).exists()
            images = study.images
            if not known:
                self._make_room(study, name, len(content))
                images += 1 - self._store(folder, name, content)
            waiting = tuple(digest for digest in study.turned_away if not name.startswith(digest))
            self._last[study.key] = self._now()
            if known and study.state in ("working", "sending", "done"):
                return
            received = replace(_afresh(study), turned_away=waiting)
            if received != study:  # the number of images is counted anew at each start
                self._note(received)
            self._studies[study.key] = replace(received, images=images)

    def pass_over(self, uid: str, sender: int) -> None:
        """Count an object that is not kept."""
        with self._lock:
            study = self._begun(uid, sender)
            self._note(replace(study, passed_over=study.passed_over + 1))
            self._last[study.key] = self._now()

    def end_of(self, sender: int, *, released: bool) -> None:
        """Note that an association has ended. If not by a release, the study may lack images."""
        with self._lock:
            for key, senders in list(self._senders.items()):
                if sender not in senders:
                    continue
                senders.discard(sender)
                if not released:
                    self._broken.add(key)
                if not senders:
                    del self._senders[key]
                    study = self._studies[key]
                    if key not in self._broken and study.unfinished:
                        self._note(replace(study, unfinished=False))

    def _begun(self, uid: str, sender: int) -> StudyJournal:
        key = _digest(uid.encode())
        study = self._studies.get(key)
        if study is None:
            if len(self._studies) >= MAX_STUDIES and not self._forget_oldest():
                raise SpoolFull(f"{MAX_STUDIES} studies are in the spool")
            (self.folder(key) / _IMAGES).mkdir(parents=True, exist_ok=True)
            flush_to_disk(self.root / "studies")
            study = StudyJournal(key, uid, since=_utc(), received=_utc(), unfinished=True)
            self._note(study)
        elif sender not in self._senders.get(key, ()) and not study.unfinished:
            study = replace(study, unfinished=True)
            self._note(study)
        if sender not in self._senders.setdefault(key, set()):
            self._senders[key].add(sender)
            self._broken.discard(key)
        return study

    def _make_room(self, study: StudyJournal, name: str, needed: int) -> None:
        """Remove finished studies, oldest first, until there is room. Raises SpoolFull and records the image that was rejected."""
        while not self._has_room(needed):
            if not self._forget_oldest(study.key):
                self._turn_away(study, name)
                raise SpoolFull(f"{self._bytes / 1e9:.1f} GB of images are waiting")
        if study.images >= MAX_IMAGES:
            self._turn_away(study, name)
            raise SpoolFull(f"the study has {study.images} images")

    def _has_room(self, needed: int) -> bool:
        return self._bytes + needed <= self._most_bytes and shutil.disk_usage(self.root).free - needed >= SPARE_BYTES

    def _turn_away(self, study: StudyJournal, name: str) -> None:
        digest = name.partition("-")[0]
        if digest not in study.turned_away and len(study.turned_away) < MAX_IMAGES:
            self._note(replace(_afresh(study), turned_away=(*study.turned_away, digest)))
        self._last[study.key] = self._now()

    def _store(self, folder: Path, name: str, content: bytes) -> int:
        """Write an image to disk. Returns how many it replaces: the same instance with other contents."""
        draft = self._scratch / uuid4().hex
        try:
            draft.write_bytes(content)
            flush_to_disk(draft)
            older = list(folder.glob(f"{name.partition('-')[0]}-*"))
            draft.replace(folder / name)
            for path in older:  # the same instance with other content: the last word counts
                self._bytes -= path.stat().st_size
                path.unlink()
            flush_to_disk(folder)
            self._bytes += len(content)
            return len(older)
        finally:
            draft.unlink(missing_ok=True)

    # working

    def next_complete(self, quiet_s: float) -> StudyJournal | None:
        """Return a study for which no image has arrived for a while, or one interrupted by a restart; None if there is none.

        A study that certainly lacks images is refused here.
        """
        with self._lock:
            for study in sorted(self._studies.values(), key=lambda each: each.received):
                if study.state == "working":
                    return study
                if study.state != "receiving":
                    continue
                sending = bool(self._senders.get(study.key))
                if self._now() - self._last.get(study.key, self._now()) < quiet_s * (2 if sending else 1):
                    continue
                if study.turned_away:
                    what = f"{len(study.turned_away)} of its images were rejected by the full spool and not sent again"
                    self._end(study, "refused", what, "send the study again")
                elif study.unfinished and not sending:
                    self._end(study, "refused", "its transfer was interrupted", "send the study again")
                elif study.images == 0:
                    self._end(study, "refused", "it has no MR images", "send DWI and ADC (and FLAIR)")
                else:
                    return study
            return None

    @contextmanager
    def taken(self, key: str) -> Iterator[Path]:
        """Yield a folder with the present images for the duration of the block; the journal marks the study as being processed."""
        with self._lock:
            study, images = self._studies[key], self.folder(key) / _IMAGES
            names = tuple(_names(images))
            self._note(_now_in(replace(study, taken=names, attempts=study.attempts + 1, what="", do=""), "working"))
            work = self._scratch / f"{_TAKEN}-{uuid4().hex}"
            work.mkdir()
            for name in names:
                os.link(images / name, work / name)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def results_of(self, key: str) -> list[Path]:
        """Return the objects to be sent."""
        folder = self.folder(key) / _RESULTS
        return sorted(folder.glob("*.dcm")) if folder.is_dir() else []

    def results_folder(self, key: str) -> tuple[Path, Path]:
        """Return the folder for results, and a scratch folder on the same disk."""
        return self.folder(key) / _RESULTS, self._scratch

    def done_with(self, key: str, lesions: int, lesion_ml: float) -> None:
        """Mark the results of a study as ready to send, unless more images have arrived meanwhile."""
        with self._lock:
            if (study := self._settled(key)) is not None:
                self._note(_now_in(replace(study, lesions=lesions, lesion_ml=lesion_ml, tries=0), "sending"))

    def end(self, key: str, state: State, what: str, do: str = "") -> None:
        """Close a study without results and record why, unless more images have arrived meanwhile."""
        with self._lock:
            if (study := self._settled(key)) is not None:
                self._end(study, state, what, do)

    def _end(self, study: StudyJournal, state: State, what: str, do: str) -> None:
        self._note(_now_in(replace(study, what=what, do=do), state))
        log.warning("study %s %s: %s%s", study.key[:12], state, what, f"; {do}" if do else "")

    def interrupted(self, key: str) -> None:
        """Do not count an attempt that was interrupted by a shutdown."""
        with self._lock:
            study = self._studies[key]
            self._note(replace(study, attempts=max(study.attempts - 1, 0)))

    def died(self, key: str) -> bool:
        """Record that the segmenting process died on a study. Returns whether it may be tried again."""
        with self._lock:
            study = replace(self._studies[key], deaths=self._studies[key].deaths + 1)
            self._note(study)
            return study.deaths < MAX_DEATHS

    def _settled(self, key: str) -> StudyJournal | None:
        """Return a study that is being processed; None if more images arrived meanwhile, which makes its outcome invalid."""
        study = self._studies[key]
        if study.state != "working" or tuple(_names(self.folder(key) / _IMAGES)) != study.taken:
            log.info("study %s: more images arrived; it will be segmented again", key[:12])
            return None
        return study

    # sending

    def offer(self, key: str, destination: str, instance: str) -> None:
        """Record that an object is about to be sent. Without an acknowledgement the destination must be asked later whether it has it."""
        with self._lock:
            study = self._studies[key]
            if study.offered.get(destination) != instance:
                self._note(replace(study, offered={**study.offered, destination: instance}))

    def sent(self, key: str, destination: str, instance: str) -> None:
        """Record that a destination acknowledged an object."""
        with self._lock:
            study = self._studies[key]
            told = study.sent.get(destination, ())
            if instance not in told:
                self._note(replace(study, sent={**study.sent, destination: (*told, instance)}))

    def sent_all(self, key: str, since: str) -> None:
        """Record that all destinations have all results since a given time."""
        with self._lock:
            study = self._studies[key]
            if study.state == "sending" and study.since == since:
                self._note(_now_in(replace(study, what="", do="", tries=0), "done"))

    def not_sent(self, key: str, what: str) -> None:
        """Record why results could not be sent."""
        with self._lock:
            study = self._studies[key]
            if study.state == "sending":
                self._note(replace(study, what=what, do="it is tried again", tries=study.tries + 1))

    # forgetting

    def forget_finished(self, older_than_s: float) -> None:
        """Remove studies that finished longer ago than this."""
        with self._lock:
            now = datetime.now(UTC)
            for study in list(self._studies.values()):
                if (
                    study.state in FINISHED
                    and (now - datetime.fromisoformat(study.since)).total_seconds() > older_than_s
                ):
                    self._forget(study)

    def _forget_oldest(self, but: str = "") -> bool:
        finished = [study for study in self._studies.values() if study.state in FINISHED and study.key != but]
        if not finished:
            return False
        self._forget(min(finished, key=lambda study: study.since))
        return True

    def _forget(self, study: StudyJournal) -> None:
        folder = self.folder(study.key)
        self._bytes -= sum(path.stat().st_size for path in (folder / _IMAGES).glob("*.dcm"))
        gone = self._scratch / f"gone-{uuid4().hex}"
        folder.rename(gone)  # at once, so that no half of it is ever found
        shutil.rmtree(gone, ignore_errors=True)
        del self._studies[study.key]
        self._last.pop(study.key, None)
        self._senders.pop(study.key, None)
        self._broken.discard(study.key)

    # the journal

    def _note(self, study: StudyJournal) -> None:
        folder = self.folder(study.key)
        write_text_atomically(folder / _JOURNAL, json.dumps(asdict(study), indent=1) + "\n", self._scratch)
        self._studies[study.key] = study
        flush_to_disk(folder)

    def _take_up(self, folder: Path) -> None:
        """Resume a study that an earlier process left behind."""
        images = folder / _IMAGES
        try:
            study = _parsed(read_json(folder / _JOURNAL))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if not any(images.glob("*.dcm")):  # it was killed before any image was acknowledged
                shutil.rmtree(folder, ignore_errors=True)
                return
            raise UserError(
                "the journal of a study can't be read",
                where=folder / _JOURNAL,
                found=str(error)
                if isinstance(error, OSError | ValueError)
                else "JSON that is not the journal of a study",
                do="move its folder out of the spool, then send the study again",
            ) from error
        _remove_older(images)
        names = tuple(_names(images))
        self._bytes += sum((images / name).stat().st_size for name in names)
        self._studies[study.key] = study
        self._last[study.key] = self._now()
        if study.state not in ("receiving",) and names != study.taken and (names or study.taken):
            self._note(replace(_afresh(study), images=len(names)))  # an image came, and the kill before its note
        elif study.images != len(names):
            self._note(replace(study, images=len(names)))


def _afresh(study: StudyJournal) -> StudyJournal:
    """Return a study to be processed again; the record of what was sent is kept."""
    if study.state == "receiving":
        return study
    return _now_in(replace(study, what="", do="", attempts=0, deaths=0, tries=0), "receiving")


def _now_in(study: StudyJournal, state: State) -> StudyJournal:
    return replace(study, state=state, since=_utc())


def _parsed(content: Any) -> StudyJournal:
    known = {each.name for each in fields(StudyJournal)}
    told = {name: value for name, value in content.items() if name in known}
    for name in ("turned_away", "taken"):
        told[name] = tuple(told.get(name, ()))
    told["sent"] = {where: tuple(instances) for where, instances in told.get("sent", {}).items()}
    return StudyJournal(**told)


def _names(images: Path) -> Sequence[str]:
    return sorted(path.name for path in images.glob("*.dcm"))


def _remove_older(images: Path) -> None:
    """Remove the older content of instances, left by a kill between writing the new one and removing the old."""
    newest: dict[str, Path] = {}
    for path in sorted(images.glob("*.dcm"), key=lambda each: each.stat().st_mtime_ns):
        instance = path.name.partition("-")[0]
        if instance in newest:
            newest[instance].unlink()
        newest[instance] = path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _utc() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
