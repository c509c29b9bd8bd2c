"""Rebuild TorchScript networks from their weights, and check them against the code in the files, which is read but never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ensemble.errors import WeightsBroken
from ensemble.families.nvauto.archive import ArchivedModule, TorchScriptArchive, read_torchscript_archive
from ensemble.families.nvauto.folder import PACKED_FORM, PACKED_WEIGHTS, SCRIPT_SUFFIX
from ensemble.families.nvauto.network import SegResNetConfig, Shapes, build_segresnet
from ensemble.families.nvauto.traced import TracedModule, UnreadableTrace
from ensemble.files import error_in_words, read_json
from ensemble.program import command_line
from ensemble.publish import write_json
from ensemble.weights.checkpoints import load_weights
from ensemble.weights.packed import PackedPrecision, read_packed, write_packed

#: Largest difference of logits, relative to their range; 1e-6 was measured.
_TOLERANCE = 1e-4
#: Assumed for a TorchScript network whose archive does not describe it; this affects only the memory estimate.
_UNKNOWN = SegResNetConfig("SegResNet", "group", 8, 1e-5, "relu", 0.0, "linear", ((2, 2, 2),) * 4, 2, 32)
_FAILURES = (ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError, RecursionError, AssertionError)


def read_segresnet_config(path: Path) -> SegResNetConfig:
    """Read a network's architecture from its small files. Raises WeightsBroken if a packed network does not state it."""
    if path.suffix != SCRIPT_SUFFIX:
        return _packed_form(path)
    try:
        archive = read_torchscript_archive(path, weights=False)
        weights = [tensor for tensor in archive.parameters.values() if tensor.ndim == 5 and tensor.shape[1] == 2]
        features = max((len(tensor) for tensor in weights), default=_UNKNOWN.features)
    except WeightsBroken:
        features = _UNKNOWN.features
    return SegResNetConfig(**(vars(_UNKNOWN) | {"features": features}))


