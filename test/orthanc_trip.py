"""Through a real Orthanc and a real `listen`, in a network namespace of its own: unshare -n python test/orthanc_trip.py FOLDER

Orthanc of Debian 12 listens on all addresses whatever it is told; in there only loopback exists.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from email.parser import BytesParser
from io import BytesIO
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import pydicom  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402
from pynetdicom import AE, build_context  # noqa: E402
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind  # type: ignore[attr-defined]  # noqa: E402

from conftest import GRID as FINE  # noqa: E402
from conftest import phantom_arrays, phantom_lesion  # noqa: E402
from dicom_files import edited, write_series  # noqa: E402
from ensemble.types import Modality  # noqa: E402
from ensemble.volume import Volume  # noqa: E402

#: Few slices: each is a file, and each file is brought to disk.
GRID = replace(FINE, size=(40, 48, 12), spacing_mm=(4.0, 4.0, 10.0))
DEPLOY = HERE.parent / "deploy" / "hospital"
ORTHANC, LISTEN, HTTP, STATUS = 4242, 11112, 8042, 8080
STARTED = time.monotonic()
PATIENT = "Doe^Jane"


def main(root: Path) -> None:
    loopback_up()
    whole, broken, second = (
        write_study(root / name, uid) for name, uid in (("a", "1.2.10"), ("b", "1.2.11"), ("c", "1.2.12"))
    )
    sorted(broken.glob("adc*/*"))[5].unlink()
    orthanc = start_orthanc(root)
    listen = start_listen(root, seconds=0, gb=1.0)
    try:
        until(lambda: get(STATUS, "/health")[0] == 200)
        at("listening")
        there_and_back(whole)
        at("there and back")
        stored_by_stow(root)
        at("stored by STOW-RS")
        refused(broken)
        at("refused")
        listen.kill()
        listen.wait()
        listen = start_listen(root, seconds=3, gb=0.00028)
        killed_in_mid_case(root, second, listen)
        at("killed in mid-case")
        listen = start_listen(root, seconds=0, gb=0.00028)
        until(lambda: state_of("1.2.12") == "done")
        arrived("1.2.12")
        at("done after the kill")
        full(write_study(root / "d", "1.2.13", copies=4))
        assert PATIENT not in (root / "listen.log").read_text() + get(STATUS, "/")[1].decode()
    finally:
        for process in (listen, orthanc):
            process.kill()
            process.wait()
    print("through a real Orthanc: all well")


# -- the way


def there_and_back(folder: Path) -> None:
    """C-ECHO; C-STORE in; Orthanc routes; `listen` sends back; C-FIND and WADO-RS give what it made."""
    ae = AE(ae_title="ORTHANC")
    ae.add_requested_context("1.2.840.10008.1.1")
    association = ae.associate("127.0.0.1", LISTEN, ae_title="ISLES")
    assert association.is_established
    assert association.send_c_echo().Status == 0
    association.release()
    assert set(c_store(folder, ORTHANC, "ORTHANC")) == {0}
    until(lambda: state_of("1.2.10") == "done")
    arrived("1.2.10")
    status = json.loads(get(STATUS, "/status.json")[1])["studies"][0]
    assert status["lesions"] == 1
    segmentation = of_modality("1.2.10", "SEG")
    mask = segmentation.pixel_array.astype(bool)
    lesion = phantom_lesion(GRID)
    assert 2 * (mask & lesion).sum() / (mask.sum() + lesion.sum()) > 0.9
    stored = {pydicom.dcmread(path).SOPInstanceUID for path in folder.rglob("*.dcm")}
    for group in segmentation.PerFrameFunctionalGroupsSequence:
        assert group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID in stored
    assert str(segmentation.PatientName) == PATIENT
    time.sleep(3)  # its results make the study stable again
    assert json.loads(get(HTTP, "/jobs?expand")[1])[1:] == [], "routed once, though results came"


def arrived(study: str) -> None:
    """C-FIND tells the three objects, once each."""
    found = c_find(study)
    assert sorted(m for m in found if m != "MR") == ["OT", "SEG", "SR"], found
    identifier = json.loads(post(HTTP, "/tools/lookup", study.encode())[1])[0]["ID"]
    series = json.loads(get(HTTP, f"/studies/{identifier}/series")[1])
    ours = [each for each in series if each["MainDicomTags"].get("Manufacturer") == "isles-ensemble"]
    assert [len(each["Instances"]) for each in ours] == [1, 1, 1]


def stored_by_stow(root: Path) -> None:
    """STOW-RS takes the same objects: those of another study, as if somebody else had made them."""
    objects = [of_modality("1.2.10", modality) for modality in ("SEG", "SR", "OT")]
    body = b""
    for dataset in objects:
        dataset.StudyInstanceUID += ".1"
        dataset.SOPInstanceUID += "1"
        dataset.SeriesInstanceUID += "1"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        stream = BytesIO()
        dataset.save_as(stream, enforce_file_format=True)
        body += b"--edge\r\nContent-Type: application/dicom\r\n\r\n" + stream.getvalue() + b"\r\n"
    kind = 'multipart/related; type="application/dicom"; boundary=edge'
    code, answer = post(
        HTTP, "/dicom-web/studies", body + b"--edge--\r\n", {"Content-Type": kind, "Accept": "application/dicom+json"}
    )
    assert code == 200, answer
    told = Dataset.from_json(json.loads(answer))
    assert len(told.ReferencedSOPSequence) == 3
    assert not told.get("FailedSOPSequence")


def refused(folder: Path) -> None:
    """A study that lacks a slice is told on the page and in the log within a minute."""
    started = time.monotonic()
    assert set(c_store(folder, LISTEN, "ISLES", "ORTHANC")) == {0}
    until(lambda: state_of("1.2.11") == "refused")
    assert time.monotonic() - started < 60
    page = get(STATUS, "/")[1].decode()
    assert "1.2.11" in page
    assert "lacks slices" in page


def killed_in_mid_case(root: Path, folder: Path, listen: subprocess.Popen[bytes]) -> None:
    until(lambda: get(STATUS, "/health")[0] == 200)
    assert set(c_store(folder, LISTEN, "ISLES", "ORTHANC")) == {0}
    until(lambda: state_of("1.2.12") == "working")
    time.sleep(1)
    listen.kill()
    listen.wait()
    journals = [json.loads(path.read_text()) for path in (root / "spool").glob("studies/*/journal.json")]
    assert [each["state"] for each in journals if each["uid"] == "1.2.12"] == ["working"]


def full(folder: Path) -> None:
    """A study for which there is no room is turned away with a status that tells so, and is not segmented without the rest."""
    statuses = c_store(folder, LISTEN, "ISLES", "ORTHANC")
    assert 0xA700 in statuses, statuses
    until(lambda: state_of("1.2.13") == "refused")
    assert "rejected by the full spool" in get(STATUS, "/")[1].decode()


# -- what is there


def write_study(root: Path, uid: str, copies: int = 1) -> Path:
    """A phantom's study: b0 and b1000, ADC; `copies` of the ADC."""
    arrays = phantom_arrays(GRID)
    dwi, adc = Volume(arrays[Modality.DWI], GRID), Volume(arrays[Modality.ADC], GRID)
    files = write_series(Volume(dwi.array * 2.2266, GRID), root / "dwi", uid="1", description="ep2d_diff", b=0)
    files += write_series(dwi, root / "dwi", uid="1", description="ep2d_diff", b=1000, first=101)
    kind = "DERIVED\\PRIMARY\\DIFFUSION\\ADC"
    for number in range(copies):
        files += write_series(
            adc, root / f"adc{number}", uid=f"{number + 2}", description=f"ADC{number}", image_type=kind
        )

    def of_the_study(dataset: Dataset) -> None:
        dataset.StudyInstanceUID, dataset.PatientName, dataset.PatientID = uid, PATIENT, "4711"
        dataset.SOPInstanceUID = dataset.SOPInstanceUID.replace("1.2.3", uid)
        dataset.SeriesInstanceUID = dataset.SeriesInstanceUID.replace("1.2.3", uid)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID

    for path in files:
        edited(path, of_the_study)
    return root


