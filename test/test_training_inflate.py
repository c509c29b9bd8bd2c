"""A 3-D member that is started from a 2-D one, or with an image more, answers as that one where it can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ensemble.weights.checkpoints import read_checkpoint
from training.inflate import inflate, main
from training.members import MEMBERS, MemberSpec, build_network
from training.train import CHECKPOINT, export

FEATURES = (4, 6, 8, 8, 8)


def small(name: str) -> MemberSpec:
    return replace(MEMBERS[name], features=FEATURES)


def random_network(spec: MemberSpec) -> torch.nn.Module:
    torch.manual_seed(0)
    network = build_network(spec).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr,operator]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]
    return network


@torch.inference_mode()
def test_a_volume_of_equal_slices_is_answered_as_its_slice() -> None:
    flat, deep = small("slice2d"), small("iso3d")
    network = random_network(flat)
    solid = inflate(flat, network.state_dict(), deep).eval()
    images = torch.randn(1, 2, 32, 48)
    expected = network(images.repeat(1, 5, 1, 1))  # a slice and four neighbours that look like it
    answer = solid(images[:, :, None].expand(-1, -1, 8, -1, -1))
    assert float((expected - expected.mean()).abs().max()) > 0.1
    torch.testing.assert_close(answer, expected[:, :, None].expand_as(answer), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_an_image_more_changes_nothing_at_first() -> None:
    iso = small("iso3d")
    flair = replace(iso, channels=MEMBERS["flair3d"].channels)
    network = random_network(iso)
    wider = inflate(iso, network.state_dict(), flair).eval()
    images = torch.randn(1, 3, 8, 32, 32)
    torch.testing.assert_close(wider(images), network(images[:, :2]), atol=1e-5, rtol=1e-5)


def test_networks_that_are_not_alike_are_refused() -> None:
    source = small("slice2d")
    with pytest.raises(ValueError, match="can't become"):
        inflate(source, random_network(source).state_dict(), replace(small("iso3d"), features=(4, 6, 8, 8, 10)))
    with pytest.raises(ValueError, match="different layers"):
        inflate(source, random_network(source).state_dict(), replace(small("iso3d"), convolutions=(1, 2, 2, 2, 2)))


def test_the_command_writes_a_folder_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(MEMBERS["slice2d"], build_network(MEMBERS["slice2d"]), tmp_path / "weights" / "slice2d")
    main(["slice2d", "iso3d", "--weights", str(tmp_path / "weights"), "--out", str(tmp_path / "start")])
    given = read_checkpoint(tmp_path / "start" / CHECKPOINT)["network_weights"]
    build_network(MEMBERS["iso3d"]).load_state_dict(given)
    assert capsys.readouterr().out == ""
