"""`listen` with members that need no weights, as a process: python test/listening.py listen --send-to ... The worker imports this too."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from conftest import StubMember  # noqa: E402
from ensemble import pipeline  # noqa: E402
from ensemble.config import RunConfig  # noqa: E402
from ensemble.families.base import InferenceSettings, MemberPrediction  # noqa: E402
from ensemble.families.spec import MemberSpec  # noqa: E402
from ensemble.pipeline import Ensemble  # noqa: E402
from ensemble.serve import warmup  # noqa: E402


class SlowMember(StubMember):
    """Takes as long as the environment says."""

    def predict(self, *arguments: Any) -> MemberPrediction:
        time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
        return super().predict(*arguments)


def load(config: RunConfig) -> Ensemble:
    members = (SlowMember("a"), SlowMember("b"))
    specs = tuple(MemberSpec(member.name, "nnunet", Path("/nowhere")) for member in members)
    return Ensemble(config, InferenceSettings(), specs, members, 0.0, {"a": {"x": "0" * 64}})


pipeline.load_from_config = load
warmup.warm_up = lambda ensemble: None

if __name__ == "__main__":
    from ensemble.cli import main

    sys.exit(main())
