"""The nvauto member: permission before code, the published files as they are, packed, streamed, and wrong in many ways."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import phantom_arrays, phantom_case, phantom_lesion, tree, write_image
from ensemble.cli import main
from ensemble.config import RunConfig
from ensemble.errors import WeightsBroken
from ensemble.families import sessions
from ensemble.families.base import InferenceSettings
from ensemble.families.nvauto import member as nvauto
from ensemble.families.nvauto.archive import read_torchscript_archive
from ensemble.families.nvauto.member import NvautoMember, network_specs
from ensemble.families.nvauto.processing import ResampleTo1Mm, _solved, normalise_channels
from ensemble.families.nvauto.rebuild import pack_nvauto_network, rebuild_network
from ensemble.families.spec import MemberSpec
from ensemble.files import file_sha256
from ensemble.inference.engine import NonFiniteLogits
from ensemble.members.listing import describe_member
from ensemble.members.manifest import find_members, find_unsupported, open_member
from ensemble.members.pack import pack_members
from ensemble.metrics import dice
from ensemble.options import make_run_config, parse_options
from ensemble.pipeline import load_from_config, segment_raw
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.progress import SilentWatcher
from ensemble.readers.stored import read_stored
from ensemble.types import AnyArray, Modality, ignore_progress
from nnunet_folders import small_case
from nnunet_v1_folders import PUBLISHED as SEALS
from nnunet_v1_folders import build_v1_folder
from nvauto_files import PUBLISHED, Tiny, save_script, write_tiny

ADC, DWI = Modality.ADC, Modality.DWI
ALLOWED = InferenceSettings(allow_torchscript=True)


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchScript must not even be loaded."""

    def load_script(*_: Any, **__: Any) -> None:
        raise AssertionError("TorchScript was loaded")

    monkeypatch.setattr(torch.jit, "load", load_script)


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvauto, "WINDOW", (48, 32, 32))


def probability(folder: Path, case: PreparedCase, settings: InferenceSettings = ALLOWED) -> AnyArray:
    member = NvautoMember.load(MemberSpec("nvauto", "nvauto", folder), settings)
    return member.predict(case, settings, ignore_progress).probability.array


# --- what a weights folder holds -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("depth", [".", "NVAUTO", "NVAUTO/ts"])
def test_the_published_files_are_recognised_by_their_names(tmp_path: Path, depth: str) -> None:
    for number in range(15):
        path = tmp_path / PUBLISHED / f"model{number}.ts"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (spec,) = find_members(tmp_path / depth)
    assert (spec.name, spec.kind, spec.channels) == ("nvauto", "nvauto", ("ADC", "DWI"))
    assert describe_member(spec).folds == tuple(map(str, range(15)))
    assert not describe_member(spec).remarks


