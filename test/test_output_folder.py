"""What a call of the server finds, leaves and takes away in the output folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from conftest import tree
from ensemble.serve.output_folder import OutputFolder

MASK = Path("images", "stroke-lesion-segmentation", "a.mha")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_outputs_of_the_call_before_make_way(tmp_path: Path) -> None:
    write(tmp_path / "mine.txt", "of somebody else")
    folder = OutputFolder()
    folder.begin(tmp_path)
    write(tmp_path / MASK, "first")
    write(tmp_path / "results.json", "first")
    folder.keep()
    folder.begin(tmp_path)
    assert tree(tmp_path) == {"mine.txt": b"of somebody else"}


def test_outputs_that_someone_exchanged_stay(tmp_path: Path) -> None:
    folder = OutputFolder()
    folder.begin(tmp_path)
    write(tmp_path / MASK, "first")
    write(tmp_path / "results.json", "first")
    folder.keep()
    write(tmp_path / MASK, "corrected by hand")
    (tmp_path / MASK.parent / "notes.txt").write_text("why")
    folder.begin(tmp_path)
    assert tree(tmp_path) == {
        "images": b"<folder>",
        str(MASK.parent): b"<folder>",
        str(MASK): b"corrected by hand",
        str(MASK.parent / "notes.txt"): b"why",
    }


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "out" / "kept" / "mine.txt", "of somebody else")
    folder = OutputFolder()
    folder.begin(tmp_path / "out")
    write(tmp_path / "out" / "kept" / "log.txt", "of somebody else, meanwhile")
    before = tree(tmp_path / "out")
    write(tmp_path / "out" / ".staging-x" / MASK, "half")
    write(tmp_path / "out" / MASK, "half")
    folder.restore()
    assert tree(tmp_path / "out") == before


def test_what_others_write_during_a_call_is_not_ours(tmp_path: Path) -> None:
    folder = OutputFolder()
    folder.begin(tmp_path)
    write(tmp_path / MASK, "first")
    write(tmp_path / "others.log", "of somebody else")
    folder.keep()
    folder.begin(tmp_path)
    assert tree(tmp_path) == {"others.log": b"of somebody else"}


def test_outputs_that_replaced_those_of_an_earlier_server_are_ours(tmp_path: Path) -> None:
    write(tmp_path / "results.json", "of an earlier server")
    folder = OutputFolder()
    folder.begin(tmp_path)
    write(tmp_path / "new", "first")
    (tmp_path / "new").replace(tmp_path / "results.json")
    folder.keep()
    folder.begin(tmp_path)
    assert tree(tmp_path) == {}


def test_a_folder_that_was_not_there_goes_again(tmp_path: Path) -> None:
    folder = OutputFolder()
    folder.begin(tmp_path / "out")
    write(tmp_path / "out" / MASK, "half")
    folder.restore()
    assert tree(tmp_path) == {}
    folder.restore()


def test_outputs_that_were_fetched_are_not_missed(tmp_path: Path) -> None:
    folder = OutputFolder()
    folder.begin(tmp_path)
    write(tmp_path / MASK, "first")
    folder.keep()
    shutil.rmtree(tmp_path / "images")
    folder.begin(tmp_path)
    assert tree(tmp_path) == {}
