"""Interpret the straight-line code of a traced network without running it; only known calls. Rebuilt networks are checked against it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from ensemble.families.nvauto.archive import ArchivedModule, TorchScriptArchive


class UnreadableTrace(ValueError):
    """The code of a TorchScript archive contains something that no traced convolutional network does."""


class TracedModule:
    """The network of an archive, as its code describes it."""

    def __init__(self, archive: TorchScriptArchive) -> None:
        self._archive = archive
        self._classes: dict[str, dict[str, dict[str, ast.FunctionDef]]] = {}

    def __call__(self, windows: torch.Tensor) -> Any:
        """Return the network's output for windows. Raises Unreadable, or what torch raises."""
        return self._call(self._archive.root, "forward", [windows])

    def arguments(self, module: ArchivedModule, operation: str) -> list[Any] | None:
        """Return the arguments of a module's only call of an operation; None for arguments that are not plain values.

        None without such a call.
        """
        for function in self._methods(module.name).values():
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and _dotted(node.func) == f"torch.{operation}":
                    return [_literal(argument) for argument in node.args]
        return None

    def _methods(self, name: str) -> Mapping[str, ast.FunctionDef]:
        place, _, own = name.rpartition(".")
        if place not in self._classes:
            try:
                tree = ast.parse(self._archive.code[place])
            except (SyntaxError, KeyError, ValueError) as error:
                raise UnreadableTrace(f"no code for {name}") from error
            self._classes[place] = {
                found.name: {f.name: f for f in found.body if isinstance(f, ast.FunctionDef)}
                for found in tree.body
                if isinstance(found, ast.ClassDef)
            }
        return self._classes[place].get(own, {})

    def _call(self, module: ArchivedModule, method: str, arguments: list[Any]) -> Any:
        function = self._methods(module.name).get(method)
        if function is None or len(function.args.args) != len(arguments) + 1:
            raise UnreadableTrace(f"{module.name}.{method} with {len(arguments)} arguments")
        names = dict(zip((argument.arg for argument in function.args.args), [module, *arguments], strict=True))
        for line in function.body:
            if isinstance(line, ast.Return):
                return None if line.value is None else self._value(line.value, names)
            if isinstance(line, ast.Assign) and len(line.targets) == 1:
                _bind(line.targets[0], self._value(line.value, names), names)
            elif isinstance(line, ast.AnnAssign) and line.value is not None:
                _bind(line.target, self._value(line.value, names), names)
            elif isinstance(line, ast.Expr):
                self._value(line.value, names)
            else:
                raise UnreadableTrace(f"{type(line).__name__} in {module.name}")
        return None

    def _value(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return names[node.id] if node.id in names else _unknown(node)
        if isinstance(node, ast.Tuple | ast.List):
            return [self._value(part, names) for part in node.elts]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._value(node.operand, names)
        if isinstance(node, ast.Attribute):
            if _dotted(node).startswith("CONSTANTS.c"):
                return self._archive.constants[int(node.attr[1:])]
            return _held(self._value(node.value, names), node.attr)
        if isinstance(node, ast.Call):
            return self._called(node, names)
        return _unknown(node)

    def _called(self, node: ast.Call, names: Mapping[str, Any]) -> Any:
        name = _dotted(node.func)
        if name == "annotate":
            return self._value(node.args[1], names)
        arguments = [self._value(argument, names) for argument in node.args]
        options = {str(word.arg): self._value(word.value, names) for word in node.keywords}
        if name == "getattr":
            return _held(*arguments)
        if name in _OPERATIONS:
            return _OPERATIONS[name](*arguments, **options)
        if isinstance(node.func, ast.Attribute) and not options:
            module = self._value(node.func.value, names)
            if isinstance(module, ArchivedModule):
                return self._call(module, node.func.attr, arguments)
        return _unknown(node)


def _held(module: Any, name: str) -> Any:
    if not isinstance(module, ArchivedModule) or name not in module.held:
        raise UnreadableTrace(f"no {name} in {getattr(module, 'name', type(module).__name__)}")
    return module.held[name]


def _bind(target: ast.expr, value: Any, names: dict[str, Any]) -> None:
    if isinstance(target, ast.Name):
        names[target.id] = value
    elif isinstance(target, ast.Tuple) and isinstance(value, list) and len(value) == len(target.elts):
        for part, one in zip(target.elts, value, strict=True):
            _bind(part, one, names)
    else:
        raise UnreadableTrace(f"an assignment to {type(target).__name__}")


def _unknown(node: ast.expr) -> Any:
    raise UnreadableTrace(ast.unparse(node)[:80])


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _convolution(maps: Any, weight: Any, bias: Any, *geometry: Any) -> torch.Tensor:
    result: torch.Tensor = torch.ops.aten.convolution.default(maps, weight, bias, *geometry[:6])
    return result


def _batch_norm(maps: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: Any, *rest: Any) -> torch.Tensor:
    if training:
        raise UnreadableTrace("batch normalisation in training")
    return functional.batch_norm(maps, mean, variance, weight, bias, False, rest[0], rest[1])


def _instance_norm(maps: Any, weight: Any, bias: Any, mean: Any, variance: Any, own: Any, *rest: Any) -> torch.Tensor:
    return functional.instance_norm(maps, mean, variance, weight, bias, own, rest[0], rest[1])


def _group_norm(maps: Any, groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, *_: Any) -> torch.Tensor:
    return functional.group_norm(maps, groups, weight, bias, eps)


def _upsampled(mode: str) -> Callable[..., torch.Tensor]:
    def upsample(maps: Any, size: Any, *rest: Any) -> torch.Tensor:
        align = {"align_corners": rest[0]} if mode == "trilinear" else {}
        factors = rest[-1] if isinstance(rest[-1], list) else None
        if (size is None) == (factors is None):
            raise UnreadableTrace("an upsampling without size or factors")
        return functional.interpolate(maps, size=size, scale_factor=factors, mode=mode, **align)

    return upsample


def _dropout(maps: Any, _: Any, training: Any) -> Any:
    if training:
        raise UnreadableTrace("dropout in training")
    return maps


_ONE_TO_ONE = ("relu", "sigmoid", "softmax", "silu", "gelu", "tanh")
_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "torch._convolution": _convolution,
    "torch.batch_norm": _batch_norm,
    "torch.instance_norm": _instance_norm,
    "torch.group_norm": _group_norm,
    "torch.upsample_trilinear3d": _upsampled("trilinear"),
    "torch.upsample_nearest3d": _upsampled("nearest"),
    "torch.add": torch.add,
    "torch.mul": torch.mul,
    "torch.cat": torch.cat,
    "torch.leaky_relu": functional.leaky_relu,
    "torch.prelu": torch.prelu,
    "torch.elu": functional.elu,
    "torch.max_pool3d": functional.max_pool3d,
    "torch.avg_pool3d": functional.avg_pool3d,
    "torch.size": lambda maps, axis: maps.shape[axis],
    "torch.detach": lambda maps: maps,
    "torch.contiguous": lambda maps, *_: maps,
    "ops.prim.NumToTensor": lambda number: number,
    "int": int,
    **{f"torch.{name}": getattr(torch, name, None) or getattr(functional, name) for name in _ONE_TO_ONE},
    **{f"torch.{name}": _dropout for name in ("dropout", "feature_dropout", "dropout_", "feature_dropout_")},
    # in place, so that other references to the maps change, too, as in the original network
    "torch.add_": lambda maps, *rest, **how: maps.add_(*rest, **how),
    "torch.mul_": lambda maps, other: maps.mul_(other),
    "torch.relu_": torch.relu_,
    "torch.leaky_relu_": lambda maps, slope=0.01: functional.leaky_relu_(maps, slope),
}
