"""Memory that ran out is called so, and rights are blamed only for want of rights, wherever outputs, weights and batches meet them."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import StubMember, phantom_case
from ensemble.child_process import run_child
from ensemble.errors import MembersFailed, OutOfMemory, UsageError, WeightsBroken
from ensemble.families import registry
from ensemble.families.base import InferenceSettings
from ensemble.families.spec import MemberSpec
from ensemble.folders import unwritable_error
from ensemble.logging_setup import log_failure, report_failure
from ensemble.members.manifest import open_member
from ensemble.memory import MORE_MEMORY, is_out_of_memory
from ensemble.pipeline import Ensemble, segment_raw
from ensemble.progress import SilentWatcher
from ensemble.weights.checkpoints import load_weights
from ensemble.weights.folder import convert_folder_errors
from ensemble.weights.pickles import read_pickle

NO_MEMORY = (
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
)


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_weights_that_do_not_fit_are_not_damaged(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise error

    spec = MemberSpec("large", "nnunet", tmp_path)
    monkeypatch.setattr(registry.family_of(spec).__class__, "load", no_room)
    with pytest.raises(WeightsBroken, match="not enough memory to load member large") as refusal:
        open_member(spec, InferenceSettings())
    assert "memory" in refusal.value.do


def test_weights_that_find_no_room_are_no_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Linear(2, 2)

    def no_room(*_: object, **__: object) -> None:
        raise NO_MEMORY[2]

    monkeypatch.setattr(network, "load_state_dict", no_room)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        load_weights(network, network.state_dict(), Path("x"))


def test_a_pickle_that_does_not_fit_says_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plans.pkl").write_bytes(pickle.dumps({}))
    monkeypatch.setattr("ensemble.weights.pickles._plain", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(WeightsBroken, match="not enough memory"):
        read_pickle(tmp_path / "plans.pkl")


def test_onnx_runtime_says_it_by_classes_of_its_own() -> None:
    errors = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    assert is_out_of_memory(
        errors.RuntimeException("Failed to allocate memory for requested buffer of size 1073741824")
    )
    assert is_out_of_memory(errors.Fail("bad allocation"))
    assert not is_out_of_memory(errors.Fail("Load model failed: Protobuf parsing failed."))


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_running_out_of_memory_is_logged_as_such(
    error: Exception, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "ensemble"):
        log_failure(error)
        report_failure(error)
    assert "bug" not in caplog.text + capsys.readouterr().err
    assert "not enough memory" in caplog.text


def test_a_member_without_room_says_memory_and_what_to_do(
    stub_ensemble: Callable[..., Ensemble], caplog: pytest.LogCaptureFixture
) -> None:
    ensemble = stub_ensemble(StubMember("large", error=NO_MEMORY[2]))
    with pytest.raises(MembersFailed) as failure, caplog.at_level(logging.INFO, "ensemble"):
        segment_raw(phantom_case(), ensemble, SilentWatcher())
    assert "not enough memory" in failure.value.found
    assert MORE_MEMORY in failure.value.do
    assert "Traceback" not in caplog.text


def _starve() -> None:
    raise MemoryError


def test_a_process_without_room_ends_as_if_killed_for_memory(capfd: pytest.CaptureFixture[str]) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=run_child, args=(_starve, logging.INFO))
    process.start()
    process.join()
    assert process.exitcode == OutOfMemory.exit_code


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.ENOSPC, "space"),
        (errno.EDQUOT, "space"),
        (errno.EROFS, "writable"),
        (errno.ENOTDIR, "the file in its place"),
        (errno.EISDIR, "the file in its place"),
        (errno.ENAMETOOLONG, "shorter"),
        (errno.EMFILE, "open files"),
        (errno.ENOMEM, "memory"),
        (errno.EIO, "disk"),
        (errno.ESTALE, "disk"),
        (errno.EBUSY, "another"),
    ],
)
def test_outputs_blame_rights_only_for_rights(number: int, word: str) -> None:
    refused = unwritable_error(Path("/out"), OSError(number, os.strerror(number), "/out/mask"))
    assert isinstance(refused, UsageError)
    assert word in refused.do
    assert not {"permission", "right", "user"} & set(str(refused).lower().replace("(", " ").split())
    for lacking in (errno.EACCES, errno.EPERM):
        said = str(unwritable_error(Path("/out"), OSError(lacking, os.strerror(lacking), "/out/mask")))
        assert "permission" in said
        assert f"user {os.getuid()}" in said


@pytest.mark.parametrize(
    ("number", "word"), [(errno.ENOMEM, "memory"), (errno.EIO, "disk"), (errno.EMFILE, "open files")]
)
def test_weights_blame_rights_only_for_rights(number: int, word: str) -> None:
    with pytest.raises(WeightsBroken) as refusal, convert_folder_errors(Path("/weights")):
        raise OSError(number, os.strerror(number), "/weights/x")
    assert word in refusal.value.do
    assert "chmod" not in str(refusal.value)
