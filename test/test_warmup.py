"""The first case that is nobody's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import get_args

import pytest

from conftest import StubMember
from ensemble.config import SkullStrip
from ensemble.families.base import InferenceSettings, MemberPrediction
from ensemble.inference.engine import MirrorMode
from ensemble.pipeline import Ensemble
from ensemble.prepare.case import PreparedCase
from ensemble.serve import warmup
from ensemble.types import Modality, ProgressCallback

Build = Callable[..., Ensemble]


class Recorder(StubMember):
    """Remembers how it was asked."""

    def __init__(self, name: str, **how: object) -> None:
        super().__init__(name, **how)  # type: ignore[arg-type]
        self.asked: list[tuple[str, frozenset[Modality]]] = []

    def predict(self, case: PreparedCase, settings: InferenceSettings, progress: ProgressCallback) -> MemberPrediction:
        self.asked.append((settings.tta, case.modalities))
        return super().predict(case, settings, progress)


@pytest.mark.parametrize("skull_strip", get_args(SkullStrip))
def test_every_member_runs_once_without_mirroring(
    stub_ensemble: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, skull_strip: str
) -> None:
    monkeypatch.setattr(
        "ensemble.prepare.skull.strip_skull", lambda *_: pytest.fail("the phantom has no skull to strip")
    )
    members = Recorder("a"), Recorder("b", needs=(Modality.FLAIR,))
    with caplog.at_level(logging.WARNING):
        warmup.warm_up(stub_ensemble(*members, tta="mirror", skull_strip=skull_strip))
    assert [member.asked for member in members] == [[(MirrorMode.NONE.value, frozenset(Modality))]] * 2
    assert not caplog.records


def test_a_member_that_fails_is_no_reason_to_end(stub_ensemble: Build, caplog: pytest.LogCaptureFixture) -> None:
    warmup.warm_up(stub_ensemble(StubMember("a", error=RuntimeError("no kernel image"))))
    assert "warm-up failed" in caplog.text
    assert "no kernel image" in caplog.text


def test_it_ends_when_time_is_up(
    stub_ensemble: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warmup, "WARM_UP_LIMIT_S", -1.0)
    member = Recorder("a")
    with caplog.at_level(logging.INFO):
        warmup.warm_up(stub_ensemble(member))
    assert not member.asked
    assert "warm-up stopped" in caplog.text
