"""Pickles are read as plain values, and hostile ones are refused by name."""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import shared
from ensemble.errors import WeightsBroken
from ensemble.families.nnunet_v1.plans import parse_plans
from ensemble.weights.pickles import MAX_BYTES, read_pickle
from nnunet_v1_folders import V1Spec, v1_description, write_numpy1_pickle, write_pickle

CONTENT = OrderedDict(
    spacing=np.array([1.0, 2.5, 3.0]),
    big_endian=np.arange(3, dtype=">i4"),
    fortran=np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    scalars=[np.float64(0.5), np.int64(7), np.bool_(True), np.float32(0.25)],
    plain={"a": (1, None, "b", b"c", 2.5)},
)
PLAIN = {
    "spacing": [1.0, 2.5, 3.0],
    "big_endian": [0, 1, 2],
    "fortran": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],
    "scalars": [0.5, 7, True, 0.25],
    "plain": {"a": (1, None, "b", b"c", 2.5)},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_becomes_plain_values(tmp_path: Path, protocol: int) -> None:
    read = read_pickle(write_pickle(CONTENT, tmp_path / "a.pkl", protocol))
    assert read == PLAIN
    assert all(type(value) in {float, int, bool} for value in read["scalars"])


def test_the_names_of_numpy_1_are_read_too(tmp_path: Path) -> None:
    path = write_numpy1_pickle(CONTENT, tmp_path / "a.pkl")
    assert b"numpy.core" in path.read_bytes()
    assert b"numpy._core" not in path.read_bytes()
    assert read_pickle(path) == PLAIN


@pytest.mark.parametrize("name", ["plans.pkl", "fold_4/model_final_checkpoint.model.pkl"])
def test_files_written_under_numpy_1(name: str) -> None:
    path = shared(f"golden/seals_v1/compat_numpy1/{name}")
    with path.open("rb") as file:
        names = {argument for _, argument, _ in pickletools.genops(file) if isinstance(argument, str)}
    assert any("numpy.core" in argument for argument in names)
    content = read_pickle(path)
    assert content.get("plans", content)["num_modalities"] == 2
    if "plans" in content:
        assert parse_plans(content).patch == (64, 64, 48)


def test_both_generations_describe_the_same_model(tmp_path: Path) -> None:
    new = read_pickle(write_pickle(v1_description(V1Spec()), tmp_path / "new.pkl"))
    old = read_pickle(write_numpy1_pickle(v1_description(V1Spec()), tmp_path / "old.pkl"))
    assert parse_plans(new) == parse_plans(old)


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def marker() -> None:
    """Something of ours that a pickle may name."""


def hostile() -> dict[str, tuple[bytes, str]]:
    """name -> bytes, what the refusal must mention."""
    return {
        "shell": (pickle.dumps(Calls(__import__("os").system, "false"), 2), "posix.system|nt.system"),
        "eval": (pickle.dumps({"plans": Calls(eval, "1")}, 4), "builtins.eval"),
        "numpy load": (b"cnumpy\nload\n(S'x'\ntR.", "numpy.load"),
        "our code": (pickle.dumps(marker, 4), "test_pickles.marker"),
        "attribute walk": (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
        "extension registry": (b"\x82\x01.", "extension"),
        "persistent id": (b"Px\n.", "persistent"),
        "objects in an array": (pickle.dumps(np.array([{}], dtype=object), 2), "holds no numbers"),
        "a class itself": (b"ccollections\nOrderedDict\n.", "no plain value"),
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_pickles_are_refused(tmp_path: Path, name: str) -> None:
    content, finding = hostile()[name]
    path = tmp_path / "plans.pkl"
    path.write_bytes(content)
    with pytest.raises(WeightsBroken) as error:
        read_pickle(path)
    assert error.value.where == str(path)
    assert any(word in error.value.found for word in finding.split("|")), error.value.found


def test_a_refused_call_does_not_happen(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    path = tmp_path / "plans.pkl"
    path.write_bytes(pickle.dumps(Calls(__import__("os").mkdir, str(victim)), 2))
    with pytest.raises(WeightsBroken, match="more than plain values"):
        read_pickle(path)
    assert not victim.exists()
    pickle.loads(path.read_bytes())  # an ordinary reader would have done it
    assert victim.exists()


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    whole = pickle.dumps(CONTENT, 4)
    for content in (b"", whole[: len(whole) // 2], b"hello", b"\x80\xff."):
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(WeightsBroken, match="is damaged"):
            read_pickle(tmp_path / "a.pkl")
    with pytest.raises(WeightsBroken, match="does not exist"):
        read_pickle(tmp_path / "none.pkl")


def test_oversized_and_self_containing_pickles_end(tmp_path: Path) -> None:
    with (tmp_path / "large.pkl").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    circle: list[Any] = []
    circle.append(circle)
    write_pickle(circle, tmp_path / "circle.pkl")
    for name in ("large", "circle"):
        with pytest.raises(WeightsBroken):
            read_pickle(tmp_path / f"{name}.pkl")


def test_what_is_shared_stays_shared(tmp_path: Path) -> None:
    """A small pickle of lists of lists of the same list must not become 2**60 lists."""
    nested: list[Any] = ["bottom"]
    for _ in range(60):
        nested = [nested, nested]
    read = read_pickle(write_pickle(nested, tmp_path / "a.pkl"))
    assert read[0] is read[1]
