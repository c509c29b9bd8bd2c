"""Say what pyproject.toml can't: the wheel carries model_weights/ as ensemble/model_weights/. Builds leave nothing in this folder."""

import tempfile

from setuptools import find_packages, setup

folder = tempfile.TemporaryDirectory(prefix="isles-ensemble-build-")  # removed when the build ends
setup(
    packages=[*find_packages(include=["ensemble", "ensemble.*"]), "ensemble.model_weights"],
    package_dir={"ensemble.model_weights": "model_weights"},
    package_data={
        "ensemble": ["py.typed", "*.pyi"],
        "ensemble.findings": ["data/*"],
        "ensemble.outputs.report": ["templates/*"],
        "ensemble.model_weights": ["**/*"],
    },
    options={"build": {"build_base": folder.name}, "egg_info": {"egg_base": folder.name}},
)