def start_orthanc(root: Path) -> subprocess.Popen[bytes]:
    """Orthanc as deploy/hospital configures it, on loopback and with nobody to ask for a password."""
    settings = json.loads((DEPLOY / "orthanc.json").read_text())
    shutil.copy(DEPLOY / "route.lua", root / "route.lua")
    settings |= {
        "StorageDirectory": str(root / "db"),
        "IndexDirectory": str(root / "db"),
        "LuaScripts": [str(root / "route.lua")],
        "Plugins": ["/usr/share/orthanc/plugins/libOrthancDicomWeb.so"],
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAlwaysAllowFind": True,
        "StableAge": 1,
        "DicomModalities": {"isles": ["ISLES", "127.0.0.1", LISTEN]},
    }
    (root / "orthanc.json").write_text(json.dumps(settings))
    log = (root / "orthanc.log").open("wb")
    process = subprocess.Popen(
        [shutil.which("Orthanc") or "Orthanc", str(root / "orthanc.json")], stdout=log, stderr=log
    )
    until(lambda: get(HTTP, "/system")[0] == 200)
    return process


def start_listen(root: Path, seconds: float, gb: float) -> subprocess.Popen[bytes]:
    environment = os.environ | {"STUB_SECONDS": str(seconds), "ISLES_SKULL_STRIP": "never"}
    command = [
        sys.executable,
        str(HERE / "listening.py"),
        "listen",
        "--allow",
        "ORTHANC",
        "--spool",
        str(root / "spool"),
    ]
    command += ["--send-to", f"ORTHANC@127.0.0.1:{ORTHANC}", "--quiet-seconds", "1.5", "--spool-gb", str(gb)]
    log = (root / "listen.log").open("ab")
    process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=log, env=environment)
    until(lambda: get(STATUS, "/health")[0] in (200, 503))
    return process


