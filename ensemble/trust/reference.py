"""References of usual cases: their features, intensities and traits, in small files beside the members.

    <weights>/trust/<member>.safetensors   spectra of its features, and the digests of the weights
    <weights>/trust/images.json            intensities of DWI and ADC, and traits of images and lesions
    <weights>/trust/calibration.json       see `calibration.py`

A file made with other weights is not used, and the report says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ensemble.files import error_in_words, file_sha256, parse_json, read_json
from ensemble.publish import publish
from ensemble.trust import quality
from ensemble.trust.evidence import COMPARED, QUANTILES, CaseEvidence
from ensemble.trust.quality import TraitMeaning
from ensemble.trust.spectrum import Spectrum, fit_spectrum
from ensemble.types import AnyArray, FloatArray

#: Members are safetensors, so that none can be called as one of the others is.
FOLDER, IMAGES, CALIBRATION, SUFFIX = "trust", "images.json", "calibration.json", ".safetensors"
#: Fewest cases of which a reference is made, and lesions of which one of lesions is.
MIN_CASES, MIN_LESIONS = 20, 10
#: Number of folds; the usual distance in a fold is measured with references fitted on the other folds.
PARTS = 5
_VERSION, _IMAGES_VERSION = 1, 2


class UnusableReference(Exception):
    """A reference that does not apply to these weights; the reason goes into the report."""


def refuse_other_version(what: str, version: object, ours: int) -> None:
    """Raise UnusableReference for a file made by another release."""
    if version != ours:
        raise UnusableReference(
            f"{what} was made by another release (version {version}; here: {ours}): make it again with members fit-reference"
        )


@dataclass(frozen=True)
class FeatureReference:
    """The distribution of the reference cases' feature vectors, and the usual distance of a further such case from it."""

    spectrum: Spectrum
    usual: float
    usual_rest: float
    """Median distance and rest (`spectrum.Spectrum`) of cases left out of the fit."""

    def distance(self, features: FloatArray) -> float:
        """Return the distance of a vector (D,) in the stable modes, in units of the usual one; 0 without stable modes."""
        return self.spectrum.distance(features) / self.usual if self.usual > 0 else 0.0

    def rest(self, features: FloatArray) -> float:
        """Return the distance of a vector outside the stable modes, in units of the usual one."""
        return self.spectrum.rest(features) / self.usual_rest if self.usual_rest > 0 else 0.0

    @classmethod
    def of(cls, samples: AnyArray) -> FeatureReference:
        """Fit the reference to samples (N, D)."""
        whole, at = fit_spectrum(samples), np.arange(len(samples)) % PARTS
        found: list[tuple[float, float]] = []
        for part in range(PARTS):
            others = fit_spectrum(samples[at != part], modes=whole.modes)
            found += [(others.distance(sample), others.rest(sample)) for sample in samples[at == part]]
        usual, usual_rest = np.median(found, axis=0)
        return cls(whole, float(usual), float(usual_rest))


@dataclass(frozen=True)
class MemberReference:
    """A member's features of reference cases."""

    weights: Mapping[str, str]
    """SHA-256 of each file that determines its predictions."""
    whole: FeatureReference
    lesion: FeatureReference | None
    """None if too few of the cases had a lesion."""


@dataclass(frozen=True)
class ReferenceTraits:
    """Mean and standard deviation of each trait over the reference cases, and the usual distance of such a case from the mean."""

    mean: Mapping[str, float]
    spread: Mapping[str, float]
    usual: float
    """Median over the cases of the largest excess, in standard deviations."""
    kinds: Mapping[str, TraitMeaning]

    def oddest(self, found: Mapping[str, float]) -> tuple[str, float]:
        """Return the name of the most unusual trait, and its excess in standard deviations."""
        excess = {
            name: self.kinds[name].excess((found[name] - mean) / self.spread[name])
            for name, mean in self.mean.items()
            if name in found
        }
        return max(excess.items(), key=lambda one: one[1], default=("", 0.0))

    def distance(self, found: Mapping[str, float]) -> float:
        """Return the excess of the most unusual trait, in units of the usual one."""
        return self.oddest(found)[1] / self.usual

    @classmethod
    def of(
        cls, cases: Sequence[Mapping[str, float]], kinds: Mapping[str, TraitMeaning], least: int
    ) -> ReferenceTraits | None:
        """Fit the traits that at least `least` cases have; None if there are none."""
        values = {name: [case[name] for case in cases if name in case] for name in kinds}
        values = {name: numbers for name, numbers in values.items() if len(numbers) >= least}
        if not values:
            return None
        mean = {name: float(np.mean(numbers)) for name, numbers in values.items()}
        spread = {name: max(float(np.std(numbers, ddof=1)), 1e-3) for name, numbers in values.items()}
        far = [cls(mean, spread, 1.0, kinds).oddest(case)[1] for case in cases]
        return cls(mean, spread, max(float(np.median(far)), 1e-3), kinds)


