"""The Python of the documents runs, and what the README promises comes out."""

from __future__ import annotations

import ast
import csv
import doctest
import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml

import probekit
from probekit.models.architectures import SPECIAL_CASES
from probekit.paths import Home
from tests.conftest import REPOSITORY
from tests.docs.documents import Document, all_documents

README = Document(REPOSITORY / "README.md")
PAGES = [document for document in all_documents() if document.worked_examples()]
SMALLER = {
    '"data/coco"': '"scenes"',
    '"qwen2-vl-2b"': '"tiny-qwen2-vl"',
    "train=2000, validation=500, test=500": "train=40, validation=20, test=20",
    '"lm.12"': '"lm.04"',
    "pk.probe(activations)": "pk.probe(activations, resamples=50)",
    "pk.intervene(activations)": "pk.intervene(activations, layers=[8], images=6, resamples=50)",
}


@pytest.fixture
def registries():
    """What examples add to tasks and architectures is taken away again."""
    tasks = dict(probekit.TASKS)
    special_cases = dict(SPECIAL_CASES)
    yield
    for registry, content in ((probekit.TASKS, tasks), (SPECIAL_CASES, special_cases)):
        registry.clear()
        registry.update(content)


def run_blocks(blocks: dict[str, str], document: str) -> dict:
    """Run blocks of code one after the other, in one namespace; a traceback names the block."""
    namespace: dict = {}
    for name, code in blocks.items():
        exec(compile(code, f"{document}: {name}", "exec"), namespace)
    return namespace


# --------------------------------------------------------------------------------------- front door


def test_the_readme_shows_what_the_package_shows():
    (code,) = README.blocks("python")
    shown = [ast.unparse(statement) for statement in ast.parse(code).body]
    examples = doctest.DocTestParser().get_examples(probekit.__doc__)
    expected = [ast.unparse(ast.parse(example.source)) for example in examples]
    assert len(expected) == 7
    assert shown[: len(expected)] == expected


@pytest.mark.slow
def test_the_python_of_the_readme_runs(data):
    (code,) = README.blocks("python")
    for original, smaller in SMALLER.items():
        assert code.count(original) == 1, original
        code = code.replace(original, smaller)
    names = run_blocks({"from Python": code}, "README.md")
    activations = names["activations"]
    results = names["results"]
    assert activations.poolings == ("mean", "last")
    assert activations["lm.04", "mean"].shape[0] == len(names["examples"])
    assert set(results.metrics.pooling) == {"mean", "last"}
    assert results.plot("accuracy").data
    assert {"leace", "mean_difference", "steer", "cut"} <= set(names["used"].intervention)
    assert len(results.summary()) == 2  # a paragraph per pooling


# ---------------------------------------------------------------------------------- worked examples


def test_there_are_worked_examples():
    names = {name for page in PAGES for name in page.worked_examples()}
    assert {"task", "architecture", "special-case", "probe", "metric", "figure"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_worked_examples_run(page, data, registries):
    names = run_blocks(page.worked_examples(), page.name)
    check = CHECKS.get(page.name)
    if check:
        check(names)


def check_tasks(names: dict) -> None:
    examples = names["examples"]
    assert set(examples.task) == {"many"}
    labels = examples.labels.map(lambda values: values[0])
    for _, of_split in labels.groupby(examples.split):
        assert of_split.mean() == 0.5


def check_architecture(names: dict) -> None:
    assert set(names["states"]) == set(names["vlm"].layers)
    accuracy = names["scores"].query("metric == 'accuracy'")
    assert list(accuracy.layer) == names["activations"].layers
    curve = names["curve"]
    inside = (names["lower_l"] <= curve.score_l) & (curve.score_l <= names["upper_l"])
    assert inside.all()
    assert "caption_ranking" in names["page"].read_text(encoding="utf-8")


CHECKS = {"docs/tasks.md": check_tasks, "docs/architecture.md": check_architecture}


# ---------------------------------------------------------------------------------- own photographs


@pytest.mark.slow
def test_a_folder_of_images_with_captions_becomes_a_page(scene_folder, tmp_path):
    """The README's way for one's own photographs, with its file of parameters, smaller."""
    (block,) = README.blocks("yaml")
    parameters = yaml.safe_load(block)
    photos = tmp_path / parameters["dataset"]
    photos.mkdir(parents=True)
    annotations = next((scene_folder / "annotations").glob("captions_*.json"))
    content = json.loads(annotations.read_text(encoding="utf-8"))
    caption_of = {one["image_id"]: one["caption"] for one in content["annotations"]}
    with (photos / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        for image in content["images"]:
            source = next(scene_folder.rglob(image["file_name"]))
            shutil.copy(source, photos / image["file_name"])
            writer.writerow([image["file_name"], caption_of[image["id"]]])
    parameters |= {"train": 36, "validation": 12, "test": 12}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(parameters), encoding="utf-8")

    command = [sys.executable, "-m", "probekit", "run", "--params", "mine.yaml"]
    command += ["-p", "resamples=50", "-p", "pictures=no", "-p", "strengths=[0.001, 0.1]"]
    command += ["-p", "epochs=3", "-p", "layers=[0, 8]", "-p", "images=10", "-p", "fit_images=20"]
    environment = os.environ | {"PROBEKIT_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    figures = Home(tmp_path).figures / parameters["run"]
    assert (figures / "index.html").exists()
    metrics = pd.read_csv(figures / "metrics.csv")
    assert set(metrics.model) == {"tiny-qwen2-vl"}
    assert set(metrics.task) == {"caption"}
