"""What an image holds, read from within: Python packages, the system's packages (dpkg) and the networks' weights.

    docker run --rm -i --entrypoint python IMAGE - sbom NAME VERSION DIGEST < image/inventory.py    CycloneDX 1.6, as JSON
    docker run --rm -i --entrypoint python IMAGE - notice < image/inventory.py                      all licences, as text

Nothing but the standard library is needed. Both outputs are functions of the image alone: no dates, no random numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

APPLICATION = Path("/opt/app")
DPKG = Path("/var/lib/dpkg/status")
COPYRIGHT = "/usr/share/doc/{}/copyright"
#: Names of files with licences or what licences ask to be passed on.
LICENCE_FILE = re.compile(r"LICEN[CS]E|COPYING|NOTICE|COPYRIGHT|AUTHORS|THIRD.?PARTY", re.IGNORECASE)


@dataclass(frozen=True)
class Package:
    """One package: `purl` as the package-url specification says, `licence` as the package says, `texts` in full."""

    name: str
    version: str
    purl: str
    licence: str
    #: Whether `licence` is an SPDX expression.
    spdx: bool
    texts: tuple[str, ...]


def python_packages() -> list[Package]:
    """The packages that Python finds, each once: the first on the path is the one that is imported."""
    found: dict[str, Package] = {}
    for one in distributions():
        if not one.metadata["Name"]:
            continue  # emptied by installers.py
        name = re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower()
        if name not in found:
            licence, spdx = _licence(one)
            purl = f"pkg:pypi/{name}@{quote(one.version)}"
            found[name] = Package(name, one.version, purl, licence, spdx, tuple(_texts(one)))
    return [found[name] for name in sorted(found)]


def _licence(one: Distribution) -> tuple[str, bool]:
    """What the metadata say: the SPDX expression, else the classifiers, else the first line of the free text."""
    if expression := one.metadata.get("License-Expression"):
        return expression, True
    classifiers = [line for line in one.metadata.get_all("Classifier", []) if line.startswith("License :: ")]
    names = [line.split(" :: ")[-1] for line in classifiers if line != "License :: OSI Approved"]
    free = (one.metadata.get("License") or "").strip().splitlines()
    return "; ".join(names) or (free[0].strip() if free else "") or "not stated: see its text", False


def _texts(one: Distribution) -> Iterator[str]:
    """The licence files beside the metadata or at the top of the package, wherever the builder put them."""
    for path in sorted(one.files or [], key=str):
        inside = any(part.endswith((".dist-info", ".egg-info")) for part in path.parts[:-1])
        at_top = len(path.parts) == 2 and path.suffix in ("", ".txt", ".md", ".rst")
        if (inside or at_top) and LICENCE_FILE.search(path.name):
            file = Path(str(one.locate_file(path)))
            if file.is_file():
                yield file.read_text(encoding="utf-8", errors="replace").strip()


def system_packages() -> list[Package]:
    """The installed packages of dpkg's own record; none on a system without it."""
    if not DPKG.exists():
        return []
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', Path("/etc/os-release").read_text(), re.MULTILINE))
    found = []
    for paragraph in DPKG.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*)$", paragraph, re.MULTILINE))
        if not fields.get("Status", "").endswith(" installed"):
            continue
        name, version = fields["Package"], fields["Version"]
        where = f"arch={fields['Architecture']}&distro={release['ID']}-{release.get('VERSION_ID', '')}"
        purl = f"pkg:deb/{release['ID']}/{quote(name)}@{quote(version, safe='')}?{where}"
        file = Path(COPYRIGHT.format(name))
        text = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""
        names = sorted({line.strip() for line in re.findall(r"^License: *(\S.*)$", text, re.MULTILINE)})
        licence = "; ".join(names) or ("see its text" if text else "not stated")
        found.append(Package(name, version, purl, licence, False, (text,) if text else ()))
    return sorted(found, key=lambda package: package.name)


def weights() -> list[dict[str, Any]]:
    """The shipped members as components, with the SHA-256 of their checkpoints as they lie in the image."""
    folder = APPLICATION / "model_weights"
    members = json.loads((folder / "manifest.json").read_text())["members"] if folder.is_dir() else []
    return [
        {
            "type": "machine-learning-model",
            "bom-ref": f"weights/{member['folder']}/{name}",
            "name": f"{member['name']} {name}",
            "hashes": [{"alg": "SHA-256", "content": _sha256(folder / member["folder"] / name)}],
            "licenses": [{"expression": member["licence"]}],
        }
        for member in members
        for name in sorted(member["sha256"])
        if not name.endswith(".json")
    ]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def component(package: Package) -> dict[str, Any]:
    licence = {"expression": package.licence} if package.spdx else {"license": {"name": package.licence}}
    return {
        "type": "library",
        "bom-ref": package.purl,
        "name": package.name,
        "version": package.version,
        "purl": package.purl,
        "licenses": [licence],
    }


def sbom(name: str, version: str, digest: str) -> dict[str, Any]:
    """The bill of materials of the image `name:version` whose ID is `digest` ("sha256:..."), by CycloneDX 1.6."""
    parts = [*map(component, [*python_packages(), *system_packages()]), *weights()]
    image = {
        "type": "container",
        "bom-ref": "image",
        "name": name,
        "version": version,
        "hashes": [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}],
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",
        "version": 1,
        "metadata": {"component": image},
        "components": parts,
        "dependencies": [{"ref": "image", "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def notice() -> str:
    """The licences of all packages: first a list, then each text once, with the packages that it belongs to."""
    packages = [*python_packages(), *system_packages()]
    owners: dict[str, list[str]] = {}
    for path in sorted(APPLICATION.rglob("NOTICE.md")):
        owners[path.read_text(encoding="utf-8").strip()] = [str(path.relative_to(APPLICATION))]
    for package in packages:
        for text in package.texts:
            owners.setdefault(text, []).append(f"{package.name} {package.version}")
    lines = [
        "This image holds ISLES ensemble (Apache License 2.0; see LICENSE) and the packages below, each under its own licence.",
        "Made by image/inventory.py from what the image holds.",
        "",
        *(f"{package.name} {package.version}: {package.licence}" for package in packages),
    ]
    for text, names in owners.items():
        lines += ["", "-" * 100, "", *dict.fromkeys(names), "", text]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["notice"]:
        print(notice())
    else:
        print(json.dumps(sbom(*sys.argv[2:5]), indent=1))
