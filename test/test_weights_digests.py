"""Digests of large weights are known again while the files are as they were, and never else."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest

from ensemble.files import file_sha256
from ensemble.weights import digests

OLD = (1_600_000_000_000_000_000,) * 2


class Hashing:
    """Counts what is hashed."""

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def __call__(self, path: Path) -> str:
        self.paths.append(path)
        return file_sha256(path)


@pytest.fixture
def hashing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hashing:
    """Every file counts as large, and as long unchanged; the cache is an empty folder."""
    counting = Hashing()
    monkeypatch.setattr(digests, "file_sha256", counting)
    monkeypatch.setattr(digests, "KEPT_FROM_BYTES", 0)
    monkeypatch.setattr(digests, "_SETTLED_S", -1e9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return counting


def weights(folder: Path, content: bytes = b"weights") -> Path:
    path = folder / "member" / "checkpoint.pth"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=OLD)
    return path


def asked(path: Path) -> str:
    """As a program that has just been started asks."""
    digests._sha256.cache_clear()
    return digests.weights_sha256(path)


def test_a_file_that_is_as_it_was_is_hashed_once(hashing: Hashing, tmp_path: Path) -> None:
    path = weights(tmp_path)
    assert asked(path) == asked(path) == sha256(b"weights").hexdigest()
    assert len(hashing.paths) == 1
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    (entry,) = (tmp_path / "cache" / "isles-ensemble" / "digests").iterdir()
    assert entry.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("how", ["written into", "exchanged", "a link turned", "folder exchanged"])
def test_a_replaced_file_is_hashed_again(how: str, hashing: Hashing, tmp_path: Path) -> None:
    """Of the same size, and with its time set back."""
    path = weights(tmp_path)
    if how == "a link turned":
        target, path = path, tmp_path / "link"
        path.symlink_to(target)
    asked(path)
    if how == "written into":
        path.write_bytes(b"WEIGHTS")
        os.utime(path, ns=OLD)
    elif how == "exchanged":
        other = path.with_name("other")
        other.write_bytes(b"WEIGHTS")
        os.utime(other, ns=OLD)
        other.replace(path)
    elif how == "folder exchanged":
        path.parent.rename(tmp_path / "before")
        weights(tmp_path, b"WEIGHTS")
    else:
        (tmp_path / "elsewhere").mkdir()
        path.unlink()
        path.symlink_to(weights(tmp_path / "elsewhere", b"WEIGHTS"))
    assert asked(path) == sha256(b"WEIGHTS").hexdigest()


def test_nothing_is_kept_where_whole_seconds_are_noted(
    hashing: Hashing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of two Apptainer images: same path, device, inode and size, and both of the date that our layers have."""
    path = weights(tmp_path)
    epoch = 315532800 * 10**9
    monkeypatch.setattr(digests, "_stamp", lambda path: (7, 12, 7, epoch, epoch))
    assert asked(path) == sha256(b"weights").hexdigest()
    path.write_bytes(b"WEIGHTS")
    assert asked(path) == sha256(b"WEIGHTS").hexdigest()


def test_a_file_changed_just_now_is_not_kept(hashing: Hashing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes it again might leave it the same time stamp."""
    monkeypatch.setattr(digests, "_SETTLED_S", 60.0)
    path = weights(tmp_path)
    asked(path)
    asked(path)
    assert len(hashing.paths) == 2


def test_a_file_changed_while_it_is_hashed_is_not_kept(
    hashing: Hashing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weights(tmp_path)

    def slow(path: Path) -> str:
        digest = file_sha256(path)
        path.write_bytes(b"longer weights")
        return digest

    monkeypatch.setattr(digests, "file_sha256", slow)
    asked(path)
    assert not list((tmp_path / "cache" / "isles-ensemble" / "digests").iterdir())


@pytest.mark.parametrize("home", ["none", "relative", "a file", "missing and not to be made"])
def test_without_a_cache_folder_it_is_hashed_each_time(
    home: str, hashing: Hashing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    if home == "relative":
        monkeypatch.setenv("XDG_CACHE_HOME", "here")
        monkeypatch.setenv("HOME", "there")
    elif home == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif home == "missing and not to be made":
        monkeypatch.setenv("HOME", "/proc/nobody")
    path = weights(tmp_path)
    assert asked(path) == asked(path) == sha256(b"weights").hexdigest()
    assert len(hashing.paths) == 2
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "member"]


@pytest.mark.parametrize("what", ["folder", "entry"])
def test_what_others_may_write_is_not_believed(what: str, hashing: Hashing, tmp_path: Path) -> None:
    path, folder = weights(tmp_path), tmp_path / "cache" / "isles-ensemble" / "digests"
    asked(path)
    (entry,) = folder.iterdir()
    (folder if what == "folder" else entry).chmod(0o777)
    asked(path)
    assert len(hashing.paths) == 2


@pytest.mark.parametrize("damage", ["", "[1]", '{"stamp": 3}', "\x00", "of another file", "no digest"])
def test_a_damaged_entry_is_not_believed(damage: str, hashing: Hashing, tmp_path: Path) -> None:
    path = weights(tmp_path)
    digest = asked(path)
    (entry,) = (tmp_path / "cache" / "isles-ensemble" / "digests").iterdir()
    kept = entry.read_text()
    if damage == "of another file":
        damage = kept.replace('"stamp": [', '"stamp": [1')
    elif damage == "no digest":
        damage = kept.replace(digest, "x" * 64)
    entry.write_text(damage)
    assert asked(path) == digest
    assert len(hashing.paths) == 2
    assert asked(path) == digest  # it is mended
    assert len(hashing.paths) == 2


def test_what_is_asked_for_anew_is_read_anew(hashing: Hashing, tmp_path: Path) -> None:
    path = weights(tmp_path)
    asked(path)
    assert digests.weights_sha256(path, anew=True) == sha256(b"weights").hexdigest()
    assert len(hashing.paths) == 2


def test_small_files_leave_nothing(hashing: Hashing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "KEPT_FROM_BYTES", 1 << 20)
    asked(weights(tmp_path))
    assert not (tmp_path / "cache").exists()