@pytest.mark.usefixtures("no_code")
def test_listing_reads_names_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_v1_folder(tmp_path / SEALS)
    for number in (0, 1, 3):
        path = tmp_path / PUBLISHED / f"model{number}.ts"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no zip")
    (tmp_path / PUBLISHED / "best.ts").touch()
    assert main(["members", "list", "--weights", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "nvauto  nvauto  0,1,3  ADC,DWI  1x1x1 mm" in said
    assert "! nvauto: without fold 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14" in said
    assert "! seals: without fold 1, 2, 3, 4" in said
    assert "best.ts" in said
    assert [spec.name for spec in find_members(tmp_path)] == ["nvauto", "seals"]
    assert [other.name for other in find_unsupported(tmp_path)] == ["NVAUTO"]


def test_missing_networks_are_said_when_a_case_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny(tmp_path, (0, 2))
    with caplog.at_level(logging.INFO, "ensemble"):
        load_from_config(RunConfig(weights=tmp_path, device="cpu", allow_torchscript=True))
    assert "note: member nvauto: without fold 1, 3," in caplog.text


# --- permission ------------------------------------------------------------------------------------------------------------------------


def run_arguments(tmp_path: Path, *more: str) -> list[str]:
    dwi, adc = (write_image(array, tmp_path / f"{modality}.nii.gz") for modality, array in phantom_arrays().items())
    out = tmp_path / "out"
    return ["run", f"--dwi={dwi}", f"--adc={adc}", f"--out={out}", "--device=cpu", f"--weights={tmp_path / 'w'}", *more]


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("how", ["by layout", "by manifest without digests", "by its own word", "one file of two"])
def test_without_permission_no_code_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    folder = write_tiny(tmp_path / "w")
    digests = {path.name: file_sha256(path) for path in folder.iterdir()}
    entry = {"name": "nvauto", "kind": "nvauto", "folder": PUBLISHED.as_posix()}
    if how == "by its own word":
        (folder / "member.json").write_text(json.dumps(entry | {"sha256": digests}))
    elif how == "one file of two":
        some = {"model0.ts": digests["model0.ts"]}
        (tmp_path / "w" / "manifest.json").write_text(json.dumps({"members": [entry | {"sha256": some}]}))
    elif how == "by manifest without digests":
        (tmp_path / "w" / "manifest.json").write_text(json.dumps({"members": [entry]}))
    assert main(run_arguments(tmp_path)) == 4
    assert main(["members", "check", "--device=cpu", f"--weights={tmp_path / 'w'}"]) == 4
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr()
    if how != "one file of two":
        for way in ("--allow-torchscript", "manifest.json", "sha256", "members pack", "code"):
            assert way in said.err
            assert way in said.out
    else:
        assert "model1.ts" in said.err


def test_a_manifests_digests_are_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path / "w")
    digests = {path.name: file_sha256(path) for path in folder.iterdir()}
    entry = {"name": "nv", "kind": "nvauto", "folder": PUBLISHED.as_posix(), "sha256": digests}
    (tmp_path / "w" / "manifest.json").write_text(json.dumps({"members": [entry]}))
    (spec,) = find_members(tmp_path / "w")
    assert open_member(spec, InferenceSettings()).name == "nv"
    save_script(Tiny(2.0), folder / "model1.ts")
    with pytest.raises(WeightsBroken, match="does not match its recorded SHA-256"):
        open_member(spec, InferenceSettings())
    with pytest.raises(WeightsBroken, match="does not match its recorded SHA-256"):
        open_member(spec, ALLOWED)


def test_permission_is_an_option_and_a_variable() -> None:
    assert make_run_config(parse_options(["members", "check", "--allow-torchscript"], {})).allow_torchscript
    assert make_run_config(parse_options([], {"ISLES_ALLOW_TORCHSCRIPT": "1"})).allow_torchscript
    assert not make_run_config(parse_options([], {})).allow_torchscript


# --- predictions -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_case_runs_on_the_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path / "w", (0, 1, 2))
    assert main(run_arguments(tmp_path, "--allow-torchscript", "--members=nvauto")) == 0
    said = capsys.readouterr()
    assert not said.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (told,) = report["members"]
    assert (told["member"] if "member" in told else told["name"]) == "nvauto"
    ensemble = load_from_config(RunConfig(weights=tmp_path / "w", device="cpu", allow_torchscript=True))
    result = segment_raw(phantom_case(), ensemble, SilentWatcher())
    assert dice(phantom_lesion(), result.fused.mask.array) > 0.9


@pytest.mark.usefixtures("small_window")
def test_same_as_the_plain_steps(tmp_path: Path) -> None:
    """Networks that see each voxel by itself, on voxels of 2 mm: the lattice of 1 mm has each voxel of the image."""
    folder, case = write_tiny(tmp_path, (0, 1, 4)), small_case()
    respacing = ResampleTo1Mm.of(case.grid)
    assert respacing.fine_size == (71, 79, 43)
    images = torch.from_numpy(np.stack([case.as_read[modality].array.transpose() for modality in (ADC, DWI)]))
    fine = normalise_channels(respacing.forward(images))
    inside = fine[1][fine[1] != 0]
    assert abs(float(inside.mean())) < 1e-5
    assert abs(float(inside.std(unbiased=False)) - 1) < 1e-5
    softmax = [Tiny(shift=0.1 * number)(fine[None])[0].softmax(0)[1, ::2, ::2, ::2] for number in (0, 1, 4)]
    expected = torch.stack(softmax).mean(0).detach().numpy().transpose()
    ours = probability(folder, case)
    assert 0.01 < (expected > 0.5).mean() < 0.5
    np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.usefixtures("small_window")
def test_images_come_with_the_air_as_it_was_read(tmp_path: Path) -> None:
    folder, clean = write_tiny(tmp_path, (0,)), small_case()
    noise = np.random.default_rng(0).uniform(0.1, 0.3, clean.brain.array.shape).astype(np.float32)
    noisy = {m: image.like(np.where(image.array == 0, noise, image.array)) for m, image in clean.images.items()}
    ours = probability(folder, replace(clean, as_read=noisy))
    np.testing.assert_array_equal(ours, probability(folder, replace(clean, as_read=noisy, images=noisy)))
    assert np.abs(ours - probability(folder, clean)).max() > 0.05


@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize("at_most", [0, 2**30])
def test_networks_that_are_too_large_to_keep_go_through_memory_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_most: int
) -> None:
    folder, case = write_tiny(tmp_path, (0, 1, 2)), small_case()
    opened: list[str] = []
    really = nvauto._opened

    def count(network: Any, settings: InferenceSettings) -> Any:
        opened.append(network.weights.name)
        return really(network, settings)

    monkeypatch.setattr(sessions, "HELD_BYTES", at_most)
    monkeypatch.setattr(nvauto, "_opened", count)
    ours = probability(folder, case)
    assert len(opened) == (6 if at_most == 0 else 3)
    np.testing.assert_allclose(ours, probability(folder, case), atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize("packed", [False, True])
def test_lower_precision_does_not_trip_over_float32_biases(tmp_path: Path, packed: bool) -> None:
    folder = write_segresnet(tmp_path / PUBLISHED, "group")
    if packed:
        pack_members(folder, tmp_path / "packed", "fp16")
        folder = tmp_path / "packed"
    case = small_case((6, 10, 8))
    exact = probability(folder, case, replace(ALLOWED, precision="fp32"))
    coarse = probability(folder, case, replace(ALLOWED, precision="bf16"))
    np.testing.assert_allclose(coarse, exact, atol=0.1)


class Several(nn.Module):
    """What networks of another kind may give."""

    def __init__(self, classes: int, *, pair: bool = False, infinite: bool = False) -> None:
        super().__init__()
        self.conv, self.pair, self.infinite = nn.Conv3d(2, classes, 1), pair, infinite

    def forward(self, windows: torch.Tensor) -> Any:
        logits = self.conv(windows)
        if self.infinite:
            logits = logits / 0.0
        return (logits, logits) if self.pair else logits


@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize(
    ("network", "error", "words"),
    [
        (Several(3), ValueError, "3 classes"),
        (Several(2, pair=True), TypeError, "tuple"),
        (Several(2, infinite=True), NonFiniteLogits, "not finite"),
    ],
)
def test_networks_of_another_kind_fail_and_do_not_vote(
    tmp_path: Path, network: nn.Module, error: type[Exception], words: str
) -> None:
    save_script(network, tmp_path / "model0.ts")
    with pytest.raises(error, match=words):
        probability(tmp_path, small_case((6, 10, 8)))


# --- broken files ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["empty", "cut", "text", "no folder", "none"])
def test_broken_files_are_told(tmp_path: Path, fault: str) -> None:
    folder = write_tiny(tmp_path)
    path = folder / "model1.ts"
    whole = path.read_bytes()
    if fault == "no folder":
        shutil.rmtree(folder)
    elif fault == "none":
        for script in folder.iterdir():
            script.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello" * 99}[fault])
    for use in (lambda: NvautoMember.load(MemberSpec("n", "nvauto", folder), ALLOWED), lambda: rebuild_network(path)):
        with pytest.raises(WeightsBroken) as error:
            use()
        assert error.value.do


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": ("DWI",)},
        {"channels": ("DWI", "ADC[-1]")},
        {"channels": ("T1", "T2")},
        {"intensities": "tissue_normalized"},
        {"orientation": "canonical"},
    ],
)
def test_a_manifest_that_asks_for_what_these_networks_are_not(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_tiny(tmp_path)
    with pytest.raises(WeightsBroken):
        NvautoMember.load(replace(MemberSpec("n", "nvauto", folder), **changes), ALLOWED)


def test_one_number_twice(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    shutil.copy(folder / "model1.ts", folder / "model01.ts")
    with pytest.raises(WeightsBroken, match="twice"):
        NvautoMember.load(MemberSpec("n", "nvauto", folder), ALLOWED)


class Call:
    """A pickle that would run something."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.usefixtures("no_code")
def test_a_pickle_in_an_archive_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with zipfile.ZipFile(tmp_path / "model0.ts", "w") as file:
        file.writestr("model0/data.pkl", pickle.dumps(Call(marker), 2))
    with pytest.raises(WeightsBroken, match="more than modules and tensors") as error:
        pack_members(tmp_path_member(tmp_path), tmp_path / "packed", "fp32")
    assert "mkdir" in error.value.found
    assert not marker.exists()
    assert not (tmp_path / "packed").exists()


def tmp_path_member(tmp_path: Path) -> Path:
    """A weights folder with the archive's one file."""
    (place := tmp_path / "w" / PUBLISHED).mkdir(parents=True)
    (tmp_path / "model0.ts").rename(place / "model0.ts")
    return place


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("compressed", [True, False])
def test_tensors_that_ask_for_more_than_is_there(tmp_path: Path, compressed: bool) -> None:
    whole = save_script(Tiny(), tmp_path / "whole.ts")
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "model0.ts", "w") as target:
        for info in source.infolist():
            content = source.read(info)
            how = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            target.writestr(info.filename, content if compressed or "/data/" not in info.filename else content[:4], how)
    with pytest.raises(WeightsBroken, match="damaged"):
        read_torchscript_archive(tmp_path / "model0.ts")


@pytest.mark.usefixtures("no_code")
def test_tensors_that_repeat_the_file_are_no_weights(tmp_path: Path) -> None:
    """A stride of 0 makes gigabytes of four bytes."""
    network = Tiny()
    network.conv.weight = nn.Parameter(torch.zeros(1).expand(2, 2, 1, 1, 1))
    network.register_buffer("more", torch.zeros(1).expand(10**9))
    save_script(network, tmp_path / "model0.ts")
    for weights in (True, False):
        with pytest.raises(WeightsBroken, match="larger than its file"):
            read_torchscript_archive(tmp_path / "model0.ts", weights=weights)


@pytest.mark.usefixtures("no_code")
def test_a_fifo_is_no_network(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model0.ts")
    with pytest.raises(WeightsBroken) as error:
        read_torchscript_archive(tmp_path / "model0.ts")
    assert "FIFO" in error.value.found


# --- packed ----------------------------------------------------------------------------------------------------------------------------


def segresnet(kind: str) -> nn.Module:
    """MONAI's networks, small, with statistics and scales that are not those of a new network."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    plain = {"spatial_dims": 3, "in_channels": 2, "out_channels": 2}
    levels = {"blocks_down": (1, 2, 1), "blocks_up": (1, 1)}
    group, instance = ("GROUP", {"num_groups": 4}), ("INSTANCE", {"affine": True})
    leaky = ("leakyrelu", {"negative_slope": 0.1, "inplace": True})
    made = {
        "group": lambda: nets.SegResNet(**plain, init_filters=8, norm=group, **levels),
        "dropout": lambda: nets.SegResNet(**plain, init_filters=8, dropout_prob=0.2, **levels),
        "deconv": lambda: nets.SegResNet(**plain, init_filters=4, norm="BATCH", upsample_mode="deconv", **levels),
        "plain instance": lambda: nets.SegResNet(**plain, init_filters=4, norm="INSTANCE", act=leaky, **levels),
        "ds": lambda: nets.SegResNetDS(**plain, init_filters=4, norm=instance, dsdepth=2, blocks_down=(1, 2, 1)),
        "ds batch": lambda: nets.SegResNetDS(**plain, init_filters=4, norm="BATCH", dsdepth=3, **levels),
        "ds group": lambda: nets.SegResNetDS(**plain, init_filters=8, norm=group, act=leaky, blocks_down=(1, 1, 1)),
        "ds linear": lambda: nets.SegResNetDS(**plain, init_filters=4, upsample_mode="nontrainable", **levels),
        "ds anisotropic": lambda: nets.SegResNetDS(**plain, init_filters=4, resolution=(1, 1, 5), **levels),
    }
    network = made[kind]().eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape) * (0.5 if "var" in name or "weight" in name else 0.2))
    return network


def write_segresnet(folder: Path, kind: str) -> Path:
    save_script(segresnet(kind), folder / "model0.ts", window=(16, 16, 16))
    return folder


@pytest.mark.parametrize(
    "kind",
    ["group", "dropout", "deconv", "plain instance", "ds", "ds batch", "ds group", "ds linear", "ds anisotropic"],
)
@pytest.mark.usefixtures("no_code")
def test_monais_networks_are_rebuilt_from_their_parameters(tmp_path: Path, kind: str) -> None:
    network, path = segresnet(kind), write_segresnet(tmp_path, kind) / "model0.ts"
    (tmp_path / "packed").mkdir()
    pack_nvauto_network(path, tmp_path / "packed", "fp32")
    ours = rebuild_network(tmp_path / "packed" / "network.safetensors").eval()
    assert ours.state_dict().keys() == network.state_dict().keys()
    windows = torch.randn(2, 2, 16, 24, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, answer = network(windows.clone()), ours(windows.clone())
    assert answer.shape == expected.shape
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("small_window")
def test_a_packed_member_gives_the_same_and_needs_no_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "w" / PUBLISHED
    for number, kind in enumerate(("group", "ds", "ds batch")):
        save_script(segresnet(kind), folder / f"model{2 * number}.ts", window=(16, 16, 16))
    case = small_case((6, 10, 8))
    expected = probability(folder, case)

    def load_script(*_: Any, **__: Any) -> None:
        raise AssertionError("TorchScript was loaded")

    monkeypatch.setattr(torch.jit, "load", load_script)
    assert main(["members", "pack", str(tmp_path / "w"), str(tmp_path / "packed")]) == 0
    (spec,) = find_members(tmp_path / "packed")
    assert (spec.name, spec.kind, spec.channels) == ("nvauto", "nvauto", ("ADC", "DWI"))
    assert describe_member(spec).folds == ("0", "2", "4")
    assert {path.suffix for path in spec.folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    member = open_member(spec, InferenceSettings())
    ours = member.predict(case, InferenceSettings(), ignore_progress).probability.array
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    again = pack_members(spec.folder, tmp_path / "again", "fp16")
    assert describe_member(find_members(again[0])[0]).folds == ("0", "2", "4")
    # a weight that is not the one that was packed
    network = spec.folder / "model0" / "network.safetensors"
    network.write_bytes(network.read_bytes()[:-4] + b"\x00\x00\x00\x40")
    with pytest.raises(WeightsBroken, match="does not match its recorded SHA-256"):
        open_member(spec, InferenceSettings())


class Doubled(nn.Module):
    """The parameters of another network under the same names, and another answer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        self.inner = [network]

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        encoded, upwards = self.encoder(windows), self.up_layers  # type: ignore[operator]
        maps = encoded[-1]
        for level, skip in zip(upwards, encoded[-2::-1], strict=True):  # type: ignore[arg-type]
            maps = level["blocks"](level["upsample"](maps) + 1.01 * skip)
        logits: torch.Tensor = upwards[-1]["head"](maps)  # type: ignore[index]
        return logits


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("kind", ["tiny", "other arithmetic", "scripted"])
def test_what_cannot_be_rebuilt_exactly_is_not_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    place = tmp_path / "w" / PUBLISHED / "model0.ts"
    if kind == "tiny":
        save_script(Tiny(), place)
    elif kind == "scripted":
        save_script(Tiny(), place, traced=False)
    else:
        save_script(Doubled(segresnet("ds")), place, window=(16, 16, 16))
    before = tree(tmp_path)
    assert main(["members", "pack", str(tmp_path / "w"), str(tmp_path / "packed")]) == 4
    assert tree(tmp_path) == before
    said = capsys.readouterr().err
    assert "can't be rebuilt" in said
    assert "--allow-torchscript" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("network", "UNet"),
        ("norm", "layer"),
        ("groups", 0),
        ("groups", 3),
        ("strides", []),
        ("strides", [[2, 2]]),
        ("strides", [[99, 2, 2], [2, 2, 2]]),
        ("eps", float("nan")),
        ("features", None),
    ],
)
def test_descriptions_that_make_no_network_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = write_segresnet(tmp_path, "group") / "model0.ts"
    (place := tmp_path / "packed" / "model0").mkdir(parents=True)
    pack_nvauto_network(path, place, "fp32")
    form = json.loads((place / "network.json").read_text())
    (place / "network.json").write_text(json.dumps(form | {key: value}))
    with pytest.raises(WeightsBroken):
        [network.build() for network in network_specs(place.parent)]


