"""Reads the project's Markdown pages: links, headings, and the fenced blocks that tests execute."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "clients/**/*.md", "deploy/*.md", "examples/*.md")
    for path in ROOT.glob(pattern)
)

_BLOCK = re.compile(
    r"(?:^<!-- (?P<marker>[a-z: ]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block and the comment on the line before it (`run`, `run: background`, `answer`), if any."""

    marker: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Every fenced block, in order."""
    return [
        Block(match["marker"] or "", match["language"], match["text"]) for match in _BLOCK.finditer(page.read_text())
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _BLOCK.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """The target of every link."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """The fragments that headings make, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[str]:
    """The commands of a shell block, continuation lines joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
