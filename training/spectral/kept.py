"""The embeddings that `training.spectral.patients` keeps, for the commands that make tables of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ensemble.errors import UsageError
from ensemble.spectral.embeddings import CaseEmbeddings
from training.spectral.patients import FOLDER


def add_kept(parser: argparse.ArgumentParser) -> None:
    """Options that say which."""
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where embeddings are kept (default: %(default)s)")
    parser.add_argument("--simulated", type=int, default=120, metavar="N", help="first patients of the validation set")


def folder_of(options: argparse.Namespace) -> Path:
    """Return the folder of the embeddings of one set of weights. Raises UsageError if there is none, or several."""
    folders = sorted(path for path in options.folder.glob("*") if any(path.glob("simulated_*.npz")))
    if len(folders) != 1:
        raise UsageError(
            "it is not clear which embeddings are meant" if folders else "there are no embeddings yet",
            where=options.folder,
            found=", ".join(path.name for path in folders),
            do="give one folder of them" if folders else "make them: python -m training.spectral.patients",
        )
    return folders[0]


def kept(options: argparse.Namespace) -> list[CaseEmbeddings]:
    """The patients that are there. Raises UsageError as `folder_of`."""
    folder = folder_of(options)
    paths = (folder / f"simulated_{number:03d}.npz" for number in range(options.simulated))
    return [CaseEmbeddings.read(path) for path in paths if path.exists()]
