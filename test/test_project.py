"""What surrounds the code: links in the documentation, the citation, hooks, the API reference."""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "training/*.md", "model_weights/*/*.md")
    for path in REPOSITORY.glob(pattern)
)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


def test_files_that_contributing_names_exist() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:ensemble|test|docs)/[\w/.]+)`", text))
    assert len(named) > 15
    assert not [name for name in named if not (REPOSITORY / name).exists()]
    for name, symbols in {
        "ensemble/families/registry.py": ("FAMILIES",),
        "ensemble/readers/names.py": ("IMAGE_SUFFIXES",),
        "ensemble/readers/stored.py": ("_READERS",),
        "ensemble/prepare/case.py": ("STEPS",),
        "ensemble/outputs/artifacts.py": ("ROLES", "MEMBER_ROLES"),
        "ensemble/config.py": ("ExtraOutputs", "RunConfig", "SessionKind"),
    }.items():
        for symbol in symbols:
            assert f"`{symbol}`" in text
            assert re.search(rf"^(class )?{symbol}\b", (REPOSITORY / name).read_text(), re.MULTILINE)


def test_the_citation_is_valid() -> None:
    """By the Citation File Format 1.2.0: required keys, no unknown ones, and values of the right form. cffconvert says the same of it."""
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    known = {"abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license"} | {
        "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact", "repository-code", "title",
    } | {"type", "url", "version"}  # fmt: skip
    assert set(citation) <= known
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["license"] == "Apache-2.0"
    assert datetime.date.fromisoformat(citation["date-released"])
    for work in (citation, *citation["references"]):
        assert work["title"]
        assert all(
            {"name"} == set(author) or {"family-names", "given-names"} == set(author) for author in work["authors"]
        )
    assert all(re.fullmatch(r"10\.\d{4,}/\S+", work["doi"]) for work in citation["references"])


def test_hooks_need_no_network() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    assert {repository["repo"] for repository in hooks["repos"]} == {"local"}
    entries = [hook["entry"] for repository in hooks["repos"] for hook in repository["hooks"]]
    assert [entry.split()[2] for entry in entries] == ["ruff", "ruff", "mypy"]
    assert all(hook["language"] == "system" for repository in hooks["repos"] for hook in repository["hooks"])


@pytest.mark.slow
def test_the_api_reference_is_made_by_one_command(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="pdoc is not installed (requirements-dev.txt)")
    (command,) = re.findall(
        r"^python (-m pdoc .*?)(?: *#.*)?$", (REPOSITORY / "docs" / "api.md").read_text(), re.MULTILINE
    )
    arguments = command.replace("out/api", str(tmp_path)).split()
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "ensemble" / "api.html").read_text()
    assert "load_ensemble" in page
    assert "else the shipped members" in page
