"""The swan member: which folders it is found in, what its checkpoints may hold, and its arithmetic on small networks."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from ensemble.cli import main
from ensemble.errors import InputRefused, WeightsBroken
from ensemble.families.base import InferenceSettings
from ensemble.families.spec import MemberSpec
from ensemble.families.swan.folder import NETWORKS, read_swan_folder
from ensemble.families.swan.member import SwanMember
from ensemble.families.swan.network import (
    ARCHITECTURES,
    HEAD,
    LowRank,
    matrices_to_patches,
    patches_to_matrices,
    rank_one_factors,
)
from ensemble.families.swan.processing import network_size, postprocess, preprocess
from ensemble.geometry import Grid
from ensemble.members.listing import describe_member
from ensemble.members.manifest import find_members, find_unsupported
from ensemble.members.pack import pack_members
from ensemble.prepare.case import PreparedCase
from ensemble.types import AnyArray, Modality, ignore_progress
from ensemble.weights.lightning import read_state_dict
from nnunet_folders import IDENTITY, small_case
from swan_folders import (
    FILE,
    PUBLISHED,
    build_swan_folder,
    checkpoint_path,
    filled,
    swan_checkpoint,
    write_checkpoint,
)

SETTINGS = InferenceSettings()
CASE = small_case((16, 40, 36), (4.0, 2.0, 1.0))


def loaded(folder: Path, settings: InferenceSettings = SETTINGS, **spec: Any) -> SwanMember:
    return SwanMember.load(MemberSpec("swan", "swan", folder, **spec), settings)


def probability(member: SwanMember, case: PreparedCase = CASE) -> AnyArray:
    return member.predict(case, SETTINGS, ignore_progress).probability.array


# --- folders ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [".", "FACTORIZER", "FACTORIZER/logs", str(PUBLISHED)])
def test_the_published_archive_is_recognised(tmp_path: Path, depth: str) -> None:
    build_swan_folder(tmp_path / PUBLISHED, folds=("0", "1"), kinds=("resunet",))
    (spec,) = find_members(tmp_path / depth)
    assert (spec.name, spec.kind, spec.folder) == ("swan", "swan", tmp_path / PUBLISHED)
    assert spec.channels == ("DWI", "ADC", "FLAIR")


def test_other_checkpoints_of_the_team_are_told_of(tmp_path: Path) -> None:
    build_swan_folder(tmp_path / PUBLISHED, folds=("0",))
    other = tmp_path / "FACTORIZER" / "logs" / "atlas" / "fold0" / "segresnet" / FILE
    other.parent.mkdir(parents=True)
    other.touch()
    assert [spec.name for spec in find_members(tmp_path)] == ["swan"]
    assert [(thing.name, thing.folder) for thing in find_unsupported(tmp_path)] == [("FACTORIZER", other.parent)]


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ((), ""),
        (("fold3",), "without fold 3"),
        (("fold0", "fold4"), "without fold 0, 4"),
        (("fold2/resunet",), "without fold 2 of resunet"),
        (("fold2/resunet", "fold1"), "without fold 1, 2 of resunet and fold 1 of swin-factorizer"),
    ],
)
def test_each_missing_network_is_said(tmp_path: Path, gone: tuple[str, ...], told: str) -> None:
    for fold in "01234":
        for kind in NETWORKS:
            path = checkpoint_path(tmp_path / PUBLISHED, fold, kind)
            path.parent.mkdir(parents=True)
            path.touch()
    for name in gone:
        shutil.rmtree(tmp_path / PUBLISHED / name)
    assert read_swan_folder(tmp_path / PUBLISHED).missing == told
    (spec,) = find_members(tmp_path)
    assert describe_member(spec).remarks == ((told,) if told else ())


def test_folds_may_be_links_to_folders(tmp_path: Path) -> None:
    folder = build_swan_folder(tmp_path / PUBLISHED, folds=("0",))
    (folder / "fold1").symlink_to("fold0")
    assert [key for key in read_swan_folder(folder).weights if key[1] == "resunet"] == [
        ("0", "resunet"),
        ("1", "resunet"),
    ]


def remove_checkpoint(folder: Path) -> None:
    checkpoint_path(folder, "1", "resunet").unlink()


def second_checkpoint(folder: Path) -> None:
    path = checkpoint_path(folder, "1", "resunet")
    shutil.copyfile(path, path.with_name("last.ckpt"))


@pytest.mark.parametrize("harm", [remove_checkpoint, second_checkpoint])
def test_a_network_of_none_or_two_files_is_refused(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    folder = build_swan_folder(tmp_path / PUBLISHED, folds=("0", "1"))
    harm(folder)
    with pytest.raises(WeightsBroken, match="checkpoints of one network") as refusal:
        loaded(folder)
    assert str(refusal.value.where).endswith("fold1/resunet/version_0/checkpoints")


@pytest.mark.parametrize(
    "entry",
    [
        {"channels": ("ADC", "DWI", "FLAIR")},
        {"channels": ("DWI", "ADC", "FLAIR?")},
        {"channels": ("DWI", "ADC", "T1")},
        {"intensities": "tissue_normalized"},
        {"orientation": "canonical"},
        {"spacing_mm": (1.0, 1.0, 1.0)},
    ],
)
def test_a_manifest_can_not_ask_for_other_images(tmp_path: Path, entry: dict[str, Any]) -> None:
    with pytest.raises(WeightsBroken, match="DWI, ADC and FLAIR as read"):
        loaded(tmp_path, **entry)


# --- checkpoints -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of a ResUNet."""
    path = tmp_path_factory.mktemp("swan") / FILE
    write_checkpoint(path, swan_checkpoint("resunet"))
    return path


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], Mapping[str, bytes]], **how: Any) -> Path:
    """A copy of an archive with other files in it."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w", **how) as copy:
        for name in archive.namelist():
            for other, data in change(name, archive.read(name)).items():
                copy.writestr(other, data)
    return target


def test_weights_are_read_and_no_class_of_the_trainer(checkpoint: Path, tmp_path: Path) -> None:
    """What Lightning pickles beside them can't be imported here; the archive's folder is "archive" or named as the file."""
    expected = swan_checkpoint("resunet")["state_dict"]
    renamed = rewritten(checkpoint, tmp_path / FILE, lambda name, data: {f"archive/{name.partition('/')[2]}": data})
    for path in (checkpoint, renamed):
        state = read_state_dict(path)
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["hyper_parameters", "state_dict", "epoch"])
def test_pickled_code_does_not_run(tmp_path: Path, where: str) -> None:
    trace = tmp_path / "trace"
    content = swan_checkpoint("resunet")
    harmful = Harmful(f"touch {trace}")
    content[where] = content["state_dict"] | {"net.more": harmful} if where == "state_dict" else {"network": harmful}
    write_checkpoint(tmp_path / FILE, content)
    with zipfile.ZipFile(tmp_path / FILE) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        assert b"posix" in archive.read(name)
    assert "net.stem.weight" in read_state_dict(tmp_path / FILE)
    assert not trace.exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    """One byte of a weight."""
    data = bytearray(path.read_bytes())
    data[data.index(read_state_dict(path)["net.stem.weight"].numpy().tobytes()) + 40] ^= 1
    path.write_bytes(data)


def compressed(path: Path) -> None:
    copy = rewritten(path, path.with_name("copy"), lambda name, data: {name: data}, compression=zipfile.ZIP_DEFLATED)
    copy.replace(path)


def big_endian(path: Path) -> None:
    def change(name: str, data: bytes) -> Mapping[str, bytes]:
        return {name: b"big"} if name.endswith("/byteorder") else {name: data}

    rewritten(path, path.with_name("copy"), change).replace(path)


def short_of_bytes(path: Path) -> None:
    def change(name: str, data: bytes) -> Mapping[str, bytes]:
        return {name: data[:16]} if "/data/" in name else {name: data}

    rewritten(path, path.with_name("copy"), change).replace(path)


def without_a_tensor(path: Path) -> None:
    rewritten(
        path, path.with_name("copy"), lambda name, data: {} if name.endswith("/data/0") else {name: data}
    ).replace(path)


def no_zip(path: Path) -> None:
    path.write_bytes(b"<html>404</html>")


def repeated_to_look_large(path: Path) -> None:
    torch.save({"state_dict": {"net.stem.weight": torch.zeros(1).expand(10**9)}}, path)


@pytest.mark.parametrize(
    "harm",
    [cut, flipped, compressed, big_endian, short_of_bytes, without_a_tensor, no_zip, repeated_to_look_large],
)
def test_damage_is_told(checkpoint: Path, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    path = tmp_path / FILE
    shutil.copyfile(checkpoint, path)
    harm(path)
    with pytest.raises(WeightsBroken, match="damaged") as refusal:
        read_state_dict(path)
    assert refusal.value.where == str(path)


@pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": {}}, {"state_dict": 3}, [1, 2]])
def test_checkpoints_of_others_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / FILE)
    with pytest.raises(WeightsBroken, match="not written by PyTorch Lightning"):
        read_state_dict(tmp_path / FILE)


def with_weights(**changes: Any) -> dict[str, Any]:
    return swan_checkpoint("resunet")["state_dict"] | {f"net.{name}": value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (
            with_weights(**{"stem.weight": torch.zeros(8, 2, 3, 3, 3)}),
            "SWAN's network resunet has another architecture",
        ),
        (
            with_weights(**{"stem.weight": torch.zeros(9, 3, 3, 3, 3)}),
            "SWAN's network resunet has another architecture",
        ),
        (
            with_weights(**{"stem.weight": torch.zeros(64, 3, 3, 3, 3)}),
            "SWAN's network resunet has another architecture",
        ),
        (
            with_weights(**{"encoder.blocks.5.blocks.0.weight": torch.zeros(8, 8, 2, 2, 2)}),
            "SWAN's network resunet has another architecture",
        ),
        ({"net.a": torch.ones(1)}, "SWAN's network resunet has another architecture"),
        (with_weights(more=torch.ones(1)), "does not fit"),
        (with_weights(**{"heads.0.bias": torch.full((1,), torch.nan)}), "not finite"),
        (swan_checkpoint("swin-factorizer")["state_dict"], "does not fit"),
    ],
)
def test_networks_of_another_make_are_refused(tmp_path: Path, state: Any, told: str) -> None:
    folder = build_swan_folder(tmp_path, folds=("0",), kinds=("resunet",), state_dict=state)
    with pytest.raises(WeightsBroken, match=told) as refusal:
        loaded(folder)
    assert refusal.value.where == str(checkpoint_path(folder, "0", "resunet"))


def test_full_size_networks_have_the_published_number_of_weights() -> None:
    sizes = {
        kind: sum(tensor.numel() for tensor in make((32, 64, 128, 256, 512), 3).parameters())
        for kind, make in ARCHITECTURES.items()
    }
    assert sizes == {"resunet": 28_877_667, "swin-factorizer": 5_624_547}


# --- factorisation ---------------------------------------------------------------------------------------------------------------------


def test_rank_one_is_the_plain_iteration() -> None:
    rows = torch.rand(20, 64, 8, generator=torch.Generator().manual_seed(1)).double()
    rows[3], rows[4] = 0, rows[4] * 1e4
    start = torch.rand(64, generator=torch.Generator().manual_seed(2)).double()
    eps, v = 1e-8, start.expand(20, 64)
    for _ in range(5):
        u = (torch.einsum("mvc,mv->mc", rows, v) + eps) / ((v * v).sum(1, keepdim=True) + eps)
        v = (torch.einsum("mvc,mc->mv", rows, u) + eps) / ((u * u).sum(1, keepdim=True) + eps)
    expected = v[:, :, None] * u[:, None]
    for kind, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        ours_u, ours_v = rank_one_factors(rows.to(kind), start.to(kind))
        apart = (ours_v[:, :, None] * ours_u[:, None] - expected).abs().amax((1, 2))
        assert (apart <= tolerance * (expected.amax((1, 2)) + 1)).all()


def test_patches_come_back_to_their_places() -> None:
    maps = torch.arange(2 * 8 * 8 * 4 * 16.0).reshape(2, 8, 8, 4, 16)
    for shift in (0, 1, 3):
        rows = patches_to_matrices(maps, shift)
        assert rows.shape == (2 * 2 * 4, 64, HEAD)
        assert torch.equal(matrices_to_patches(rows, shift, maps.shape), maps)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_factorisation_is_in_float32_whatever_it_is_given(monkeypatch: pytest.MonkeyPatch, kind: torch.dtype) -> None:
    """In float16 1e-8 is 0, and a patch with nothing in it 0 / 0."""
    seen = []

    def watched(rows: torch.Tensor, start: torch.Tensor) -> Any:
        seen.append((rows.dtype, start.dtype))
        return rank_one_factors(rows, start)

    monkeypatch.setattr("ensemble.families.swan.network.rank_one_factors", watched)
    layer = LowRank(8).to(kind)
    answer = layer(torch.zeros(1, 4, 4, 4, 8, dtype=kind))
    assert set(seen) == {(torch.float32, torch.float32)}
    assert answer.dtype == kind
    assert answer.isfinite().all()


def test_both_networks_run_in_bfloat16(tmp_path: Path) -> None:
    folder = build_swan_folder(tmp_path, folds=("0",))
    settings = replace(SETTINGS, precision="bf16")
    plain, coarse = loaded(folder), loaded(folder, settings)
    window = torch.randn(1, 3, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    for exact, session in zip(plain.sessions, coarse.sessions, strict=True):
        expected, answer = exact(window), session(window)
        assert session.arithmetic == "bf16"
        assert float((answer - expected).abs().mean()) < 0.1 * float(expected.abs().mean())


# --- before and after the networks -----------------------------------------------------------------------------------------------------


def test_the_logits_of_all_networks_are_averaged(tmp_path: Path) -> None:
    """Against the plain steps: one window, half of what is missing is padded before, and back by interpolation."""
    folder = build_swan_folder(tmp_path, folds=("0", "3"))
    member = loaded(folder)
    prediction = member.predict(CASE, SETTINGS, ignore_progress)
    images = []
    for modality in Modality:
        array = CASE.as_read[modality].array.transpose()
        inside = array != 0
        images.append(np.where(inside, (array - array[inside].mean()) / array[inside].std(), 0))
    fine = functional.interpolate(torch.from_numpy(np.stack(images)[None]).float(), size=(18, 40, 32), mode="trilinear")
    window = functional.pad(fine, (16, 16, 12, 12, 23, 23))
    logits = []
    for kind in NETWORKS:
        for seed in (0, 3):
            with torch.inference_mode():
                logits.append(filled(ARCHITECTURES[kind]((8,) * 5, 3), f"{seed}/")(window)[:, 1:])
    inside = torch.stack(logits).mean(0)[:, :, 23:41, 12:52, 16:48]
    back = functional.interpolate(inside, size=(36, 40, 16), mode="trilinear")
    expected = back.sigmoid()[0, 0].numpy().transpose()
    assert expected.std() > 0.02
    np.testing.assert_allclose(prediction.probability.array, expected, atol=2e-6)
    assert (prediction.networks, prediction.remark) == (4, "without fold 1, 2, 4")
    assert member.requires == set(Modality)


def test_images_at_2_mm_are_left_as_they_are_and_sizes_round_to_even() -> None:
    def size(matrices_to_patches: int, mm: float) -> int:
        return network_size(Grid((matrices_to_patches, 4, 4), (mm, 2.0, 2.0), (0.0, 0.0, 0.0), IDENTITY))[0]

    assert size(73, 2.000001) == 73
    assert (size(171, 1.2), size(22, 5.0)) == (103, 55)
    assert (size(5, 1.0), size(7, 1.0), size(1, 0.5)) == (2, 4, 1)


def test_what_is_0_stays_0_and_an_image_of_one_value_is_no_fault() -> None:
    grid = Grid((4, 3, 2), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0), IDENTITY)
    image = np.zeros(grid.shape_zyx, np.float32)
    flat = image.copy()
    flat[0, 1] = 7
    flat[1, 1] = -7
    constant = np.where(flat != 0, np.float32(3), 0)
    array = preprocess([image, flat, constant], grid)
    assert array.shape == (3, 4, 3, 2)
    assert not array[0].any()
    assert array[1, :, 1].tolist() == [[1, -1]] * 4
    assert not array[2].any()


def test_lesion_is_where_the_logit_is_not_negative() -> None:
    grid = Grid((4, 1, 1), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0), IDENTITY)
    answer = postprocess(torch.tensor([0.0, 1e-9, -1e-9, -200.0]).reshape(4, 1, 1), grid)
    assert (answer[0, 0] > 0.5).tolist() == [True, True, False, False]
    assert answer[0, 0, 3] >= 0


def test_an_image_of_too_many_voxels_is_refused() -> None:
    grid = Grid((500, 500, 400), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0), IDENTITY)
    with pytest.raises(InputRefused, match="too large"):
        preprocess([], grid)


# --- members list, check, pack -----------------------------------------------------------------------------------------------------------


def test_members_list_check_and_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights"
    build_swan_folder(weights / PUBLISHED, folds=("2",))
    assert main(["members", "list", "--weights", str(weights)]) == 0
    listed = capsys.readouterr().out
    assert "DWI,ADC,FLAIR" in listed
    assert "without fold 0, 1, 3, 4" in listed
    assert main(["members", "check", "--weights", str(weights), "--device", "cpu"]) == 0
    assert main(["members", "pack", str(weights), str(tmp_path / "packed")]) == 0
    files = sorted(path.name for path in (tmp_path / "packed").rglob("*") if path.is_file())
    assert files == ["member.json", *["network.safetensors"] * 2]
    (spec,) = find_members(tmp_path / "packed")
    assert (spec.name, spec.kind) == ("swan", "swan")
    packed = SwanMember.load(spec, SETTINGS)
    np.testing.assert_array_equal(probability(packed), probability(loaded(weights / PUBLISHED)))
    assert packed.missing == "without fold 0, 1, 3, 4"


def test_packing_in_half_precision_changes_little(tmp_path: Path) -> None:
    build_swan_folder(tmp_path / "w", folds=("0",), kinds=("resunet",))
    (folder,) = pack_members(tmp_path / "w", tmp_path / "packed", "fp16")
    apart = np.abs(probability(loaded(folder)) - probability(loaded(tmp_path / "w")))
    assert 0 < apart.max() < 0.01
