"""The fold folders of an nnU-Net model (v1 or v2)."""

from __future__ import annotations

from pathlib import Path

#: What the two versions call the folder of the fold that is trained on all cases.
ALL_FOLDS_V1, ALL_FOLDS_V2 = "all", "fold_all"


def nnunet_fold_folders(folder: Path, whole: str) -> dict[str, Path]:
    """Return the numbered folds (`fold_0`, ...) in order; if there are none, the folder `whole` of the model trained on all cases."""
    numbered = {
        path.name[5:]: path
        for path in folder.glob("fold_*")
        if path.is_dir() and path.name[5:].isascii() and path.name[5:].isdecimal()
    }
    if numbered:
        return {name: numbered[name] for name in sorted(numbered, key=int)}
    return {"all": folder / whole} if (folder / whole).is_dir() else {}
