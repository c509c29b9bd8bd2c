"""Numbers that a file tells are bounded before memory or time is spent on them: what inflates, what repeats, what nests."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import DeflatedExplicitVRLittleEndian

from batch_runs import run_batch, write_weights
from conftest import GRID, phantom_arrays, write_contract_case, write_image
from contained import assert_refused, contained
from dicom_files import write_series
from ensemble.batch.find import find_cases
from ensemble.contract.isles22 import find_inputs
from ensemble.errors import InputRefused, WeightsBroken
from ensemble.evaluate.pairs import find_pairs
from ensemble.members.manifest import find_members
from ensemble.outputs.layouts.bids import refuse_unsafe_output_folder
from ensemble.readers.imagefile import read_image
from ensemble.types import Modality
from ensemble.volume import Volume
from ensemble.weights.checkpoints import load_weights, read_checkpoint
from ensemble.weights.packed import read_packed
from ensemble.weights.pickles import read_pickle

DWI = phantom_arrays()[Modality.DWI]
DEEP = "[" * 200_000 + "]" * 200_000


def deflated(head: bytes, megabytes: int, wbits: int = 31) -> bytes:
    """`head` and then so many megabytes of zeros, compressed (gzip by default)."""
    packer = zlib.compressobj(9, wbits=wbits)
    begin = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)  # depends on nothing before it
    return begin + block * megabytes + (packer.flush() if megabytes == 1 or wbits < 0 else b"\3\0" + bytes(8))


def nifti_header(*size: int, code: int = 16, bits: int = 32, offset: float = 352) -> bytes:
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(size), *size, *[1] * (7 - len(size)))
    struct.pack_into("<2h", header, 70, code, bits)
    struct.pack_into("<8f", header, 76, 1, 2, 2, 2, 1, 1, 1, 1)
    struct.pack_into("<f", header, 108, offset)
    header[344:348] = b"n+1\0"
    return bytes(header)


def nrrd(path: Path, *lines: str, data: bytes = b"") -> None:
    fields = ("type: float", "dimension: 3", "space: left-posterior-superior", "endian: little", *lines)
    if not any(line.startswith("sizes") for line in lines):
        fields = (*fields, "sizes: 40 48 24")
    directions = "space directions: (4,0,0) (0,4,0) (0,0,5)"
    path.write_bytes("\n".join(["NRRD0004", *fields, directions, "", ""]).encode() + data)


def metaimage(path: Path, *lines: str, data: bytes = b"") -> None:
    said = dict(line.split(" = ") for line in lines)
    fields = {"ObjectType": "Image", "NDims": "3", "BinaryData": "True", "DimSize": "40 48 24"}
    fields |= {"ElementSpacing": "4 4 5", "ElementType": "MET_FLOAT"} | said | {"ElementDataFile": "LOCAL"}
    path.write_bytes("".join(f"{key} = {text}\n" for key, text in fields.items()).encode() + data)


RAW = DWI.tobytes()
IMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "line skip": ("a.nrrd", lambda p: nrrd(p, "encoding: gzip", "line skip: 99999999999999", data=gzip.compress(RAW))),
    "line skip of raw data": ("a.nrrd", lambda p: nrrd(p, "encoding: raw", "line skip: 99999999999999", data=RAW)),
    "line skip below 0": ("a.nrrd", lambda p: nrrd(p, "encoding: raw", "line skip: -5", data=RAW)),
    "byte skip": ("a.nrrd", lambda p: nrrd(p, "encoding: raw", "byte skip: 99999999999999", data=RAW)),
    "byte skip of a stream": (
        "a.nrrd",
        lambda p: nrrd(p, "encoding: gzip", "byte skip: 99999999999999", data=gzip.compress(RAW)),
    ),
    "byte skip far below 0": ("a.nrrd", lambda p: nrrd(p, "encoding: raw", "byte skip: -99999999999999", data=RAW)),
    "a number of 5000 digits": ("a.nrrd", lambda p: nrrd(p, "encoding: raw", f"byte skip: {'9' * 5000}", data=RAW)),
    "sizes beyond everything": ("a.nrrd", lambda p: nrrd(p, "encoding: gzip", "sizes: 99999 99999 99999", data=b"x")),
    "sizes below 0": ("a.nrrd", lambda p: nrrd(p, "encoding: raw", "sizes: -40 48 24", data=RAW)),
    "dimension": ("a.nrrd", lambda p: nrrd(p, "encoding: raw", "dimension: 99999999", data=RAW)),
    "NRRD gzip bomb": ("a.nrrd", lambda p: nrrd(p, "encoding: gzip", data=deflated(RAW, 1500))),
    "NRRD gzip bomb with its sizes": (
        "a.nrrd",
        lambda p: nrrd(p, "encoding: gzip", "sizes: 9000 9000 24", data=deflated(b"", 1500)),
    ),
    "NRRD bzip2 bomb": ("a.nrrd", lambda p: nrrd(p, "encoding: bzip2", data=bz2.compress(RAW + bytes(1 << 26)))),
    "NIfTI bomb": ("a.nii.gz", lambda p: p.write_bytes(deflated(nifti_header(40, 48, 24), 1500))),
    "NIfTI bomb with its size": ("a.nii.gz", lambda p: p.write_bytes(deflated(nifti_header(900, 900, 900), 1500))),
    "NIfTI whose stream can't hold it": (
        "a.nii.gz",
        lambda p: p.write_bytes(deflated(nifti_header(500, 500, 500, code=64, bits=64), 1)),
    ),
    "NIfTI of zeros, as announced": (
        "a.nii.gz",
        lambda p: p.write_bytes(deflated(nifti_header(530, 530, 530, code=64, bits=64), 1136)),
    ),
    "NRRD of zeros, as announced": (
        "a.nrrd",
        lambda p: nrrd(p, "encoding: gzip", "sizes: 530 530 530", data=deflated(b"", 568)),
    ),
    "MetaImage of zeros, as announced": (
        "a.mha",
        lambda p: metaimage(p, "CompressedData = True", "DimSize = 530 530 530", data=deflated(b"", 568, 15)),
    ),
    "a gzip header without an end": (
        "a.nii.gz",
        lambda p: p.write_bytes(b"\x1f\x8b\x08\x08" + bytes(6) + b"a" * (64 << 20)),
    ),
    "a gzip file of many members": ("a.nii.gz", lambda p: p.write_bytes(gzip.compress(b"") * 200_000)),
    "NIfTI whose data begin far away": (
        "a.nii.gz",
        lambda p: p.write_bytes(deflated(nifti_header(40, 48, 24, offset=1e9), 1500)),
    ),
    "MetaImage bomb": ("a.mha", lambda p: metaimage(p, "CompressedData = True", data=deflated(RAW, 1500, 15))),
    "MetaImage bomb with its size": (
        "a.mha",
        lambda p: metaimage(p, "CompressedData = True", "DimSize = 9000 9000 24", data=deflated(b"", 1500, 15)),
    ),
    "MetaImage of a million axes": ("a.mha", lambda p: metaimage(p, "NDims = 1000000", data=RAW)),
    "MetaImage of -1 axes": ("a.mha", lambda p: metaimage(p, "NDims = -1", data=RAW)),
    "MetaImage of many channels": ("a.mha", lambda p: metaimage(p, "ElementNumberOfChannels = 999999999", data=RAW)),
    "MetaImage header beyond its end": ("a.mha", lambda p: metaimage(p, "HeaderSize = 99999999999999", data=RAW)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_asks_for_too_much_is_refused_at_little_cost(tmp_path: Path, name: str) -> None:
    file, write = IMAGES[name]
    write(tmp_path / file)
    outcome = contained(lambda: read_image(tmp_path / file, Modality.DWI))
    assert_refused(outcome, 3)


def deflated_dicom(path: Path, megabytes: int) -> None:
    """A slice as a deflated data set, which goes on far beyond its pixels."""
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    whole = io.BytesIO()
    dataset.save_as(whole, enforce_file_format=True)
    content = whole.getvalue()
    length = struct.unpack("<I", content[140:144])[0]  # of the file meta information
    head, body = content[: 144 + length], zlib.decompress(content[144 + length :], -15)
    trailing = b"\xfc\xff\xfc\xffOB\0\0" + struct.pack("<I", megabytes << 20)  # data set trailing padding
    path.write_bytes(head + deflated(body + trailing, megabytes, -15))


@pytest.mark.parametrize("packed", [False, True])
def test_a_deflated_dicom_file_that_goes_on_is_refused_at_little_cost(tmp_path: Path, packed: bool) -> None:
    files = write_series(Volume(DWI, GRID), tmp_path / "series", description="DWI")
    deflated_dicom(files[3], 2000)
    given = tmp_path / "series"
    if packed:
        given = tmp_path / "series.zip"
        with zipfile.ZipFile(given, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, file.name)
    outcome = contained(lambda: read_image(given, Modality.DWI))
    assert_refused(outcome, 3)


def test_a_whole_deflated_series_is_still_read(tmp_path: Path) -> None:
    files = write_series(Volume(DWI, GRID), tmp_path, description="DWI")
    for file in files:
        deflated_dicom(file, 0)
    assert np.array_equal(read_image(tmp_path, Modality.DWI).volume.array, np.round(DWI))


@pytest.mark.slow
def test_an_archive_that_inflates_far_beyond_itself_is_refused_at_little_cost(tmp_path: Path) -> None:
    file = write_series(Volume(DWI, GRID), tmp_path / "series", description="DWI")[0]
    path = tmp_path / "scan.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.dcm", "w", force_zip64=True) as member,
    ):
        member.write(file.read_bytes())
        for _ in range(200):
            member.write(bytes(1 << 20))
    outcome = contained(lambda: read_image(path, Modality.DWI))
    assert_refused(outcome, 3, "inflate")


def test_an_archive_of_a_million_entries_is_refused_at_little_cost(tmp_path: Path) -> None:
    entry = b"PK\1\2" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"a"  # of the central directory, 47 bytes
    directory = entry * 1_000_000
    end = b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 1, 1, len(directory), 0, 0)
    (path := tmp_path / "scan.zip").write_bytes(directory + end)
    outcome = contained(lambda: read_image(path, Modality.DWI))
    assert_refused(outcome, 3)


def test_an_image_that_asks_for_many_tiles_or_components_is_not_decoded() -> None:
    from ensemble.readers.dicom.pixels import _coded_size

    many = b"\xff\x4f\xff\x51" + struct.pack(">2H8I1H", 47, 0, 64, 64, 0, 0, 64, 64, 0, 0, 16384)
    with pytest.raises(ValueError, match="components"):
        _coded_size(many)
    jpeg = b"\xff\xd8\xff\xc3" + struct.pack(">HB2HB", 17, 16, 64, 64, 3)
    with pytest.raises(ValueError, match="components"):
        _coded_size(jpeg)


def checkpoint_of(weights: dict[str, torch.Tensor], path: Path) -> Path:
    torch.save({"network_weights": weights}, path)
    return path


def loaded(path: Path) -> None:
    """A checkpoint all the way into a network."""
    network = torch.nn.Linear(2, 2, bias=False)
    load_weights(network, read_checkpoint(path)["network_weights"], path)


@pytest.mark.parametrize(
    "weights",
    [
        {"weight": torch.zeros(1).expand(10**11)},
        {"weight": torch.zeros(2, 2), "x": torch.zeros(1).expand(10**6, 10**5)},
        {"weight": torch.zeros(2, 2), **{f"x{n}": torch.zeros(1_000_000)[n:] for n in range(3)}},
    ],
    ids=["expanded", "one of them expanded", "whole"],
)
def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = checkpoint_of(weights, tmp_path / "a.pth")
    outcome = contained(lambda: loaded(path))
    assert_refused(outcome, 4)


def test_many_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    shared = torch.zeros(4_000_000)
    path = checkpoint_of({f"x{n}": shared for n in range(200)}, tmp_path / "a.pth")
    outcome = contained(lambda: loaded(path))
    assert_refused(outcome, 4)


def test_many_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    shared = torch.zeros(4_000_000)
    path = checkpoint_of({f"x{n}": shared[n:] for n in range(200)}, tmp_path / "a.pth")
    outcome = contained(lambda: loaded(path))
    assert_refused(outcome, 4)


@pytest.mark.slow
def test_a_checkpoint_archive_that_inflates_is_refused(tmp_path: Path) -> None:
    whole = checkpoint_of({"weight": torch.zeros(2, 2)}, tmp_path / "whole.pth")
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content + bytes(80 << 20) if name.endswith("data.pkl") else content)
    outcome = contained(lambda: loaded(path))
    assert_refused(outcome, 4)


def test_a_checkpoint_that_asks_for_memory_by_a_call_is_refused(tmp_path: Path) -> None:
    """torch's own allow-list has functions that make as much as they are asked for."""
    whole = checkpoint_of({"weight": torch.zeros(2, 2)}, tmp_path / "whole.pth")
    for number, asked in enumerate((b"c__builtin__\nbytearray\n", b"c_codecs\nencode\n")):
        if number == 0:
            program = b"\x80\x02}X\x01\x00\x00\x00a" + asked + b"\x8a\x05\x00\xe8\x76\x48\x17\x85Rs."
        else:
            text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x01"
            call = asked + b"h\x01X\x06\x00\x00\x00latin1\x86R"
            program = b"\x80\x02}X\x01\x00\x00\x00a(" + text + call * 3000 + b"ts."
        path = tmp_path / f"{number}.pth"
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
            for name in source.namelist():
                target.writestr(name, program if name.endswith("data.pkl") else source.read(name))
        outcome = contained(lambda: read_checkpoint(path))  # noqa: B023
        assert_refused(outcome, 4)


