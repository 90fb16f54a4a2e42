"""README.md and docs/: links that lead somewhere, a README that stays short, options that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bsfa_cli.presentation import readme

ROOT = Path(__file__).parents[1]
PAGES = [page for folder in (".", "docs", "profiles", "kernels") for page in sorted((ROOT / folder).glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """What its headings can be linked by, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


def test_every_page_of_docs_is_reached_from_the_readme():
    linked = {link.partition("#")[0] for link in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} <= linked


def test_the_readme_is_read_in_five_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180 and len(text.split()) <= 1400
    table = text.partition(readme.BEGIN)[2].partition(readme.END)[0]
    assert table.count("![") == 1 and 3 <= sum(line.startswith("|") for line in table.splitlines()) <= 10


def test_options_in_the_pages_exist(run):
    known = set()
    for command in ("calibrate", "export", "verify", "profile", "compare", "capture", "report", "inspect", "env"):
        known |= set(re.findall(r"--[a-z0-9][a-z0-9-]*", run(command, "--help").out))
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for line in page.read_text(encoding="utf-8").splitlines():
            for command in re.findall(
                r"bsfa (?:calibrate|export|verify|profile|compare|capture|report|inspect) [^`#|]*", line
            ):
                missing = set(re.findall(r"--[a-z0-9][a-z0-9-]*", command)) - known
                assert not missing, f"{page.name}: {command}"
