"""What a call of the server finds, leaves and takes away in the output folder."""

from __future__ import annotations

from pathlib import Path

from conftest import tree
from ensemble.contract.output_folder import OutputFolder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_outputs_of_the_call_before_make_way(tmp_path: Path) -> None:
    write(tmp_path / "mine.txt", "of somebody else")
    folder = OutputFolder()
    folder.begin(tmp_path)
    write(tmp_path / "images" / "a.mha", "first")
    write(tmp_path / "results.json", "first")
    folder.keep()
    folder.begin(tmp_path)
    assert tree(tmp_path) == {"mine.txt": b"of somebody else"}


def test_outputs_that_someone_exchanged_stay(tmp_path: Path) -> None:
    folder = OutputFolder()
    folder.begin(tmp_path)
    write(tmp_path / "images" / "a.mha", "first")
    write(tmp_path / "results.json", "first")
    folder.keep()
    write(tmp_path / "images" / "a.mha", "corrected by hand")
    (tmp_path / "images" / "notes.txt").write_text("why")
    folder.begin(tmp_path)
    assert tree(tmp_path) == {
        "images": b"<folder>",
        "images/a.mha": b"corrected by hand",
        "images/notes.txt": b"why",
    }


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "out" / "kept" / "mine.txt", "of somebody else")
    folder = OutputFolder()
    folder.begin(tmp_path / "out")
    before = tree(tmp_path / "out")
    write(tmp_path / "out" / ".staging-x" / "images" / "a.mha", "half")
    write(tmp_path / "out" / "kept" / "a.mha", "half")
    folder.restore()
    assert tree(tmp_path / "out") == before


def test_a_folder_that_was_not_there_goes_again(tmp_path: Path) -> None:
    folder = OutputFolder()
    folder.begin(tmp_path / "out")
    write(tmp_path / "out" / "images" / "a.mha", "half")
    folder.restore()
    assert tree(tmp_path) == {}
    folder.restore()


def test_outputs_that_were_fetched_are_not_missed(tmp_path: Path) -> None:
    folder = OutputFolder()
    folder.begin(tmp_path)
    write(tmp_path / "images" / "a.mha", "first")
    folder.keep()
    (tmp_path / "images" / "a.mha").unlink()
    (tmp_path / "images").rmdir()
    folder.begin(tmp_path)
    assert tree(tmp_path) == {}