def test_a_checkpoint_of_python_2_is_read_and_one_that_copies_itself_is_not(tmp_path: Path) -> None:
    """Python 2 pickled an ordered dictionary as a call with its items, HD-BET's weights among them."""
    items = b"](" + b"".join(b"](X\x05\x00\x00\x00%05dK\x01e" % number for number in range(1000)) + b"e"
    header = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    storages = pickle.dumps([], 2)
    path = tmp_path / "0.model"
    path.write_bytes(header + b"\x80\x02ccollections\nOrderedDict\n" + items + b"\x85R." + storages)
    assert len(read_checkpoint(path)) == 1000
    copies = b"ccollections\nOrderedDict\nh\x01\x85R0" * 1000
    path.write_bytes(header + b"\x80\x02" + items + b"q\x01" + copies + b"." + storages)
    outcome = contained(lambda: read_checkpoint(path))
    assert_refused(outcome, 4)


def test_a_pickle_that_repeats_a_call_is_refused(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x01"
    call = b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R"
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02(" + text + call * 3000 + b"l.")
    numbers = pickle.dumps(np.zeros(100_000, np.uint8), protocol=5)
    assert read_pickle(_written(tmp_path / "b.pkl", numbers))[:2] == [0, 0]
    outcome = contained(lambda: read_pickle(tmp_path / "a.pkl"))
    assert_refused(outcome, 4)


def test_a_pickled_array_of_nothing_by_many_is_refused(tmp_path: Path) -> None:
    program = pickle.dumps(np.zeros((3, 0)), protocol=2).replace(b"K\x03K\x00\x86", b"J\x00\xca\x9a\x3bK\x00\x86")
    outcome = contained(lambda: read_pickle(_written(tmp_path / "a.pkl", program)))
    assert_refused(outcome, 4)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_packed_weights_with_hostile_aliases_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save

    for number, aliases in enumerate((DEEP, '{"a": ["x"]}', "[]", '{"a": 1e400}')):
        path = _written(tmp_path / f"{number}.safetensors", save({"w": torch.zeros(2)}, {"aliases": aliases}))
        with pytest.raises(WeightsBroken):
            read_packed(path)


HOSTILE_JSON = {"deep": DEEP, "deep object": '{"a":' * 100_000, "digits": f'{{"a": {"9" * 5000}}}', "none": "\0"}


@pytest.mark.parametrize("text", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_hostile_json_is_refused_wherever_it_is_read(tmp_path: Path, text: str) -> None:
    """A bug with its traceback it was, in `batch` and `evaluate`."""
    weights = write_weights(tmp_path / "weights")
    (weights / "manifest.json").write_text(text)
    with pytest.raises(WeightsBroken, match="manifest"):
        find_members(weights)
    for name in ("dataset.json", "member.json"):
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / "plans.json").write_text("{}")
        (folder / name).write_text(text)
        with pytest.raises(WeightsBroken):
            find_members(folder)
    root = write_contract_case(tmp_path / "in")
    (root / "inputs.json").write_text(text)
    with pytest.raises(InputRefused, match="inputs.json"):
        find_inputs(root)
    for modality, array in phantom_arrays().items():
        write_image(array, tmp_path / "set" / "case" / f"{modality}.nii.gz")
    (tmp_path / "set" / "case" / "dataset_description.json").write_text(text)
    (tmp_path / "set" / "case" / "dwi.json").write_text(text)
    assert [case.name for case in find_cases(tmp_path / "set", tmp_path / "out")] == ["case"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset_description.json").write_text(text)
    with pytest.raises(Exception, match="itself a dataset"):
        refuse_unsafe_output_folder(tmp_path / "out", tmp_path / "set")
    write_image((DWI > 400).astype(np.uint8), tmp_path / "truth" / "case.nii.gz")
    write_image((DWI > 400).astype(np.uint8), tmp_path / "predicted" / "case" / "case_mask.nii.gz")
    (tmp_path / "predicted" / "case" / "report.json").write_text(text)
    find_pairs(tmp_path / "predicted", tmp_path / "truth")


@pytest.mark.slow
def test_a_hostile_report_of_an_earlier_batch_is_no_bug(tmp_path: Path) -> None:
    for modality, array in phantom_arrays().items():
        write_image(array, tmp_path / "set" / "case" / f"{modality}.nii.gz")
    weights = write_weights(tmp_path / "weights")
    assert run_batch(tmp_path / "set", tmp_path / "out", weights) == 0
    (report,) = (tmp_path / "out").rglob("report.json")
    report.write_text(DEEP)
    assert run_batch(tmp_path / "set", tmp_path / "out", weights) in (0, 3)


def test_json_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "weights")
    with (weights / "manifest.json").open("r+b") as file:
        file.truncate(3 << 30)
    outcome = contained(lambda: find_members(weights))
    assert_refused(outcome, 4)


def test_b_values_of_gigabytes_are_not_read(tmp_path: Path) -> None:
    path = write_image(DWI, tmp_path / "dwi.nii.gz")
    with (tmp_path / "dwi.bval").open("wb") as file:
        file.truncate(3 << 30)
    outcome = contained(lambda: read_image(path, Modality.DWI))
    assert_refused(outcome, 3)


@pytest.mark.slow
def test_json_numbers_beyond_numbers_are_refused(tmp_path: Path) -> None:
    from nnunet_folders import FolderSpec, build_folder

    folder = build_folder(tmp_path / "member", FolderSpec())
    plans = json.loads((folder / "plans.json").read_text())
    (name,) = plans["configurations"]
    from ensemble.config import RunConfig
    from ensemble.outputs.report.members import check_members

    for key, value in (
        ("patch_size", [10**400, 16, 16]),
        ("patch_size", [-16, -16, 16]),
        ("spacing", [1e308, 1, 1]),
        ("spacing", ["1e400"] * 3),
        ("n_conv_per_stage", [10**9, 2]),
        ("n_conv_per_stage", [-1, 2]),
        ("n_conv_per_stage_decoder", [10**400]),
        ("features_per_stage", ["1e400", 8]),
        ("norm_op_kwargs", {"eps": -1}),
        ("strides", [[1, 1, 1], [10**30, 2, 2]]),
    ):
        changed = json.loads(json.dumps(plans))
        kwargs = changed["configurations"][name]["architecture"]["arch_kwargs"]
        (kwargs if key in kwargs else changed["configurations"][name])[key] = value
        (folder / "plans.json").write_text(json.dumps(changed).replace('"1e400"', "1e400"))
        config = RunConfig(weights=tmp_path, device="cpu")
        assert not check_members(config, find_members(tmp_path)), key
