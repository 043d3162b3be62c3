"""The README pages: their length, their file lists and their links."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        ROOT / "README.md",
        *ROOT.glob("*/README.md"),
        *ROOT.glob("mmrl/**/README.md"),
        ROOT / "tests/benchmarks/README.md",
    ]
)
LISTED = [page for page in PAGES if page.parent.is_relative_to(ROOT / "mmrl") or page.parent.name == "benchmarks"]


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", LISTED, ids=lambda page: page.parent.name)
def test_a_folder_page_lists_exactly_the_folders_files(page: Path) -> None:
    text = page.read_text()
    present = {
        path.relative_to(page.parent).as_posix()
        for path in page.parent.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py") and not path.name.startswith("test_")
    }
    first_cells = "".join(re.findall(r"^\| ((?:`[\w/]+\.py`(?:, )?)+) \|", text, re.M))
    listed = set(re.findall(r"^    ([\w/]+\.py) ", text, re.M)) | set(re.findall(r"`([\w/]+\.py)`", first_cells))
    assert present - listed == set(), "not listed"
    assert listed - present == set(), "gone"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]*)(?:#[\w-]*)?\)", page.read_text()):
        if target and "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_folder_map_names_every_folder() -> None:
    text = (ROOT / "README.md").read_text()
    folders = [path.parent.name for path in (ROOT / "mmrl").glob("*/__init__.py")]
    assert [name for name in folders if f"    mmrl/{name}/ " not in text] == []
