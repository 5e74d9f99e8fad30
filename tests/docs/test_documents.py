"""What the documents name is there: files, headings, commands, parameters, modules."""

from __future__ import annotations

import ast
import importlib
import re

import pytest
import yaml

import probekit
from probekit.cli import notebooks
from probekit.cli.main import make_parser
from tests.conftest import REPOSITORY
from tests.docs.documents import Document, all_documents

README = Document(REPOSITORY / "README.md")
DOCUMENTS = all_documents()
BARE_NAMES = (["run"], ["extract"], ["plan"])  # a command that is spoken of, not shown
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)


# -------------------------------------------------------------------------------------------- links


@each_document
def test_links_and_images_lead_somewhere(document):
    for link in document.links():
        file, _, anchor = link.partition("#")
        target = (document.path.parent / file).resolve() if file else document.path
        assert target.exists(), link
        if anchor:
            assert anchor in Document(target).anchors(), link


def test_the_readme_links_every_page_once():
    links = README.links()
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert links.count(f"docs/{page.name}") == 1, page.name


# ----------------------------------------------------------------------------------------- commands


@each_document
def test_commands_parse_and_name_declared_parameters(document):
    declared = notebooks.all_declared_parameters()
    for arguments in document.commands():
        if arguments in BARE_NAMES:
            continue
        options = make_parser().parse_args(arguments)
        if not hasattr(options, "params"):
            continue
        overrides = [f"{name}: {value}" for name, value in _overrides(options.overrides)]
        parameters = _parameters(document, str(options.params))
        parameters |= yaml.safe_load("\n".join(overrides)) or {}
        notebooks.check_parameters(parameters, declared)


def test_the_documents_name_commands():
    counts = {document.name: len(document.commands()) for document in DOCUMENTS}
    assert counts["README.md"] >= 8
    assert counts["docs/scale.md"] >= 6


def _overrides(texts: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, sign, value = text.partition("=")
        assert sign, text
        pairs.append((name, value))
    return pairs


def _parameters(document: Document, file: str) -> dict:
    """Parameters of a file: one of the project, or the block that the document shows."""
    if (REPOSITORY / file).exists():
        return yaml.safe_load((REPOSITORY / file).read_text(encoding="utf-8"))
    blocks = document.blocks("yaml")
    assert f"`{file}`" in document.text and len(blocks) == 1, file
    return yaml.safe_load(blocks[0])


# --------------------------------------------------------------------------------------- parameters


def _parameter_tables() -> dict[str, dict[str, str]]:
    """For each notebook the default of each parameter that docs/parameters.md lists."""
    text = (REPOSITORY / "docs" / "parameters.md").read_text(encoding="utf-8")
    tables = {}
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", body, re.MULTILINE)
        tables[title] = dict(rows)
    return tables


@pytest.mark.parametrize("notebook", notebooks.list_notebooks(), ids=lambda path: path.stem)
def test_every_parameter_has_its_row_with_its_default(notebook):
    declared = notebooks.declared_parameters(notebook)
    listed = _parameter_tables()[notebook.stem]
    assert list(listed) == list(declared)
    for name, default in listed.items():
        assert ast.literal_eval(default) == declared[name].default, name


# -------------------------------------------------------------------------------------------- names


@each_document
def test_modules_and_files_that_are_named_are_there(document):
    for code in document.inline_code():
        if re.fullmatch(r"probekit(\.\w+)+", code):
            assert _resolve(code), code
        if re.match(r"(probekit|tests|benchmarks|notebooks|docs)/[\w./]+$", code):
            assert (REPOSITORY / code).exists(), code
        for script in re.findall(r"benchmarks/\w+\.py", code):
            assert (REPOSITORY / script).exists(), script


def _resolve(name: str) -> object:
    """A module, or what is in one."""
    parts = name.split(".")
    value = importlib.import_module(parts[0])
    for k, part in enumerate(parts[1:], start=1):
        if hasattr(value, part):
            value = getattr(value, part)
        else:
            value = importlib.import_module(".".join(parts[: k + 1]))
    return value


def test_tasks_that_can_be_asked_and_their_variants_are_described():
    text = (REPOSITORY / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = {
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    variants = {name for task in probekit.TASKS.values() for name in task.variants}
    assert rows == set(probekit.TASKS) | variants


def test_controls_are_described():
    from probekit.probes.controls import CONTROL_MEANING

    text = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = set(
        re.findall(r"^\| `(\w+)` \|", text.partition("## What does a score")[2], re.MULTILINE)
    )
    assert rows == set(CONTROL_MEANING)


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changes, re.MULTILINE)
    assert citation["version"] == probekit.__version__ == released[0]
    assert f'version = "{probekit.__version__}"' in project


def test_the_name_on_the_package_index_is_not_advised():
    """It belongs to another project."""
    for document in DOCUMENTS:
        for names in re.findall(r"pip install ([^\n`]*)", document.text):
            assert not re.search(r"(?<![\w./-])probekit(?!-vlm)\b", names), document.name
