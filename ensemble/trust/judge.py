"""Judge how far a mask can be trusted: `judge(result, ensemble)` returns numbers and words."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ensemble.errors import UserError
from ensemble.files import read_json
from ensemble.pipeline import Ensemble, Result
from ensemble.trust.calibration import Calibration, Verdict, atypicality, expit
from ensemble.trust.evidence import CaseEvidence, gather_evidence
from ensemble.trust.reference import CALIBRATION, FOLDER, References, UnusableReference, read_references
from ensemble.trust.scores import compute_trust_scores

log = logging.getLogger(__name__)

_WORSE: Mapping[Verdict, int] = {"good": 0, "check": 1, "poor": 2}
#: Below this, a mask that is no worse than some usual ones is still called doubtful.
_LOW_DICE = 0.5
#: Reasons in words, by score.
_UNLIKE: Mapping[str, str] = {
    "rest": "the encoders' features of this brain are {:.1f} times as unusual as those of the median reference case",
    "histogram": "the intensities of DWI and ADC are {:.1f} times as unusual as those of the median reference case",
}
_USUAL = "images and mask look as usual"
_USUAL_AND_LOW = "the images look as usual, but usual masks like this one have a low Dice"


@dataclass(frozen=True)
class Trust:
    """How far the mask of a case can be trusted."""

    verdict: Verdict | None
    """None if there is nothing to judge by."""
    expected_dice: float | None
    """Expected Dice of the mask with a reader's; None for an empty mask, or if unknown."""
    interval: tuple[float, float] | None
    """Interval that contains the Dice of nine in ten usual patients."""
    scores: Mapping[str, float]
    """Each alone (see `scores.py`)."""
    why: tuple[str, ...]
    """A sentence for each reason."""
    missing: tuple[str, ...]
    """Scores that are missing, with the reason."""
    seconds: float = 0.0

    @property
    def headline(self) -> str:
        """The verdict in words, with the expected Dice if there is one."""
        if self.verdict is None:
            return "How far this mask can be trusted is not known."
        words = {"check": "Check this mask.", "poor": "Do not rely on this mask."}
        said = words.get(self.verdict, "Nothing speaks against this mask.")
        if self.expected_dice is None or self.interval is None:
            return said
        if self.doubtful:
            said = "A doubtful mask, though nothing about it is unusual."
        low, high = self.interval
        return f"{said} Expected Dice {self.expected_dice:.2f} ({low:.2f} to {high:.2f})."

    @property
    def doubtful(self) -> bool:
        """Whether nothing is unusual but a low Dice is expected: many usual cases have such masks."""
        return self.verdict == "good" and self.expected_dice is not None and self.expected_dice < _LOW_DICE

    @property
    def caveat(self) -> str:
        """A warning that a good verdict does not mean a right mask; empty for the others."""
        if self.verdict != "good":
            return ""
        unseen = (
            "a lesion that all members miss"
            if self.scores.get("volume_ml") == 0
            else "a tumour or old lesion taken for an infarct"
        )
        return f"That does not mean right: {unseen} may go unnoticed here."

    @property
    def text(self) -> str:
        """Headline, reasons and caveat as one text."""
        return " ".join(filter(None, (self.headline, self.reasons, self.caveat)))

    @property
    def reasons(self) -> str:
        """The reasons as a sentence; without a verdict, the reasons for its absence. Empty if there are none."""
        told = "; ".join(self.missing if self.verdict is None else self.why)
        return f"{told[0].upper()}{told[1:]}." if told else ""

    def as_json(self) -> dict[str, Any]:
        """Return what report.json holds about trust."""
        return {
            "verdict": self.verdict,
            "expected_dice": None if self.expected_dice is None else round(self.expected_dice, 4),
            "interval": None if self.interval is None else [round(end, 4) for end in self.interval],
            "scores": {name: float(f"{score:.5g}") for name, score in self.scores.items()},
            "why": list(self.why),
            "missing": list(self.missing),
        }


