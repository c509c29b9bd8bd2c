"""Train one member: `python -m training.train MEMBER --bank BANK --out model_weights/MEMBER --minutes M [--resume]`.

Short trainings on a CPU: a cosine over wall-clock time, bf16 arithmetic, and an average of the weights over the last steps.
The result is an nnU-Net v2 trained-model folder; it is written again every few minutes, so that training may be stopped at any moment.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ensemble.errors import WeightsBroken
from ensemble.memory import keep_freed_memory
from ensemble.weights.checkpoints import read_checkpoint
from training.batches import Bank, Batches, Source, draw_batch
from training.drafts import draft_of
from training.draw import Draw
from training.members import MEMBERS, MemberSpec, build_network, dataset_json, plans_json
from training.simulate import SHARED

LEARNING_RATE = 2e-3
WARM_UP = 0.02  # share of the training time
WEIGHT_DECAY = 1e-4
CLIP_NORM = 5.0
AVERAGING = 0.995  # decay of the weights' moving average, a step
DICE_SMOOTHING = 10.0  # voxels
SAVE_EVERY_S = 240.0
LOG_EVERY = 10
ENTROPY_WEIGHT = 12.0
RECALL_WEIGHT = 0.1  # weight of the missed part of small components; much more makes networks over-segment
CALIBRATION_BATCHES = 24
CHECKPOINT = Path("fold_0") / "checkpoint_final.pth"
CURVE = ("step", "minutes", "cases_in_bank", "rate", "loss", "dice")


def loss_of(logits: Tensor, label: Tensor, weight: Tensor, share: Tensor) -> Tensor:
    """Soft Dice of each example, weighted cross-entropy, and what is missed of small components on average.

    Args:
        logits: (n, 2, ...) background and lesion.
        label, weight: (n, ...).
        share: (n, ...), as `batches.recall_share` gives it.
    """
    lesion = logits[:, 1] - logits[:, 0]
    entropy = F.binary_cross_entropy_with_logits(lesion, label, reduction="none") * weight
    probability = torch.sigmoid(lesion).flatten(1)
    truth = label.flatten(1)
    if label.ndim == 3:  # slices: Dice over the batch, since most slices hold little or nothing
        probability, truth = probability.reshape(1, -1), truth.reshape(1, -1)
    overlap = (probability * truth).sum(1)
    dice = (2 * overlap + DICE_SMOOTHING) / (probability.sum(1) + truth.sum(1) + DICE_SMOOTHING)
    missed = (share * (1 - torch.sigmoid(lesion))).flatten(1).sum(1).mean()
    return (1 - dice).mean() + ENTROPY_WEIGHT * entropy.mean() + RECALL_WEIGHT * missed


def rate_at(progress: float, highest: float = LEARNING_RATE) -> float:
    """Learning rate after this share of the time: a short warm-up to `highest`, then a cosine to zero."""
    if progress < WARM_UP:
        return highest * (0.05 + 0.95 * progress / WARM_UP)
    return highest * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


class Training:
    """A member's training: network, moving average, optimiser, and the time already spent."""

    def __init__(self, spec: MemberSpec, device: str) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.layout = torch.channels_last_3d if spec.dimensions == 3 else torch.channels_last
        self.network = build_network(spec).to(self.device).to(memory_format=self.layout)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.network).eval()
        self.optimiser = torch.optim.AdamW(self.network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.steps = 0
        self.seconds = 0.0

    def step(self, images: Tensor, label: Tensor, weight: Tensor, share: Tensor, rate: float) -> tuple[float, float]:
        """One optimiser step; returns the loss and the batch's Dice at 0.5."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        images = images.to(self.device).contiguous(memory_format=self.layout)
        label, weight, share = label.to(self.device), weight.to(self.device), share.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits = self.network(images)
        loss = loss_of(logits.float(), label, weight, share)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        if torch.isfinite(norm):  # one overflow in bfloat16 must not end hours of training
            self.optimiser.step()
        self.steps += 1
        self._update_average()
        guess = (logits[:, 1] > logits[:, 0]).float()
        dice = 2 * (guess * label).sum() / (guess.sum() + label.sum()).clamp_min(1)
        return float(loss.detach()), float(dice)

    def freeze_norm(self) -> None:
        """Switch BatchNorm layers to their behaviour at inference."""
        for module in self._norms():
            module.eval()

    @torch.no_grad()
    def calibrate_norm(self, bank: Source, draw: Draw) -> None:
        """Set the statistics of BatchNorm to the mean over some batches: those of a moving average lag behind the weights."""
        for module in self._norms():
            module.reset_running_stats()
            module.momentum = None  # a plain mean
            module.train()
        for _ in range(CALIBRATION_BATCHES):
            images = draw_batch(self.spec, bank, draw)[0].to(self.device)
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                self.network(images.contiguous(memory_format=self.layout))
        self.average.load_state_dict(self.network.state_dict())

    def _norms(self) -> list[_BatchNorm]:
        return [module for module in self.network.modules() if isinstance(module, _BatchNorm)]

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(AVERAGING, (1 + self.steps) / (10 + self.steps))
        for mean, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(new, 1 - decay)
        for mean, new in zip(self.average.buffers(), self.network.buffers(), strict=True):
            if mean.dtype.is_floating_point:
                mean.lerp_(new, 1 - decay)

    def save_state(self, path: Path) -> None:
        state = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "steps": self.steps,
            "seconds": self.seconds,
        }
        with draft_of(path) as draft:
            torch.save(state, draft)

    def load_weights(self, path: Path) -> None:
        """Begin from an exported checkpoint's weights instead of random ones. Raises WeightsBroken for those of another network."""
        weights = read_checkpoint(path)["network_weights"]
        try:  # copied into the optimiser's parameters
            for network in (self.network, self.average):
                network.load_state_dict(weights)
        except RuntimeError as error:
            raise WeightsBroken(
                f"these are weights of another network than {self.spec.name}", where=path, found=str(error)[:200]
            ) from error

    def load_state(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps, self.seconds = state["steps"], state["seconds"]


def export(spec: MemberSpec, network: torch.nn.Module, out: Path) -> None:
    """Write an nnU-Net v2 trained-model folder: weights in half precision, BatchNorm's statistics in single."""
    (out / CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
    converted: dict[int, Tensor] = {}  # nnU-Net's modules hold the same tensor under several names: store it once
    weights = {
        name: converted.setdefault(value.data_ptr(), _stored(name, value))
        for name, value in network.state_dict().items()
    }
    checkpoint = {
        "network_weights": weights,
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": spec.configuration, "fold": 0},
        "inference_allowed_mirroring_axes": tuple(range(spec.dimensions)),
    }
    with draft_of(out / CHECKPOINT) as draft:
        torch.save(checkpoint, draft)
    for name, content in (("plans.json", plans_json(spec)), ("dataset.json", dataset_json(spec))):
        (out / name).write_text(json.dumps(content, indent=1) + "\n")


def _stored(name: str, value: Tensor) -> Tensor:
    keep = "running" in name or not value.dtype.is_floating_point
    return (
        value.detach().cpu().clone(memory_format=torch.contiguous_format)
        if keep
        else value.detach().cpu().half().contiguous()
    )


class Stop:
    """Whether SIGTERM arrived meanwhile; the state is saved before the process ends."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


@dataclass(frozen=True)
class Length:
    """How long a training is: in minutes of wall-clock time (those before a resumption counted in), or in steps."""

    minutes: float = 0.0
    steps: int | None = None
    """Length of the training in steps instead of minutes; then the same command gives the same weights."""

    def spent(self, training: Training) -> float:
        """Share that is done."""
        if self.steps is not None:
            return training.steps / max(1, self.steps)
        return training.seconds / max(1e-9, 60 * self.minutes)


@dataclass(frozen=True)
class Recipe:
    """How one network is trained."""

    length: Length
    seed: int = 1
    device: str = "cpu"
    workers: int = 0
    """Processes that draw batches; 0: the training itself does."""
    start_from: Path | None = None
    """Checkpoint from whose weights training starts."""
    rate: float = LEARNING_RATE
    """Highest, after the warm-up."""
    frozen_norm: bool = False
    """Normalise by stored statistics, as at inference, not by each batch's own; measured anew at the start from other weights."""
    anneal_from: float | None = None
    """Share (0-1) of the learning rate's schedule to go on from; by default that of the length spent."""


def train(spec: MemberSpec, bank: Source, out: Path, state: Path, recipe: Recipe, *, resume: bool) -> bool:
    """Train until the length is spent, or SIGTERM comes. Returns whether the training is complete.

    The state is saved every few minutes and at the end; with a length in steps, going on from it gives the very weights of a training that
    was not interrupted.
    """
    training, length = Training(spec, recipe.device), recipe.length
    if resume:
        training.load_state(state)
    elif recipe.start_from is not None:
        training.load_weights(recipe.start_from)
        if recipe.frozen_norm:
            training.calibrate_norm(bank, Draw(recipe.seed))
    if recipe.frozen_norm:
        training.freeze_norm()
    out.mkdir(parents=True, exist_ok=True)
    before, started, saved = training.seconds, time.monotonic(), time.monotonic()
    first, recent = length.spent(training), list[tuple[float, float]]()
    batches = Batches(spec, bank, recipe.seed).since(training.steps, recipe.workers)
    with _curve(out / "training.csv", training.steps) as file, Stop() as stop:
        while (spent := length.spent(training)) < 1 and not stop.asked:
            progress = spent
            if recipe.anneal_from is not None:
                progress = recipe.anneal_from + (1 - recipe.anneal_from) * (spent - first) / (1 - first)
            rate = rate_at(progress, recipe.rate)
            recent.append(training.step(*next(batches), rate))
            training.seconds = before + time.monotonic() - started
            if training.steps % LOG_EVERY == 0:
                loss, dice = (sum(part) / len(recent) for part in zip(*recent, strict=True))
                minutes = f"{training.seconds / 60:.2f}"
                row = [training.steps, minutes, len(bank), f"{rate:.2e}", f"{loss:.4f}", f"{dice:.4f}"]
                csv.writer(file).writerow(row)
                file.flush()
                print(*row, flush=True)
                recent.clear()
            if time.monotonic() - saved > SAVE_EVERY_S:
                training.save_state(state)
                export(spec, training.average, out)
                saved = time.monotonic()
    training.save_state(state)
    export(spec, training.average, out)
    return length.spent(training) >= 1


def _curve(path: Path, steps: int) -> TextIO:
    """The training's curve so far, open for more: rows beyond the step that is gone on from are written again."""
    rows = list(csv.reader(path.read_text().splitlines())) if steps and path.exists() else []
    file = path.open("w", newline="")
    writer = csv.writer(file)
    writer.writerow(CURVE)
    writer.writerows(row for row in rows[1:] if int(row[0]) <= steps)
    return file


def _with(member: MemberSpec, window: tuple[int, ...] | None, batch: int | None) -> MemberSpec:
    """The member with another training window or batch. Raises ValueError for a window that its network can't halve often enough."""
    step = 2 ** (len(member.features) - 1)
    if window and (len(window) != member.dimensions or any(size % step or size <= 0 for size in window)):
        raise ValueError(
            f"a window of {member.name} has {member.dimensions} sizes, each a multiple of {step}, not {window}"
        )
    return replace(member, training_patch=window or member.training_patch, batch=batch or member.batch)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.train", description="Train one member on a bank of simulated patients."
    )
    parser.add_argument("member", choices=sorted(MEMBERS))
    parser.add_argument(
        "--bank", type=Path, required=True, help="made by python -m training.simulate; may grow meanwhile"
    )
    parser.add_argument("--out", type=Path, required=True, help="the nnU-Net v2 model folder to write")
    parser.add_argument("--minutes", type=float, required=True, help="of wall-clock time, in all")
    parser.add_argument(
        "--state", type=Path, help="where training can be resumed from (default: beside the bank's cases)"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--anneal-from", type=float, help="go on from this share of the learning rate's schedule")
    parser.add_argument("--start-from", type=Path, help="model folder whose weights to begin with")
    parser.add_argument(
        "--rate", type=float, default=LEARNING_RATE, help="highest learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--frozen-norm", action="store_true", help="with --start-from: normalise as at inference, not by each batch"
    )
    parser.add_argument(
        "--shared", type=Path, default=SHARED, help="folder with lesions/, for the bank's real backgrounds"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--threads", type=int, default=1, help="two trainings of one thread each are faster than one of two"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that draw batches, for a GPU (default: none)")
    parser.add_argument(
        "--window",
        type=_sizes,
        help="training window in voxels, such as 32,48,48 (default: the member's own)",
    )
    parser.add_argument("--batch", type=int, help="windows, or slices, in a step (default: the member's own)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    state = options.state or options.bank / f"{options.member}_state.pt"
    bank = Bank(options.bank, options.shared)
    recipe = Recipe(
        Length(options.minutes),
        options.seed,
        options.device,
        options.workers,
        options.start_from / CHECKPOINT if options.start_from else None,
        options.rate,
        options.frozen_norm,
        options.anneal_from,
    )
    try:
        spec = _with(MEMBERS[options.member], options.window, options.batch)
    except ValueError as error:
        parser.error(str(error))
    train(spec, bank, options.out, state, recipe, resume=options.resume)


if __name__ == "__main__":
    main()
