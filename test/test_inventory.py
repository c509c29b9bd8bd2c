"""image/inventory.py on the environment of the tests; test/container runs it in the image."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from conftest import REPOSITORY

DIGEST = "sha256:" + "0123456789abcdef" * 4


def inventory(*arguments: str) -> str:
    command = [sys.executable, REPOSITORY / "image" / "inventory.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def bill() -> str:
    return inventory("sbom", "isles-ensemble", "0.2.0", DIGEST)


def test_the_bill_of_materials_is_cyclonedx(bill: str) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill.replace('"library"', '"book"')) is not None


def test_the_same_image_has_the_same_bill(bill: str) -> None:
    assert inventory("sbom", "isles-ensemble", "0.2.0", DIGEST) == bill


def test_each_package_stands_there_once_with_its_licence(bill: str) -> None:
    parts = json.loads(bill)["components"]
    references = [part["bom-ref"] for part in parts]
    assert len(references) == len(set(references))
    locked = re.findall(r"^([\w.-]+)==", (REPOSITORY / "locks" / "run.txt").read_text(), re.MULTILINE)
    licences = {part["name"]: part["licenses"][0] for part in parts}
    ours = {name: licences[name] for name in locked if name in licences}
    assert len(ours) > 90
    unstated = [name for name, licence in ours.items() if "not stated" in str(licence)]
    notice = inventory("notice")
    assert not [name for name in unstated if f"\n{name} " not in notice.split("-" * 100, 1)[1]]
