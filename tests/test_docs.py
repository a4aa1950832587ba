"""Every relative link and picture of the documents leads to something that is in the repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
    + [*(ROOT / "docs").glob("*.md")]
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """The targets of links that lead to files; code is not looked at."""
    targets = LINK.findall(CODE.sub("", text))
    return [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    lines = re.findall(r"^#+ (.+)$", CODE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    targets = links(document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_anchors_are_headings(document):
    text = document.read_text(encoding="utf-8")
    for target in LINK.findall(CODE.sub("", text)):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if anchor and file.suffix == ".md" and file.is_file():
            assert anchor in headings(file.read_text(encoding="utf-8")), target


def test_links_are_found_and_code_is_not():
    text = "[a](b.md#c) ![d](e/f.png) [g](https://h) [i](#j)\n```\n[k](l)\n```\n"
    assert links(text) == ["b.md", "e/f.png"]


def test_the_commands_of_the_readme_name_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"\b(?:configs|tools|examples)/[\w./]+\.(?:yaml|py)", text)
    assert files and [name for name in files if not (ROOT / name).is_file()] == []