@dataclass(frozen=True)
class ImageReference:
    """Intensities of the reference cases, and traits of their images and lesions."""

    quantiles: Mapping[str, FloatArray]
    """By image: mean of the quantiles `evidence.QUANTILES` (50,) in the brain."""
    usual: Mapping[str, float]
    """By image: median distance of the cases from that."""
    quality: ReferenceTraits | None = None
    lesions: ReferenceTraits | None = None
    """None if too few of the cases had a lesion."""

    def traits(self, evidence: CaseEvidence) -> dict[str, tuple[ReferenceTraits, Mapping[str, float]]]:
        """Return, by the name of the score that compares them, the traits of reference cases and those of a case that has some."""
        pairs = {"quality": (self.quality, evidence.quality), "mimicry": (self.lesions, evidence.surroundings)}
        return {name: (usual, found) for name, (usual, found) in pairs.items() if usual is not None and found}

    def distance(self, intensities: Mapping[str, FloatArray]) -> float:
        """Return the 1-Wasserstein distance of the less usual image's histogram, in units of the usual one."""
        apart = {name: float(np.abs(intensities[name] - mean).mean()) for name, mean in self.quantiles.items()}
        return max(distance / self.usual[name] for name, distance in apart.items())


@dataclass(frozen=True)
class References:
    """The references of an ensemble: how usual cases look to its members and measurements."""

    members: Mapping[str, MemberReference]
    images: ImageReference | None
    missing: tuple[str, ...] = ()
    """References that are missing or not used, with the reason; a sentence each."""


def fit_references(
    evidence: Sequence[CaseEvidence], digests: Mapping[str, Mapping[str, str]], *, least: int = MIN_CASES
) -> References:
    """Fit the references to the evidence of cases that count as usual: features, intensities, quality and surroundings of lesions.

    `digests` holds by member the SHA-256 of each of its weight files; the references are valid for these weights only. Members with
    features of fewer than `least` cases are left out. Raises ValueError for fewer than `least` cases.
    """
    if len(evidence) < least:
        raise ValueError(f"{len(evidence)} cases are too few for a reference; at least {least} are needed")
    members = {}
    for name, weights in digests.items():
        whole = [found.whole[name] for found in evidence if name in found.whole]
        lesion = [found.lesion[name] for found in evidence if name in found.lesion]
        if len(whole) >= least:
            of_lesions = FeatureReference.of(np.stack(lesion)) if len(lesion) >= MIN_LESIONS else None
            members[name] = MemberReference(dict(weights), FeatureReference.of(np.stack(whole)), of_lesions)
    return References(members, _fit_images(evidence, least))


def _fit_images(evidence: Sequence[CaseEvidence], least: int) -> ImageReference:
    stacks = {name: np.stack([found.intensities[name] for found in evidence]) for name in evidence[0].intensities}
    means = {name: stack.mean(axis=0) for name, stack in stacks.items()}
    usual = {
        name: max(1e-6, float(np.median(np.abs(stack - means[name]).mean(axis=1)))) for name, stack in stacks.items()
    }
    lesions = [found.surroundings for found in evidence if found.surroundings]
    return ImageReference(
        means,
        usual,
        ReferenceTraits.of([found.quality for found in evidence], quality.IMAGES, least),
        ReferenceTraits.of(lesions, quality.LESIONS, min(least, MIN_LESIONS)),
    )


def write_references(references: References, calibration: Mapping[str, Any] | None, weights: Path) -> None:
    """Write everything to `<weights>/trust`, all or nothing. Raises UsageError if that can't be written."""
    files = {f"{name}{SUFFIX}": _member_bytes(member) for name, member in references.members.items()}
    if references.images is not None:
        files[IMAGES] = _image_bytes(references.images)
    if calibration is not None:
        files[CALIBRATION] = (json.dumps(calibration, indent=1) + "\n").encode()
    with publish(weights / FOLDER) as draft:
        for name, content in files.items():
            (draft / name).write_bytes(content)


def read_references(weights: Path, digests: Mapping[str, Mapping[str, str]]) -> References:
    """Read the references for members with these digests. Unused ones are listed in `missing`, with the reason."""
    members, missing, images = {}, [], None
    for name, digest in digests.items():
        try:
            members[name] = _read_member(weights / FOLDER / f"{name}{SUFFIX}", digest)
        except UnusableReference as reason:
            missing.append(f"{name}: {reason}")
    try:
        images = _read_images(weights / FOLDER / IMAGES)
    except UnusableReference as reason:
        missing.append(f"images: {reason}")
    return References(members, images, tuple(missing))