def rebuild_network(path: Path) -> torch.nn.Module:
    """Build the network of a file, packed or not, with its weights. Raises WeightsBroken."""
    if path.suffix == SCRIPT_SUFFIX:
        return _from_script(path)[0]
    weights, _ = read_packed(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    try:
        network = build_segresnet(_packed_form(path), shapes)
    except _FAILURES as error:
        raise WeightsBroken(
            f"the weights of a packed member do not fit its network description {PACKED_FORM}",
            where=path,
            found=error_in_words(error)[:200],
            do=f"make the folder again from the original weights: {command_line('members pack SRC DST')}",
        ) from error
    load_weights(network, weights, path)
    return network


def pack_nvauto_network(source: Path, target_folder: Path, precision: PackedPrecision) -> None:
    """Write a network into a folder in packed form. Raises WeightsBroken if it can't be rebuilt exactly."""
    if source.suffix == SCRIPT_SUFFIX:
        network, form = _from_script(source)
    else:
        network, form = rebuild_network(source), _packed_form(source)
    write_packed(target_folder / PACKED_WEIGHTS, network.state_dict(), {}, precision)
    write_json(form.as_json(), target_folder / PACKED_FORM)


def _packed_form(path: Path) -> SegResNetConfig:
    where = path.with_name(PACKED_FORM)
    try:
        return SegResNetConfig.from_json(read_json(where))
    except (OSError, *_FAILURES) as error:
        raise WeightsBroken(
            "the network description of a packed member can't be read",
            where=where,
            found=error_in_words(error)[:200],
            do=f"make the folder again from the original weights: {command_line('members pack SRC DST')}",
        ) from error


def _from_script(path: Path) -> tuple[torch.nn.Module, SegResNetConfig]:
    archive = read_torchscript_archive(path)
    try:
        traced = TracedModule(archive)
        shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in archive.parameters.items()}
        form = _form(archive, traced, shapes)
        network = build_segresnet(form, shapes)
        load_weights(network, archive.parameters, path)
        network.eval()
        window = torch.randn((1, form.channels, *form.smallest_window), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected, answer = traced(window.clone()), network(window)
        apart = float((answer - expected).abs().max()) if answer.shape == expected.shape else float("inf")
        if not apart <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise UnreadableTrace(f"its logits lie {apart:g} from those of the network rebuilt from its weights")
    except WeightsBroken as error:
        raise _not_ours(path, f"{error.what}: {error.found}") from error
    except _FAILURES as error:
        raise _not_ours(path, error_in_words(error)[:300]) from error
    return network, form


def _not_ours(path: Path, found: str) -> WeightsBroken:
    return WeightsBroken(
        "the TorchScript network can't be rebuilt",
        where=path,
        found=found,
        do="only traced SegResNet and SegResNetDS of MONAI can; use this file as it is: --allow-torchscript, or a manifest.json that lists"
        " it with its sha256",
    )


def _form(archive: TorchScriptArchive, traced: TracedModule, shapes: Shapes) -> SegResNetConfig:
    """Return the architecture that the archive's code describes. Raises ValueError or KeyError if it is not one of the two."""
    if "encoder.conv_init.weight" in shapes:
        kind, first, block, down, up = (
            "SegResNetDS",
            "encoder.conv_init",
            "encoder.layers.0.blocks.0",
            "encoder.layers.{}.downsample",
            "up_layers.0.upsample",
        )
        activation, lowest = f"{block}.act1", 0
    elif "convInit.conv.weight" in shapes:
        kind, first, block, down, up = (
            "SegResNet",
            "convInit.conv",
            "down_layers.0.1",
            "down_layers.{}.0.conv",
            "up_samples.0.1",
        )
        activation, lowest = f"{block}.act", 1
    else:
        raise ValueError(f"its first weights are called {next(iter(shapes), 'nothing')}")
    norm, groups, eps = _norm(traced, _at(archive, f"{block}.norm1"))
    activated, slope = _activation(traced, _at(archive, activation))
    strides: list[tuple[int, ...]] = []
    while f"{down.format(level := lowest + len(strides))}.weight" in shapes:
        arguments = traced.arguments(_at(archive, down.format(level)), "_convolution")
        if arguments is None:
            raise ValueError("a convolution that is not used")
        strides.append(tuple(arguments[3]))
    features, channels, *_ = shapes[f"{first}.weight"]
    content = {
        "network": kind,
        "norm": norm,
        "groups": groups,
        "eps": eps,
        "activation": activated,
        "slope": slope,
        "upsampling": "deconv" if f"{up}.deconv.weight" in shapes else "linear",
        "strides": strides,
        "channels": channels,
        "features": features,
    }
    return SegResNetConfig.from_json(content)


def _norm(traced: TracedModule, module: ArchivedModule) -> tuple[str, int, float]:
    """Return kind, groups and eps of the normalisation. The code omits default arguments at the end of a call."""
    for kind, place in (("group", 4), ("batch", 7), ("instance", 7)):
        if (arguments := traced.arguments(module, f"{kind}_norm")) is not None:
            groups = int(arguments[1]) if kind == "group" else 1
            return kind, groups, float(arguments[place]) if len(arguments) > place else 1e-5
    raise ValueError(f"an unknown normalisation, {module.name}")


def _activation(traced: TracedModule, module: ArchivedModule) -> tuple[str, float]:
    """Return the kind of activation, and its negative slope."""
    for kind, default in (("relu", 0.0), ("leaky_relu", 0.01)):
        for name in (kind, f"{kind}_"):
            if (arguments := traced.arguments(module, name)) is not None:
                return kind, float(arguments[1]) if len(arguments) > 1 else default
    raise ValueError(f"an unknown activation, {module.name}")


def _at(archive: TorchScriptArchive, place: str) -> ArchivedModule:
    found: Any = archive.root
    for name in place.split("."):
        found = found.held[name]
    if not isinstance(found, ArchivedModule):
        raise ValueError(f"{place} is no module")
    return found
