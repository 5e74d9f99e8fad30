"""The project's documents, and what they are made of: links, commands, code, tables."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^<!-- test: ([\w-]+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
INLINE_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Document:
    """One Markdown file of the project."""

    path: Path

    @property
    def name(self) -> str:
        """Its path from the root of the project."""
        return str(self.path.relative_to(REPOSITORY))

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[str]:
        """The fenced blocks of a language."""
        return [code for name, code in FENCE.findall(self.text) if name == language]

    def worked_examples(self) -> dict[str, str]:
        """The Python blocks that are marked as tested, by name."""
        return dict(EXAMPLE.findall(self.text))

    @property
    def prose(self) -> str:
        """The text without fenced blocks and without lines of code."""
        without_fences = FENCE.sub("", self.text)
        lines = without_fences.splitlines()
        return "\n".join(line for line in lines if not line.startswith("    "))

    def links(self) -> list[str]:
        """The targets of links and images that are not addresses on the web."""
        return [link for link in LINK.findall(self.prose) if "://" not in link]

    def anchors(self) -> set[str]:
        """The names under which its headings can be linked, as GitHub makes them."""
        headings = HEADING.findall(FENCE.sub("", self.text))
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def inline_code(self) -> list[str]:
        """What stands between backticks in the prose."""
        return INLINE_CODE.findall(self.prose)

    def commands(self) -> list[list[str]]:
        """The arguments of every ``python -m probekit`` that it names, whoever starts it."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        lines = [line.strip() for line in joined.splitlines() if line.startswith("    ")]
        for block in FENCE.findall(joined):
            lines += block[1].splitlines()
        lines += INLINE_CODE.findall(joined)
        return [arguments for line in lines for arguments in _arguments(line)]


def _arguments(line: str) -> list[list[str]]:
    """The arguments of the command in a line; one within quotation marks counts too."""
    if "-m probekit" not in line:
        return []
    words = shlex.split(line, comments=True)
    if "probekit" in words:
        return [words[words.index("probekit") + 1 :]]
    return [arguments for word in words for arguments in _arguments(word)]


def all_documents() -> list[Document]:
    """The documents that people read."""
    names = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"]
    pages = sorted((REPOSITORY / "docs").glob("*.md"))
    return [Document(path) for path in [*(REPOSITORY / name for name in names), *pages]]