def test_a_window_of_a_full_size_network_is_told_by_its_parameters(tmp_path: Path) -> None:
    (network,) = network_specs(write_segresnet(tmp_path, "group"))
    assert network.window_bytes == 4 * 9 * 8 * 192 * 192 * 128
    save_script(Tiny(), tmp_path / "other" / "model0.ts", traced=False)
    (unknown,) = network_specs(tmp_path / "other")
    assert unknown.window_bytes >= 4 * 9 * 2 * 192 * 192 * 128


# --- arithmetic ------------------------------------------------------------------------------------------------------------------------


def test_equations_are_solved_without_the_processors_own_rounding() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        matrix, right = draw.normal(size=(2, 4, 4))
        np.testing.assert_allclose(_solved(matrix, right), np.linalg.solve(matrix, right), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unit", ["mm", "meter"])
def test_a_niftis_stored_affine_is_kept_to_its_last_bit(tmp_path: Path, unit: str) -> None:
    """Direction times spacing is another float32 in the last digit, which decides whether voxels beside the brain are 0."""
    nib = pytest.importorskip("nibabel")
    draw = np.random.default_rng(0)
    for number in range(8):
        rotation, _ = np.linalg.qr(draw.normal(size=(3, 3)))
        affine = np.eye(4)
        affine[:3] = np.column_stack([rotation * draw.uniform(0.7, 5, 3), draw.normal(size=3) * 80])
        scale = 1 if unit == "mm" else 1e-3
        affine[:3] *= scale
        image = nib.Nifti1Image(np.ones((4, 5, 6), np.float32), affine.astype(np.float32))
        image.header.set_xyzt_units(unit)
        nib.save(image, path := tmp_path / f"{number}.nii.gz")
        grid = read_stored(path, "DWI").grid
        if unit == "mm":
            np.testing.assert_array_equal(grid.affine_ras, nib.load(path).affine)
        np.testing.assert_allclose(grid.affine_ras, np.diag([-1, -1, 1, 1]) @ grid.affine, rtol=1e-5, atol=1e-4)


def test_an_image_of_1_mm_is_left_as_it_is() -> None:
    case = small_case((9, 8, 7), (1.0, 1.0, 1.0))
    respacing, images = ResampleTo1Mm.of(case.grid), torch.randn(2, 7, 8, 9)
    assert respacing.fine_size == (7, 8, 9)
    assert torch.equal(respacing.forward(images), images)
    assert torch.equal(respacing.back(images), images)


@pytest.mark.parametrize("spacing", [(5.0, 1.2, 1.2), (2.0, 0.9, 0.9), (6.5, 1.75, 0.7)])
def test_any_spacing_comes_to_1_mm_and_back(spacing: tuple[float, float, float]) -> None:
    """A plane through the image is the same plane at 1 mm."""
    case = small_case((7, 21, 24), spacing)
    respacing = ResampleTo1Mm.of(case.grid)
    z, y, x = np.meshgrid(*[np.arange(n) * mm for n, mm in zip((7, 21, 24), spacing, strict=True)], indexing="ij")
    plane = torch.from_numpy((2 * x - y + 0.5 * z).transpose().astype(np.float32))[None]
    fine = respacing.forward(plane)
    i, j, k = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in fine.shape[1:]], indexing="ij")
    expected, inner = 2 * i - j + 0.5 * k, (slice(0, -1),) * 3
    torch.testing.assert_close(fine[0][inner], expected[inner], atol=1e-3, rtol=0)
    torch.testing.assert_close(respacing.back(fine)[0][inner], plane[0][inner], atol=1e-3, rtol=0)


def test_a_case_too_large_for_1_mm_is_refused() -> None:
    grid = replace(small_case().grid, size=(900, 900, 200))
    with pytest.raises(Exception, match="too large"):
        ResampleTo1Mm.of(grid)


def test_the_phantom_needs_no_flair(tmp_path: Path) -> None:
    member = NvautoMember.load(MemberSpec("n", "nvauto", write_tiny(tmp_path)), ALLOWED)
    assert member.requires == {ADC, DWI}
    assert prepare_raw(phantom_case()).modalities >= member.requires
