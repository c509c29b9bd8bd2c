"""An example of a layout: everything side by side, for a viewer that reads one folder."""

from __future__ import annotations

from ensemble.outputs.artifacts import Artifact


class Flat:
    """`<role>` and `<role>-of-<member>`."""

    def place(self, artifact: Artifact) -> str:
        kind, _, ending = artifact.file_name(".nrrd").partition(".")
        return f"{kind}-of-{artifact.member}.{ending}" if artifact.member else f"{kind}.{ending}"