def reference_digests(weights: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in `<weights>/trust` by name, because verdicts depend on them.

    A file that can't be read affects no verdict, so it is left out.
    """
    return {path.name: _digest(path) for path in sorted((weights / FOLDER).glob("*")) if path.is_file()}


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        return ""


def _member_bytes(member: MemberReference) -> bytes:
    tensors, about = {}, {}
    for part, cloud in (("whole", member.whole), ("lesion", member.lesion)):
        if cloud is not None:
            spectrum = cloud.spectrum
            tensors[f"{part}.mean"] = np.asarray(spectrum.mean, np.float32)
            tensors[f"{part}.vectors"] = np.ascontiguousarray(spectrum.vectors, np.float32)
            tensors[f"{part}.values"] = np.asarray(spectrum.values, np.float32)
            about[part] = {"n": spectrum.n, "usual": cloud.usual, "usual_rest": cloud.usual_rest}
    content = {"version": _VERSION, "weights": dict(member.weights), "clouds": about}
    return save(tensors, {"trust": json.dumps(content, sort_keys=True)})


def _image_bytes(images: ImageReference) -> bytes:
    told = {
        name: {"quantiles": images.quantiles[name].tolist(), "usual": usual} for name, usual in images.usual.items()
    }
    traits = {
        part: None if normal is None else {"mean": normal.mean, "spread": normal.spread, "usual": normal.usual}
        for part, normal in (("quality", images.quality), ("lesions", images.lesions))
    }
    return (json.dumps({"version": _IMAGES_VERSION, "images": told} | traits, indent=1) + "\n").encode()


def _read_member(path: Path, digests: Mapping[str, str]) -> MemberReference:
    tensors, about = _read(path)
    try:
        if about["weights"] != dict(digests):
            raise UnusableReference("the reference was made with other weights")
        clouds = {part: _cloud(tensors, part, told) for part, told in about["clouds"].items()}
        return MemberReference(about["weights"], clouds["whole"], clouds.get("lesion"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnusableReference(f"the reference is damaged ({error_in_words(error)})") from error


def _cloud(tensors: Mapping[str, AnyArray], part: str, told: Mapping[str, Any]) -> FeatureReference:
    mean, vectors, values = (tensors[f"{part}.{name}"].astype(np.float64) for name in ("mean", "vectors", "values"))
    if mean.ndim != 1 or vectors.shape != (len(values), len(mean)) or not (values > 0).all():
        raise ValueError("its modes do not fit together")
    return FeatureReference(
        Spectrum(mean, vectors, values, int(told["n"])), float(told["usual"]), float(told["usual_rest"])
    )


def _read_images(path: Path) -> ImageReference:
    if not path.is_file():
        raise UnusableReference("there is no reference")
    try:
        about = read_json(path)
        refuse_other_version("the reference", about["version"], _IMAGES_VERSION)
        quantiles = {str(name): np.array(told["quantiles"], np.float32) for name, told in about["images"].items()}
        usual = {str(name): float(told["usual"]) for name, told in about["images"].items()}
        fits = all(one.shape == QUANTILES.shape and np.isfinite(one).all() for one in quantiles.values())
        if set(usual) != {m.value for m in COMPARED} or not fits or not all(0 < x < np.inf for x in usual.values()):
            raise ValueError("not the quantiles of this version")
        return ImageReference(
            quantiles, usual, _traits(about["quality"], quality.IMAGES), _traits(about["lesions"], quality.LESIONS)
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnusableReference(f"the reference is damaged ({error_in_words(error)})") from error


def _traits(told: Any, kinds: Mapping[str, TraitMeaning]) -> ReferenceTraits | None:
    if told is None:
        return None
    mean, spread = ({str(name): float(value) for name, value in told[key].items()} for key in ("mean", "spread"))
    usual = float(told["usual"])
    numbers = np.array([*mean.values(), *spread.values(), usual])
    if not mean or set(mean) != set(spread) or not set(mean) <= set(kinds) or not np.isfinite(numbers).all():
        raise ValueError("not the numbers of this version")
    if min(usual, *spread.values()) <= 0:
        raise ValueError("a spread of nothing")
    return ReferenceTraits(mean, spread, usual, kinds)


def _read(path: Path) -> tuple[dict[str, AnyArray], dict[str, Any]]:
    """Read the tensors of a file, all finite, and their description. Raises UnusableReference."""
    if not path.is_file():
        raise UnusableReference("there is no reference")
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
            about: dict[str, Any] = parse_json((file.metadata() or {})["trust"])
        refuse_other_version("the reference", about["version"], _VERSION)
        if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError("not finite")
        return tensors, about
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UnusableReference(f"the reference is damaged ({error_in_words(error)})") from error