def state_of(study: str) -> str:
    studies = json.loads(get(STATUS, "/status.json")[1])["studies"]
    return next((str(each["state"]) for each in studies if each["uid"] == study), "")


def c_store(folder: Path, port: int, called: str, calling: str = "SCANNER") -> list[int]:
    """Send all files of a folder in one association; their statuses."""
    ae = AE(ae_title=calling)
    ae.requested_contexts = [build_context("1.2.840.10008.5.1.4.1.1.4")]
    association = ae.associate("127.0.0.1", port, ae_title=called)
    assert association.is_established
    statuses = [int(association.send_c_store(pydicom.dcmread(path)).Status) for path in sorted(folder.rglob("*.dcm"))]
    association.release()
    return statuses


def c_find(study: str) -> list[str]:
    """Modalities of the series of a study."""
    ae = AE(ae_title="SCANNER")
    ae.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
    association = ae.associate("127.0.0.1", ORTHANC, ae_title="ORTHANC")
    assert association.is_established
    query = Dataset()
    query.QueryRetrieveLevel, query.StudyInstanceUID, query.SeriesInstanceUID, query.Modality = "SERIES", study, "", ""
    answers = association.send_c_find(query, StudyRootQueryRetrieveInformationModelFind)
    modalities = [str(identifier.Modality) for _, identifier in answers if identifier is not None]
    association.release()
    return modalities


def of_modality(study: str, modality: str) -> Dataset:
    """The one object of a modality in a study, by QIDO-RS and WADO-RS."""
    code, answer = get(
        HTTP, f"/dicom-web/studies/{study}/series?Modality={modality}", {"Accept": "application/dicom+json"}
    )
    (series,) = (Dataset.from_json(each) for each in json.loads(answer))
    headers = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
    code, body = get(HTTP, f"/dicom-web/studies/{study}/series/{series.SeriesInstanceUID}", headers)
    assert code == 200, body[:500]
    begin = body.index(b"--")
    edge = body[begin : body.index(b"\r\n", begin)]
    parts = [part for part in body.split(edge) if b"\r\n\r\n" in part]
    assert len(parts) == 1
    head, _, content = parts[0].partition(b"\r\n\r\n")
    assert "application/dicom" in str(BytesParser().parsebytes(head.strip())["Content-Type"])
    return pydicom.dcmread(BytesIO(content))


def get(port: int, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    return ask(urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers or {}))


def post(port: int, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    return ask(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, headers=headers or {}))


def ask(request: urllib.request.Request) -> tuple[int, bytes]:
    """Status and body; 0 where nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def at(what: str) -> None:
    """Tell how far it has come."""
    print(f"{time.monotonic() - STARTED:6.1f} s {what}", flush=True)


def until(holds: Callable[[], Any], seconds: float = 120.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def loopback_up() -> None:
    """What `ip link set lo up` does, which not every machine has (netdevice(7))."""
    others: Sequence[str] = [name for _, name in socket.if_nameindex() if name != "lo"]
    assert not others, f"not in a network namespace of its own: {others}"
    with socket.socket() as any_socket:
        name = struct.pack("16sh", b"lo", 0)
        (flags,) = struct.unpack_from("16xh", fcntl.ioctl(any_socket, 0x8913, name))
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", flags | 0x1))


if __name__ == "__main__":
    assert np.__version__
    main(Path(sys.argv[1]))
