"""The DICOM node: what it keeps, refuses and sends, whoever dies when. Its way through a real archive is in test_orthanc.py."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ComprehensiveSRStorage, MRImageStorage
from pynetdicom import AE, StoragePresentationContexts, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind  # type: ignore[attr-defined]

from conftest import GRID, REPOSITORY, phantom_arrays
from dicom_files import write_series
from ensemble.errors import InputRefused, UsageError, UserError
from ensemble.hospital import listen as listening
from ensemble.hospital import node as nodes
from ensemble.hospital.listen import ListenConfig
from ensemble.hospital.node import OUT_OF_RESOURCES, SUCCESS, DicomNode, NodeConfig
from ensemble.hospital.segmentation_process import ProcessDied, StudyJob
from ensemble.hospital.send import Destination, ResultSender, parse_destinations
from ensemble.hospital.spool import MAX_DEATHS, Spool, SpoolFull, StudyJournal
from ensemble.hospital.status import StatusServer
from ensemble.publish import publish_folder
from ensemble.serve.worker import CaseDone, CaseFailed
from ensemble.types import Modality
from ensemble.volume import Volume

GB = 10**9
STUDY = "1.2.3"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def spool_at(root: Path, clock: Clock | None = None, most: int = GB) -> Spool:
    return Spool(root, most, clock or Clock())


def received(
    spool: Spool, *, images: int = 3, study: str = STUDY, sender: int = 1, release: bool = True
) -> StudyJournal:
    for number in range(images):
        spool.keep(study, f"{study}.{number}", f"image {number}".encode(), sender)
    if release:
        spool.end_of(sender, released=True)
    return next(each for each in spool.studies() if each.uid == study)


# -- the spool


def test_a_study_is_complete_when_none_of_its_images_came_for_a_while(tmp_path: Path) -> None:
    clock = Clock()
    spool = spool_at(tmp_path, clock)
    received(spool)
    clock.now = 20
    spool.keep(STUDY, "another", b"image", 2)
    spool.end_of(2, released=True)
    clock.now = 40
    assert spool.next_complete(30) is None
    clock.now = 51
    study = spool.next_complete(30)
    assert study is not None
    assert (study.uid, study.images) == (STUDY, 4)


def test_while_an_association_is_open_it_waits_twice_as_long(tmp_path: Path) -> None:
    clock = Clock()
    spool = spool_at(tmp_path, clock)
    received(spool, release=False)
    clock.now = 40
    assert spool.next_complete(30) is None
    clock.now = 61
    assert spool.next_complete(30) is not None


@pytest.mark.parametrize("how", ["aborted", "killed"])
def test_a_transfer_that_broke_off_is_refused_until_it_comes_whole(tmp_path: Path, how: str) -> None:
    """A truncated stack is not to be seen in the images themselves."""
    clock = Clock()
    spool = spool_at(tmp_path, clock)
    received(spool, release=False)
    if how == "aborted":
        spool.end_of(1, released=False)
    else:
        spool = spool_at(tmp_path, clock)
    clock.now = 100
    assert spool.next_complete(30) is None
    (study,) = spool.studies()
    assert (study.state, study.what) == ("refused", "its transfer was interrupted")
    received(spool, images=4, sender=5)
    clock.now = 200
    complete = spool.next_complete(30)
    assert complete is not None
    assert complete.images == 4


def test_of_two_associations_the_one_that_breaks_off_counts_until_another_begins(tmp_path: Path) -> None:
    clock = Clock()
    spool = spool_at(tmp_path, clock)
    received(spool, images=2, sender=1, release=False)
    spool.keep(STUDY, "other", b"other", 2)
    spool.end_of(1, released=False)
    spool.end_of(2, released=True)
    clock.now = 100
    assert spool.next_complete(30) is None
    assert spool.studies()[0].state == "refused"
    received(spool, images=3, sender=3)
    clock.now = 200
    assert spool.next_complete(30) is not None


def test_the_same_images_again_change_nothing_and_another_one_begins_anew(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    key = received(spool).key
    with spool.taken(key) as images:
        assert len(list(images.iterdir())) == 3
        (spool.folder(key) / "results").mkdir()
    spool.done_with(key, 1, 2.5)
    spool.sent_all(key, spool.studies()[0].since)
    assert received(spool, sender=2).state == "done"
    spool.keep(STUDY, f"{STUDY}.0", b"corrected", 3)
    (study,) = spool.studies()
    assert (study.state, study.images) == ("receiving", 3), "one replaces the other"


def test_images_that_come_in_mid_case_begin_it_anew(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    key = received(spool).key
    with spool.taken(key):
        spool.keep(STUDY, "late", b"late", 7)
    spool.done_with(key, 1, 2.5)
    assert spool.studies()[0].state == "receiving"


def test_a_refused_study_is_looked_at_again_when_it_is_sent_again(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    key = received(spool).key
    with spool.taken(key):
        pass
    spool.end(key, "refused", "the DWI lacks slices", "export it again")
    assert [study.state for study in spool_at(tmp_path).studies()] == ["refused"], "after a restart, too"
    assert received(spool, sender=9).state == "receiving"


def test_a_full_spool_turns_away_lets_finished_studies_go_and_does_not_segment_what_lacks_images(
    tmp_path: Path,
) -> None:
    clock = Clock()
    spool = spool_at(tmp_path, clock, most=30)
    done = received(spool, study="1.1")
    with spool.taken(done.key):
        pass
    spool.end(done.key, "failed", "x")
    received(spool, study="1.2", images=3)
    assert [study.uid for study in spool.studies()] == ["1.2"], "the finished one made room"
    spool.keep("1.3", "1.3.0", b"short", 4)
    with pytest.raises(SpoolFull):
        spool.keep("1.3", "1.3.1", b"too long for it", 4)
    spool.end_of(4, released=True)
    clock.now = 100
    first = spool.next_complete(30)
    assert first is not None
    assert first.uid == "1.2"
    with spool.taken(first.key):
        pass
    spool.end(first.key, "refused", "x")
    assert spool.next_complete(30) is None
    assert {study.uid: study.state for study in spool.studies()} == {"1.2": "refused", "1.3": "refused"}
    for number, content in enumerate((b"short", b"too long for it")):
        spool.keep("1.3", f"1.3.{number}", content, 5)
    spool.end_of(5, released=True)
    clock.now = 200
    again = spool.next_complete(30)
    assert again is not None
    assert (again.uid, again.images) == ("1.3", 2)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null"])
def test_an_unreadable_journal_of_images_is_told(tmp_path: Path, content: str) -> None:
    key = received(spool_at(tmp_path)).key
    (tmp_path / "studies" / key / "journal.json").write_text(content)
    with pytest.raises(UserError, match="journal"):
        spool_at(tmp_path)


def test_finished_studies_are_forgotten_after_a_while(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    key = received(spool).key
    with spool.taken(key):
        pass
    spool.forget_finished(-1)
    assert spool.studies(), "it is not finished"
    spool.end(key, "refused", "x")
    spool.forget_finished(3600)
    assert spool.studies()
    spool.forget_finished(-1)
    assert spool.studies() == []
    assert spool.used_bytes == 0
    assert list((tmp_path / "studies").iterdir()) == []


# -- killed at every step


class PretendDesk:
    """Writes two objects that depend on the images alone."""

    ready = None

    def segment(self, job: StudyJob) -> CaseDone:
        content = b"".join(path.read_bytes() for path in sorted(job.images.iterdir()))
        with publish_folder(job.results, job.scratch) as staging:
            for name in ("a", "b"):
                (staging / f"{name}.dcm").write_bytes(name.encode() + content)
        return CaseDone({"lesions": 1, "lesion_ml": 2.5})


def send_into(ledger: Path, spool: Spool, study: StudyJournal) -> None:
    """Send as `ResultSender` does, to a destination that notes what comes, and can be asked what came."""
    for path in spool.results_of(study.key):
        if path.name not in study.sent.get("PACS", ()):
            if study.offered.get("PACS") == path.name and ledger.exists() and path.name.encode() in ledger.read_bytes():
                spool.sent(study.key, "PACS", path.name)
                continue
            spool.offer(study.key, "PACS", path.name)
            with ledger.open("ab") as file:
                file.write(path.name.encode() + b" " + path.read_bytes().hex().encode() + b"\n")
                os.fsync(file.fileno())
            spool.sent(study.key, "PACS", path.name)
    spool.sent_all(study.key, study.since)


def whole_way(root: Path) -> None:
    """A study from its first image to its end; images that were acknowledged before are not sent again unless all are."""
    clock = Clock()
    spool, acknowledged = spool_at(root / "spool", clock), root / "acknowledged"
    if not acknowledged.exists() or spool.studies() == [] or spool.studies()[0].state in ("receiving", "refused"):
        for number in range(2):
            spool.keep(STUDY, f"1.{number}", f"image {number}".encode(), 1)
            acknowledged.write_text(str(number))
        spool.end_of(1, released=True)
    for _ in range(4):
        clock.now += 100
        if (study := spool.next_complete(30)) is not None:
            listening._segment(study, spool, PretendDesk())  # type: ignore[arg-type]
        for study in spool.studies():
            if study.state == "sending":
                send_into(root / "ledger", spool, study)


def killed_at(root: Path, step: int) -> int:
    """Go the whole way in a process that is killed at a step, before something is on disk. Returns its exit status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        steps = iter(range(10_000))

        def counted(really: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                if next(steps) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return really(*arguments, **named)

            return call

        for holder, name in (
            (os, "fsync"),
            (os, "replace"),
            (os, "rename"),
            (os, "link"),
            (os, "unlink"),
            (os, "rmdir"),
        ):
            setattr(holder, name, counted(getattr(holder, name)))
        for name in ("rename", "replace", "unlink", "mkdir"):
            setattr(Path, name, counted(getattr(Path, name)))
        whole_way(root)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.slow
def test_killed_at_each_step_nothing_is_lost_and_nothing_is_sent_twice(tmp_path: Path) -> None:
    (whole := tmp_path / "whole").mkdir()
    whole_way(whole)
    expected = dict(line.split(b" ") for line in (whole / "ledger").read_bytes().splitlines())
    assert len(expected) == 2
    for step in range(10_000):
        shutil.rmtree(root := tmp_path / "killed", ignore_errors=True)
        root.mkdir()
        status = killed_at(root, step)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"step {step}"
        acknowledged = int((root / "acknowledged").read_text() or 0) + 1 if (root / "acknowledged").exists() else 0
        kept = list((root / "spool").glob("studies/*/images/*.dcm"))
        assert len(kept) >= acknowledged, f"step {step}: an image was acknowledged, and is not there"
        whole_way(root)
        (study,) = spool_at(root / "spool").studies()
        assert study.state == "done", f"step {step}"
        lines = [line.split(b" ") for line in (root / "ledger").read_bytes().splitlines()]
        assert dict(lines) == expected, f"step {step}"  # type: ignore[arg-type]
        assert len(lines) == len(expected), f"step {step}: an object was sent twice"
        if not os.WIFSIGNALED(status):
            break
    assert step > 40, "the kills hit nothing"


# -- the way of a study


class Answering:
    """A desk that answers what it is told to."""

    ready = None

    def __init__(self, *answers: CaseDone | CaseFailed | Exception) -> None:
        self._answers = list(answers)

    def segment(self, job: StudyJob) -> CaseDone | CaseFailed:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def worked(tmp_path: Path, *answers: CaseDone | CaseFailed | Exception) -> StudyJournal:
    clock = Clock()
    spool = spool_at(tmp_path, clock)
    received(spool)
    clock.now = 100
    desk = Answering(*answers)
    for _ in answers:
        if (study := spool.next_complete(30)) is not None:
            listening._segment(study, spool, desk)  # type: ignore[arg-type]
    (study,) = spool.studies()
    return study


def test_a_refused_study_says_why_in_words_of_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    error = InputRefused("the DWI series lacks slices", where="/spool/x", found="'Doe^Jane DWI'", do="export it again")
    study = worked(tmp_path, CaseFailed.of(error))
    assert (study.state, study.what, study.do) == ("refused", "the DWI series lacks slices", "export it again")
    assert "lacks slices" in caplog.text


def test_a_process_that_dies_of_a_study_three_times_fails_it(tmp_path: Path) -> None:
    assert (
        worked(tmp_path / "a", ProcessDied("exit code -9"), CaseDone({"lesions": 1, "lesion_ml": 1.0})).state
        == "sending"
    )
    study = worked(tmp_path / "b", *(ProcessDied("exit code -9") for _ in range(MAX_DEATHS)))
    assert study.state == "failed"
    assert "died" in study.what


def test_a_bug_is_no_refusal(tmp_path: Path) -> None:
    study = worked(tmp_path, CaseFailed.of(ZeroDivisionError("division by zero")))
    assert study.state == "failed"
    assert "bug" in study.what


def test_results_that_cannot_be_written_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_AGAIN_S", 0.0)
    full = CaseFailed.of(UsageError("the outputs can't be written"))
    assert worked(tmp_path, full, CaseDone({"lesions": 0, "lesion_ml": 0.0})).state == "sending"


# -- the node


def image(number: int, study: str = STUDY, sop_class: str = MRImageStorage, size: int = 10) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, f"{study}.7.{number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, f"{study}.7"
    dataset.PatientName, dataset.PixelData = "Doe^Jane", b"\0" * size
    dataset["PixelData"].VR = "OW"
    dataset.Rows = number
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    return dataset


@contextmanager
def node_of(spool: Spool, **address: Any) -> Iterator[DicomNode]:
    node = DicomNode(NodeConfig(**({"aet": "ISLES", "host": "127.0.0.1", "port": 0} | address)), spool, 5.0)
    node.start()
    try:
        yield node
    finally:
        node.stop()


@contextmanager
def calling(node: DicomNode, caller: str = "SCANNER", called: str = "ISLES") -> Iterator[Any]:
    ae = AE(ae_title=caller)
    for sop_class in (MRImageStorage, ComprehensiveSRStorage, "1.2.840.10008.1.1", "1.3.46.670589.11.0.0.12.1"):
        ae.add_requested_context(sop_class)
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = 10
    association = ae.associate("127.0.0.1", node.port, ae_title=called)
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def soon(holds: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until something holds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_images_are_on_disk_when_they_are_acknowledged_and_other_objects_are_passed_over(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    with node_of(spool) as node, calling(node) as association:
        assert association.send_c_echo().Status == SUCCESS
        for number in range(2):
            assert association.send_c_store(image(number)).Status == SUCCESS
            files = list(tmp_path.glob("studies/*/images/*.dcm"))
            assert len(files) == number + 1
            assert {pydicom.dcmread(path).Rows for path in files} == set(range(number + 1))
        for sop_class in (ComprehensiveSRStorage, "1.3.46.670589.11.0.0.12.1"):
            assert association.send_c_store(image(9, sop_class=sop_class)).Status == SUCCESS
        (study,) = spool.studies()
        assert (study.images, study.passed_over, study.unfinished) == (2, 2, True)
        association.release()
        soon(lambda: not spool.studies()[0].unfinished)


def test_who_may_not_call_is_rejected(tmp_path: Path) -> None:
    with node_of(spool_at(tmp_path), callers=("SCANNER",)) as node:
        for caller, called, established in (
            ("SCANNER", "ISLES", True),
            ("STRANGER", "ISLES", False),
            ("SCANNER", "OTHER", False),
        ):
            with calling(node, caller, called) as association:
                assert association.is_established == established


def test_more_associations_than_allowed_are_rejected_and_come_again(tmp_path: Path) -> None:
    with node_of(spool_at(tmp_path), most_associations=2) as node:
        with calling(node) as first, calling(node) as second:
            assert first.is_established
            assert second.is_established
            with calling(node) as third:
                assert not third.is_established
        soon(lambda: _established(node))


def _established(node: DicomNode) -> bool:
    with calling(node) as association:
        return bool(association.is_established)


def test_what_announces_too_much_is_cut_off_and_others_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "MAX_OBJECT_BYTES", 200_000)
    spool = spool_at(tmp_path)
    with node_of(spool) as node:
        with socket.create_connection(("127.0.0.1", node.port)) as hostile:
            hostile.sendall(b"\x01\x00\xff\xff\xff\xf0" + b"x" * 1000)
            hostile.settimeout(20)
            assert hostile.recv(10) == b"", "it is closed at once, whatever it still wants to send"
        with calling(node) as association, pytest.raises((RuntimeError, AttributeError)):
            assert association.send_c_store(image(0, size=5_000_000)).Status == SUCCESS
        with calling(node) as association:
            assert association.send_c_store(image(1)).Status == SUCCESS
    assert [study.images for study in spool.studies()] == [1]


def test_a_full_spool_answers_out_of_resources(tmp_path: Path) -> None:
    spool = spool_at(tmp_path, most=3000)
    with node_of(spool) as node, calling(node) as association:
        assert association.send_c_store(image(0)).Status == SUCCESS
        assert association.send_c_store(image(1, size=5000)).Status == OUT_OF_RESOURCES
    assert len(spool.studies()[0].turned_away) == 1


def test_rubbish_is_not_understood(tmp_path: Path) -> None:
    with node_of(spool_at(tmp_path)) as node, calling(node) as association:
        dataset = image(0)
        dataset.StudyInstanceUID = ""
        assert association.send_c_store(dataset).Status >> 12 == 0xC


def test_a_port_that_is_taken_is_wrong_usage(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    with node_of(spool) as node, pytest.raises(UsageError, match="port"):
        DicomNode(NodeConfig("ISLES", "127.0.0.1", node.port), spool, 5.0)


# -- sending


UNHEARD = -1  # the object is kept, and the association ends before that is said


class Archive:
    """A storage SCP that answers what it is told to, then success; it can be asked what it holds unless `mute`."""

    def __init__(self, *answers: int, port: int = 0, mute: bool = False) -> None:
        self.got: list[str] = []
        self._answers = list(answers)
        self._ae = AE(ae_title="PACS")
        for sop_class in (MRImageStorage, ComprehensiveSRStorage):
            self._ae.add_supported_context(sop_class)
        if not mute:
            self._ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
        self._server = self._ae.start_server(
            ("127.0.0.1", port),
            block=False,
            evt_handlers=[(evt.EVT_C_STORE, self._store), (evt.EVT_C_FIND, self._find)],
        )
        assert self._server is not None
        self.port = self._server.socket.getsockname()[1]

    def _store(self, event: Any) -> int:
        status = self._answers.pop(0) if self._answers else SUCCESS
        if status in (SUCCESS, UNHEARD):
            self.got.append(str(event.dataset.SOPInstanceUID))
        if status == UNHEARD:
            event.assoc.abort()
        return status

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        asked = event.identifier
        assert (asked.StudyInstanceUID, asked.SeriesInstanceUID) == (STUDY, f"{STUDY}.7")
        if asked.SOPInstanceUID in self.got:
            yield 0xFF00, asked
        yield SUCCESS, None

    def stop(self) -> None:
        self._ae.shutdown()


def to_send(tmp_path: Path) -> Spool:
    spool = spool_at(tmp_path / "spool")
    key = received(spool).key
    with spool.taken(key), publish_folder(*spool.results_folder(key)) as folder:
        for number, sop_class in enumerate((MRImageStorage, ComprehensiveSRStorage)):
            image(number, sop_class=sop_class).save_as(folder / f"{number}.dcm", enforce_file_format=True)
    spool.done_with(key, 1, 1.0)
    return spool


def test_results_are_sent_once_and_again_only_where_they_were_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensemble.hospital.send._FIRST_WAIT_S", 0.1)
    spool, archive = to_send(tmp_path), Archive(SUCCESS, OUT_OF_RESOURCES)
    sender = ResultSender(spool, "ISLES", [Destination("PACS", "127.0.0.1", archive.port)])
    sender.start()
    soon(lambda: spool.studies()[0].state == "done")
    sender.stop()
    archive.stop()
    assert sorted(archive.got) == [f"{STUDY}.7.0", f"{STUDY}.7.1"]


@pytest.mark.parametrize("mute", [False, True])
def test_an_object_whose_acknowledgement_was_not_heard_is_asked_for_before_it_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mute: bool
) -> None:
    monkeypatch.setattr("ensemble.hospital.send._FIRST_WAIT_S", 0.1)
    spool, archive = to_send(tmp_path), Archive(UNHEARD, mute=mute)
    sender = ResultSender(spool, "ISLES", [Destination("PACS", "127.0.0.1", archive.port)])
    sender.start()
    soon(lambda: spool.studies()[0].state == "done")
    sender.stop()
    archive.stop()
    again = [f"{STUDY}.7.0"] if mute else []  # it can't be asked: the same object under the same UID
    assert sorted(archive.got) == sorted([f"{STUDY}.7.0", f"{STUDY}.7.1", *again])


def test_an_archive_that_is_down_gets_them_when_it_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemble.hospital.send._FIRST_WAIT_S", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spool = to_send(tmp_path)
    sender = ResultSender(spool, "ISLES", [Destination("PACS", "127.0.0.1", port)])
    sender.start()
    soon(lambda: "does not answer" in spool.studies()[0].what)
    archive = Archive(port=port)
    soon(lambda: spool.studies()[0].state == "done")
    sender.stop()
    archive.stop()
    assert len(archive.got) == 2


@pytest.mark.parametrize(
    "text",
    ["", "PACS", "PACS@host", "PACS@host:0", "PACS@:104", "@host:104", "TITLE OF 17 BYTES@h:1", "A\\B@h:1"],
)
def test_a_destination_that_makes_no_sense_is_wrong_usage(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError):
        ListenConfig(NodeConfig("ISLES", "", 1), parse_destinations(text), tmp_path, 1, 1.0, 1.0, 2)


@pytest.mark.parametrize(
    ("bytes_", "quiet_s", "keep_s", "said", "found"),
    [
        (0, 1.0, 1.0, "--spool-gb must be more than 0", "0"),
        (1, 3601.0, 1.0, "--quiet-seconds must be more than 0 and at most 3600", "3601"),
        (1, 1.0, -7200.0, "--keep-hours must be 0 or more", "-2"),
    ],
)
def test_a_number_out_of_its_range_is_named_with_the_range(
    tmp_path: Path, bytes_: int, quiet_s: float, keep_s: float, said: str, found: str
) -> None:
    with pytest.raises(UsageError) as refused:
        ListenConfig(NodeConfig("ISLES", "", 1), parse_destinations("A@h:104"), tmp_path, bytes_, quiet_s, keep_s, 2)
    assert (refused.value.what, refused.value.found) == (said, found)


def test_several_destinations() -> None:
    assert [str(to) for to in parse_destinations("A@h:104, B C@[::1]:11112")] == ["A@h:104", "B C@::1:11112"]


# -- the status page


def test_the_status_page_shows_why_and_no_names(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    stream = io.BytesIO()
    image(0).save_as(stream, enforce_file_format=True)
    spool.keep(STUDY, "1", stream.getvalue(), 1)
    with spool.taken(spool.studies()[0].key):
        pass
    spool.end(spool.studies()[0].key, "refused", "its transfer was interrupted <b>", "send the study again")
    ready = threading.Event()
    page = StatusServer("127.0.0.1", 0, spool, ready.is_set)
    page.start()
    try:
        code, kind, text = page.answer("GET", "/")
        assert (code, kind.partition(";")[0]) == (200, "text/html")
        assert all(
            word in text for word in (STUDY, "refused", "interrupted &lt;b&gt;", "send the study again", "research")
        )
        studies = json.loads(page.answer("GET", "/status.json")[2])["studies"]
        assert studies[0]["state"] == "refused"
        assert "Doe" not in text + str(studies)
        assert fetched(page.port, "/health") == 503
        ready.set()
        assert fetched(page.port, "/health") == 200
        assert fetched(page.port, "/elsewhere") == 404
        assert page.answer("POST", "/")[0] == 405
    finally:
        page.stop()


def fetched(port: int, path: str) -> int:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)
    return connection.getresponse().status


def test_names_of_patients_are_in_no_journal(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    with node_of(spool) as node, calling(node) as association:
        association.send_c_store(image(0))
    (journal,) = tmp_path.glob("studies/*/journal.json")
    assert b"Doe" not in journal.read_bytes()


# -- the process


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Running:
    """A process of `listen` with members that need no weights, and an archive that takes what it sends."""

    def __init__(self, root: Path, seconds: float = 0.0) -> None:
        self.root, self.archive = root, ObjectArchive()
        self.port, self.status_port = free_port(), free_port()
        self.seconds = seconds
        self.start()

    def start(self, wait: bool = True) -> None:
        environment = os.environ | {"STUB_SECONDS": str(self.seconds), "ISLES_SKULL_STRIP": "never"}
        command = [sys.executable, str(REPOSITORY / "test" / "listening.py"), "listen", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--status-port", str(self.status_port), "--quiet-seconds", "0.5"]
        command += ["--spool", str(self.root / "spool"), "--send-to", f"PACS@127.0.0.1:{self.archive.port}"]
        log = (self.root / "log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        if wait:
            soon(lambda: self.health() == 200, 120)

    def health(self) -> int:
        try:
            return fetched(self.status_port, "/health")
        except OSError:
            return 0

    def state(self) -> str:
        (study,) = [json.loads(path.read_text()) for path in (self.root / "spool").glob("studies/*/journal.json")]
        return str(study["state"])

    def send(self, folder: Path) -> None:
        ae = AE(ae_title="SCANNER")
        ae.add_requested_context(MRImageStorage)
        association = ae.associate("127.0.0.1", self.port, ae_title="ISLES")
        assert association.is_established
        for path in sorted(folder.rglob("*.dcm")):
            assert association.send_c_store(pydicom.dcmread(path)).Status == SUCCESS
        association.release()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.archive.stop()


class ObjectArchive(Archive):
    def __init__(self) -> None:
        super().__init__()
        for context in StoragePresentationContexts:
            self._ae.add_supported_context(context.abstract_syntax or "")
        self._ae.shutdown()
        self._server = self._ae.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
        )


def write_examination(root: Path) -> Path:
    coarse = replace(GRID, size=(40, 48, 6), spacing_mm=(4.0, 4.0, 20.0))
    arrays = phantom_arrays(coarse)
    write_series(Volume(arrays[Modality.DWI], coarse), root / "dwi", uid="1", description="ep2d_diff", b=1000)
    kind = "DERIVED\\PRIMARY\\DIFFUSION\\ADC"
    write_series(Volume(arrays[Modality.ADC], coarse), root / "adc", uid="2", description="ADC", image_type=kind)
    return root


@pytest.mark.slow
def test_a_process_that_is_told_to_end_or_whose_worker_is_killed_brings_its_study_to_an_end(tmp_path: Path) -> None:
    running = Running(tmp_path, seconds=1.5)
    try:
        running.send(write_examination(tmp_path / "in"))
        soon(lambda: running.state() == "working", 60)
        running.process.terminate()
        assert running.process.wait(60) == 128 + signal.SIGTERM
        assert "bug" not in (said := (tmp_path / "log").read_text()), said
        assert running.state() in ("working", "receiving"), "it has not come to an end"
        running.start()
        soon(lambda: running.state() == "working", 60)
        (worker,) = children(running.process.pid)
        os.kill(worker, signal.SIGKILL)
        soon(lambda: running.state() == "done", 120)
        assert len(running.archive.got) == len(set(running.archive.got)) == 3
        second = subprocess.run(running.process.args, capture_output=True, text=True, check=False)  # type: ignore[call-overload]
        assert second.returncode == 2, second.stdout
        assert "spool" in second.stderr
    finally:
        running.stop()


def children(pid: int) -> list[int]:
    """The workers of a process; multiprocessing's tracker of resources is none."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]
