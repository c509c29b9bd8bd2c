"""Networks in ONNX form: the same mask as PyTorch's, or none at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ensemble.cli import main
from ensemble.errors import WeightsBroken
from ensemble.families.base import InferenceSettings, Member
from ensemble.files import file_sha256
from ensemble.inference.parity import ParityResult, Probe, check_parity, make_probe
from ensemble.inference.session_onnx import OnnxSession
from ensemble.members.manifest import find_members, open_member
from ensemble.members.pack import pack_members
from ensemble.types import AnyArray, ignore_progress
from nnunet_folders import FolderSpec, build_folder, small_case
from nnunet_v1_folders import PUBLISHED, V1Spec, build_v1_folder

ONNX = InferenceSettings(tta="none", session="onnx")
TORCH = replace(ONNX, session="torch")
CASE = small_case((14, 22, 18), (2.0, 2.0, 2.0))
SPECS = {
    "3-D": FolderSpec(folds=("0", "1")),
    "batch norm": FolderSpec(norm="batchnorm.BatchNorm"),
    "2-D": FolderSpec(
        configuration="2d",
        patch=(16, 24),
        strides=((1, 1), (2, 2), (2, 2)),
        mirror_axes=(0, 1),
        spacing_mm=(1.7, 1.7),
        network="ResidualEncoderUNet",
    ),
}


def source(kind: str, root: Path) -> Path:
    return build_v1_folder(root / PUBLISHED, V1Spec()) if kind == "seals" else build_folder(root, SPECS[kind])


def opened(folder: Path, settings: InferenceSettings) -> Member:
    (spec,) = find_members(folder)
    return open_member(spec, settings)


def probability(member: Member, settings: InferenceSettings) -> AnyArray:
    return member.predict(CASE, settings, ignore_progress).probability.array


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SPECS, "seals"])
def test_same_answer_as_torch(kind: str, tmp_path: Path) -> None:
    pack_members(source(kind, tmp_path / "a"), tmp_path / "b", "fp32", onnx=True)
    member = opened(tmp_path / "b", ONNX)
    assert all(isinstance(session, OnnxSession) for session in member.sessions)  # type: ignore[attr-defined]
    expected = probability(opened(tmp_path / "b", TORCH), TORCH)
    given = probability(member, ONNX)
    # SEALS' softmax goes back through float16
    np.testing.assert_allclose(given, expected, atol=1e-3 if kind == "seals" else 1e-4)
    # any batch, and any window that the network can halve
    session = member.sessions[0]  # type: ignore[attr-defined]
    shape = (1, 16, 16) if kind == "2-D" else (16, 16, 24)
    windows = torch.randn((3, 2, *shape), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(session(windows)[1:2], session(windows[1:2]), rtol=1e-4, atol=1e-4)


def test_members_that_were_not_packed_for_it_are_refused(tmp_path: Path) -> None:
    folder = source("3-D", tmp_path / "a")
    with pytest.raises(WeightsBroken, match="no ONNX file"):
        opened(tmp_path / "a", ONNX)
    pack_members(folder, tmp_path / "b", "fp32")
    with pytest.raises(WeightsBroken, match="no ONNX file"):
        opened(tmp_path / "b", ONNX)


def _exchange(folder: Path, name: str, content: bytes) -> None:
    """Put another file in place, digest and all."""
    (folder / "fold_0" / name).write_bytes(content)
    entry = json.loads((folder / "member.json").read_text())
    entry["sha256"][f"fold_0/{name}"] = file_sha256(folder / "fold_0" / name)
    (folder / "member.json").write_text(json.dumps(entry))


def test_a_network_that_answers_otherwise_is_refused_at_load(tmp_path: Path) -> None:
    pack_members(source("batch norm", tmp_path / "a"), tmp_path / "b", "fp32", onnx=True)
    pack_members(build_folder(tmp_path / "c", SPECS["batch norm"], seed=7), tmp_path / "d", "fp32", onnx=True)
    _exchange(tmp_path / "b", "network.onnx", (tmp_path / "d" / "fold_0" / "network.onnx").read_bytes())
    with pytest.raises(WeightsBroken, match="another output than PyTorch") as refused:
        opened(tmp_path / "b", ONNX)
    assert "fold_0/network.onnx" in str(refused.value)
    opened(tmp_path / "b", TORCH)
    _exchange(tmp_path / "b", "network.onnx", b"not a network")
    with pytest.raises(WeightsBroken, match="can't be loaded"):
        opened(tmp_path / "b", ONNX)
    shutil.copyfile(tmp_path / "d" / "fold_0" / "network.onnx", tmp_path / "b" / "fold_0" / "network.onnx")
    with pytest.raises(WeightsBroken, match="does not match its recorded SHA-256"):
        opened(tmp_path / "b", ONNX)


def test_an_export_that_answers_otherwise_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no packed member yet to use another session with: the advice and the place are those of packing."""
    folder = source("batch norm", tmp_path / "a")
    monkeypatch.setattr("ensemble.weights.onnx_form.check_parity", lambda *_: ParityResult(1.0, 0.0))
    with pytest.raises(WeightsBroken, match="another output than PyTorch") as refused:
        pack_members(folder, tmp_path / "b", "fp32", onnx=True)
    assert refused.value.do == "pack without --onnx"
    assert refused.value.where == str(folder)