@dataclass(frozen=True)
class TrustModel:
    """Judges masks of an ensemble by its references and its calibration."""

    references: References
    calibration: Calibration | None

    @classmethod
    def of(cls, ensemble: Ensemble) -> TrustModel:
        """Read the references and calibration beside an ensemble's weights, if they belong to these weights."""
        weights = ensemble.config.weights_folder
        references, calibration = read_references(weights, ensemble.digests), None
        try:
            calibration = read_calibration(ensemble)
        except UnusableReference as reason:
            references = replace(references, missing=(*references.missing, f"expected Dice: {reason}"))
        return cls(references, calibration)

    def judge(self, result: Result) -> Trust:
        """Return how far the mask of a case can be trusted."""
        started = time.perf_counter()
        evidence = gather_evidence(result)
        scores, missing = compute_trust_scores(evidence, self.references), list(self.references.missing)
        missing += [
            f"{outcome.member}: its runtime does not expose its features"
            for outcome in result.outcomes
            if outcome.member in self.references.members
            and outcome.prediction is not None
            and outcome.prediction.features is None
        ]
        voted, calibrated = set(result.fused.voters), set(self.calibration.weights if self.calibration else ())
        if calibrated - voted:
            missing.append(
                f"expected Dice: its calibration needs the votes of {', '.join(sorted(calibrated - voted))}, too"
            )
        elif self.calibration is not None and not evidence.empty and self.calibration.logit(scores) is None:
            lacking = ", ".join(sorted(set(self.calibration.slopes) - set(scores)))
            missing.append(
                f"expected Dice: {f'these scores are missing: {lacking}' if lacking else 'it was not calibrated for these weights'}"
            )
        told = self.verdict(
            scores, empty=evidence.empty, all_voted=voted == calibrated, oddities=self._oddities(evidence)
        )
        return replace(told, missing=tuple(missing), seconds=time.perf_counter() - started)

    def _oddities(self, evidence: CaseEvidence) -> dict[str, str]:
        """Return the least usual measurement of images and of lesions, in words, by score."""
        images = self.references.images
        if images is None:
            return {}
        told = {}
        for name, (usual, found) in images.traits(evidence).items():
            trait, spreads = usual.oddest(found)
            told[name] = f"unusual: {usual.kinds[trait].words} ({spreads:.1f} standard deviations)" if trait else ""
        return told

    def verdict(
        self,
        scores: Mapping[str, float],
        *,
        empty: bool,
        all_voted: bool = True,
        oddities: Mapping[str, str] = MappingProxyType({}),
    ) -> Trust:
        """Return the verdict for some scores; `oddities` describe unusual values of `quality` and `mimicry` in words."""
        calibration = self.calibration
        far = {name: x for name, x in atypicality(scores).items() if calibration and name in calibration.looks}
        if calibration is None or not far:
            return Trust(None, None, None, scores, (), ())
        verdicts = {name: calibration.looks[name].verdict(x) for name, x in far.items()}
        looks: Verdict = max(verdicts.values(), key=_WORSE.__getitem__)
        words = {name: text.format(scores[name]) for name, text in _UNLIKE.items() if name in scores} | dict(oddities)
        reasons = [words.get(name, f"{name} is unusual") for name, verdict in verdicts.items() if verdict != "good"]
        likeness = min(calibration.looks[name].likeness(x) for name, x in far.items())
        logit = calibration.logit(scores) if all_voted and not empty else None
        right = calibration.empty_right if empty else None if logit is None else expit(logit)
        if right is not None:
            scores = {"combined": right * likeness, **scores}
        if logit is None:
            why = reasons or ["the images look as usual" + (", and no lesion was found" if empty else "")]
            return Trust(looks, None, None, scores, tuple(why), ())
        expected = expit(logit)
        interval = max(0.0, expected - calibration.residual), min(1.0, expected + calibration.residual)
        if verdicts.get("mimicry", "good") != "good":
            reasons.append("the expected Dice holds only if this is an infarct")
        likely = calibration.dice.verdict(-logit)
        if likely != "good":
            reasons.append(f"the expected Dice of {expected:.2f} is lower than in nearly all usual cases")
            if scores.get("agreement", 1.0) < 0.5:
                reasons.append(f"the members disagree: mean Dice of their masks {scores['agreement']:.2f}")
        verdict = max(looks, likely, key=_WORSE.__getitem__)
        trust = Trust(verdict, expected, interval, scores, tuple(reasons), ())
        return trust if reasons else replace(trust, why=(_USUAL_AND_LOW if trust.doubtful else _USUAL,))


def judge(result: Result, ensemble: Ensemble) -> Trust:
    """Judge how far the mask of a case can be trusted, with the references beside the ensemble's weights.

    Raises nothing, since a failure here must not lose the mask: then there is no verdict, and `missing` says why.
    """
    try:
        trust = TrustModel.of(ensemble).judge(result)
    except Exception as error:
        log.warning("trust in the mask is not known: judging failed", exc_info=True)
        return Trust(None, None, None, {}, (), (f"everything: judging failed ({type(error).__name__}: {error})",))
    if trust.verdict not in (None, "good"):
        log.warning("trust in the mask: %s: %s", trust.verdict, "; ".join(trust.why))
    return trust


def read_calibration(ensemble: Ensemble) -> Calibration:
    """Read the calibration for these members and weights. Raises UnusableReference."""
    path = ensemble.config.weights_folder / FOLDER / CALIBRATION
    if not path.is_file():
        raise UnusableReference("there is no calibration")
    try:
        told = read_json(path)
    except (UserError, OSError, ValueError) as error:
        raise UnusableReference(f"the calibration can't be read ({type(error).__name__}: {error})") from error
    calibration = Calibration.from_json(told)
    if {name: dict(digests) for name, digests in calibration.weights.items()} != {
        name: dict(digests) for name, digests in ensemble.digests.items()
    }:
        theirs, ours = ", ".join(calibration.weights), ", ".join(ensemble.digests)
        raise UnusableReference(f"the calibration was made with other members or weights ({theirs}; here: {ours})")
    return calibration