def test_the_gate() -> None:
    window = torch.zeros(1, 1, 1, 40, 50)
    foreground = torch.zeros(1, 1, 40, 50)
    foreground[..., :20, :] = 1
    probe = Probe(window, foreground)

    def answering(p: torch.Tensor):
        logit = torch.logit(p.clamp(1e-6, 1 - 1e-6))
        return lambda windows: torch.stack([-logit / 2, logit / 2], 1)

    assert check_parity(answering(foreground), probe).passed
    assert check_parity(answering((foreground - 0.009).abs()), probe).passed
    assert not check_parity(answering((foreground - 0.011).abs()), probe).passed
    nothing = check_parity(answering(torch.zeros_like(foreground)), probe)
    assert nothing == ParityResult(pytest.approx(1, abs=1e-4), 0.0)
    assert not check_parity(lambda windows: torch.full((1, 2, 1, 40, 50), torch.nan), probe).passed
    few = foreground.clone()
    few[..., 20, :4] = 0.501
    assert not check_parity(answering(few), Probe(window, few - 0.002 * (few == few[0, 0, 20, 0]))).passed
    assert not ParityResult(0.0, 0.998).passed


def test_a_probe_shows_both_classes() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(2, 8, 3, padding=1), torch.nn.LeakyReLU(), torch.nn.Conv3d(8, 2, 1))
    with torch.no_grad():
        network[2].bias[0] += 3  # on noise it says background everywhere
    noise = torch.randn(1, 2, 8, 8, 8)
    assert float((network(noise).argmax(1) == 1).float().mean()) < 0.05
    probe = make_probe(network, 2, (8, 8, 8))
    assert 0.05 < float((probe.foreground > 0.5).float().mean()) < 0.95
    assert torch.equal(make_probe(network, 2, (8, 8, 8)).window, probe.window)
    with torch.no_grad():
        network[2].weight.zero_()
    with pytest.raises(ValueError, match="both classes"):
        make_probe(network, 2, (8, 8, 8))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source("3-D", tmp_path / "a")
    assert main(["members", "pack", str(folder), str(tmp_path / "b"), "--onnx"]) == 0
    check = ["members", "check", "--weights", str(tmp_path / "b"), "--device", "cpu", "--session", "onnx"]
    assert main(check) == 0
    assert "files unaltered" in capsys.readouterr().out
    (tmp_path / "b" / "fold_0" / "network.onnx").unlink()
    assert main(check) == 4
    assert main(["members", "pack", str(folder), str(tmp_path / "c"), "--precision", "bf16"]) == 2
