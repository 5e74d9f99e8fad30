"""The notebooks through their real entry point, at a small size."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import papermill
import psutil
import pytest
import yaml

from probekit.cli import notebooks
from probekit.cli.main import make_parser
from probekit.cli.notebooks import (
    Batch,
    Execution,
    NotebookFailedError,
    _KernelOfThisPython,
    find_notebook,
)
from probekit.cli.progress import ENGINE, NotebookProgress, Screen
from probekit.paths import Home
from tests.conftest import (
    DEMO_MODELS,
    REAL_COCO,
    REPOSITORY,
    needs_real_coco,
    run_notebooks,
    small_parameters,
)

pytestmark = pytest.mark.slow

SHARDS = "data/activations/*/*/shards-*/shard-*"
FITTED_PROBES = "data/probes/*/*/*"


def modification_times(home, pattern=SHARDS):
    return {path: path.stat().st_mtime_ns for path in sorted(home.glob(pattern))}


def test_all_notebooks_run_and_leave_their_artefacts(demo):
    table = pd.read_csv(demo / "figures" / "small" / "metrics.csv")
    assert set(table.model) == set(DEMO_MODELS)
    assert set(table.task) == {"caption", "category", "category_list"}
    assert set(table.control) == {
        "none",
        "untrained",
        "no_image",
        "wrong_image",
        "shuffled",
        "control_task",
        "majority",
        "name_alone",
        "bag_of_words",
        "word_order",
    }
    assert set(table.probe) == {"logreg", "linear", "answer", "lens", "tuned_lens"}
    assert set(table.stage) == {"lm", "vision", "projector"}
    assert "heat_in_boxes" in set(table.metric)
    for _, rows in table[table.stage == "lm"].groupby(["model", "control"]):
        assert rows.layer.nunique() == 9
    page = (demo / "figures" / "small" / "index.html").read_text(encoding="utf-8")
    assert page.count("<figure ") == 47  # 45 of the tables, and an explorer for each model
    assert all((demo / "figures" / "small" / f"{name}.js").exists() for name in _figures(page))
    assert page.index("caption_known_and_said") < page.index('role="tablist"')  # the first picture
    overview = pd.read_csv(demo / "figures" / "small" / "overview.csv")
    assert len(overview) == 4 + 2 + 2  # two models; captions in two poolings
    used = pd.read_csv(demo / "figures" / "small" / "interventions.csv")
    assert set(used.model) == set(DEMO_MODELS)
    greyed = {"whole_image", "no_box", "same_area"}
    assert {"none", "leace", "steer", "cut"} | greyed == set(used.intervention)
    executed = sorted((demo / "data" / "runs").glob("*/0*.ipynb"))
    assert [path.stem[:2] for path in executed] == ["01", "02", "03", "04", "05", "06"]
    for path in executed:
        assert path.stat().st_size < 3e6
        assert nbformat.read(path, 4).metadata.papermill["exception"] is None


def _figures(page):
    """Names of the figures of a page, each of them once."""
    names = re.findall('data-name="([^"]+)"', page)
    assert len(set(names)) == len(names) == 47
    return names


def test_a_run_says_how_far_it_is_and_what_it_wrote(demo):
    progress = (demo / "stderr.txt").read_text(encoding="utf-8")
    assert "\r" not in progress
    assert len(progress.splitlines()) < 400
    for number, name in enumerate(["01_build_data", "02_extract", "03_probe"], start=1):
        assert f"[{number}/6] {name}\n" in progress
    assert "tiny-fast-vlm (fast_vlm) has no stage vision" in progress  # a note of the library
    assert "<|im_start|>" not in progress  # what a quick cell prints is for the notebook's readers
    result = (demo / "stdout.txt").read_text(encoding="utf-8")
    for notebook in sorted((demo / "data" / "runs").glob("*/0*.ipynb")):
        assert re.search(rf"^{notebook.stem} +\d+  \S", result, re.MULTILINE)
    examples = pd.read_parquet(demo / "data" / "tasks" / "small" / "examples.parquet")
    assert f"data/tasks/small/examples.parquet ({len(examples):,} rows, " in result
    page = result.splitlines()[-1].removeprefix("open ")
    assert page.endswith("figures/small/index.html")


def test_a_second_run_uses_what_is_there_from_any_folder(demo, tmp_path):
    before = modification_times(demo)
    # 3 shards of images per model, 6 of prompts without one, 1 that interventions are fitted on and
    # 1 of changed images (the untrained model has the first alone)
    assert len(before) == 2 * (3 + 6 + 1 + 1) + 3
    fitted = modification_times(demo, FITTED_PROBES)
    assert fitted
    result = run_notebooks(demo, "--to", "03", cwd=tmp_path, run="small")
    assert result.returncode == 0, result.stderr[-3000:]
    assert modification_times(demo) == before
    assert modification_times(demo, FITTED_PROBES) == fitted
    assert not list(tmp_path.iterdir())


def test_from_starts_in_the_middle_from_any_folder(demo, tmp_path):
    before = modification_times(demo)
    result = run_notebooks(demo, "--from", "05", cwd=tmp_path, run="small", probe="linear")
    assert result.returncode == 0, result.stderr[-3000:]
    assert modification_times(demo) == before
    assert not list(tmp_path.iterdir())
    newest = max((demo / "data" / "runs").iterdir())
    assert [path.stem[:2] for path in sorted(newest.glob("*.ipynb"))] == ["05", "06"]
    page = (demo / "figures" / "small" / "index.html").read_text(encoding="utf-8")
    assert "A light probe (linear)" in page


def test_a_failing_cell_is_shown_with_the_notebook_and_how_to_go_on(tmp_path):
    result = run_notebooks(tmp_path, "--to", "02", run="broken", dataset="data/coco/nowhere")
    assert result.returncode == 1
    assert "pk.build_examples" in result.stderr
    assert "does not exist" in result.stderr
    path = re.search(r"as far as it came: (.+01_build_data.ipynb)$", result.stderr, re.MULTILINE)[1]
    assert nbformat.read(path, 4).cells
    states = [line.split(maxsplit=1)[1] for line in result.stdout.strip().splitlines()]
    assert re.fullmatch(r"\d+ +failed", states[1])
    assert states[2] == "not run"
    assert _processes_of(tmp_path) == []  # nor is the kernel that waited
    assert last_command(result.stderr).endswith(
        "-p run=broken -p dataset=data/coco/nowhere --from 01 --to 02"
    )


def last_command(errors):
    """The last line, which must be a command that can be run."""
    command = errors.rstrip().splitlines()[-1].strip()
    program, *arguments = shlex.split(command.removeprefix("python -m "))
    assert program == "probekit"
    make_parser().parse_args(arguments)
    return command


@needs_real_coco
def test_real_photographs_go_the_whole_way(tmp_path):
    result = run_notebooks(
        tmp_path,
        run="photos",
        dataset=REAL_COCO,
        train=80,
        validation=30,
        test=30,
        models="[tiny-qwen2-vl]",
        untrained="[]",
        controls="[wrong_image, shuffled]",
        codelength="no",
        stages="[lm]",
        longest_side=100,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    table = pd.read_csv(tmp_path / "figures" / "photos" / "metrics.csv")
    is_score = (table.split == "test") & (table.metric == "accuracy") & table["class"].isna()
    scores = table[is_score & (table.stage == "lm")]
    is_answer = scores.probe == "answer"
    assert scores[is_answer].groupby("task").layer.unique().map(list).tolist() == [["lm.08"]]
    assert scores[~is_answer].groupby(["task", "probe"]).layer.nunique().eq(9).all()
    assert scores.value.between(0, 1).all()
    categories = set(table[table.task == "category"]["class"].dropna())
    assert categories >= {"person", "dog", "car"}
    pages = {path.stem for path in (tmp_path / "figures" / "photos").glob("*.html")}
    assert pages >= {
        "global_and_local",
        "category_classes",
        "category_localisation",
        "explorer_tiny-qwen2-vl",
    }


def test_a_kernelspec_of_another_environment_is_passed_over(tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    other = {"argv": ["/nowhere/python"], "display_name": "other", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(other), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    kernel = _KernelOfThisPython(kernel_name="python3")
    assert kernel.kernel_spec.argv[0] == sys.executable


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
@pytest.mark.parametrize(
    ("stop", "sign", "number"),
    [
        (signal.SIGTERM, "data/runs/*", "01"),
        (signal.SIGINT, SHARDS, "02"),
    ],
    ids=["as a kernel starts", "as two workers read"],
)
def test_ctrl_c_and_sigterm_leave_no_process_and_say_how_to_go_on(tmp_path, stop, sign, number):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small_parameters()), encoding="utf-8")
    command = [sys.executable, "-m", "probekit", "run", "--params", str(tmp_path / "small.yaml")]
    command += ["-p", "run=cut", "-p", "workers=2"]
    environment = os.environ | {"PROBEKIT_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_listen_to_ctrl_c,
    ) as process:
        while process.poll() is None and not list(tmp_path.glob(sign)):
            time.sleep(0.1)
        os.killpg(process.pid, stop)
        table, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + stop
    assert "probekit: stopped. Go on with" in errors
    assert last_command(errors).endswith(f"-p run=cut -p workers=2 --from {number}")
    assert re.search(rf"^{number}_\w+ +\d+  stopped$", table, re.MULTILINE)
    assert "Traceback" not in errors
    assert _processes_of(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no sessions")
def test_a_kernel_is_ended_with_what_has_a_session_of_its_own():
    # as kaleido starts Chrome
    code = "import subprocess; subprocess.run(['sleep', '99'], start_new_session=True)"
    kernel = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not (children := psutil.Process(kernel.pid).children()):
        time.sleep(0.01)
    manager = _KernelOfThisPython()
    manager.provisioner = SimpleNamespace(process=kernel)
    manager.kill_with_children()
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert kernel.wait(timeout=5) == -signal.SIGKILL


def test_what_a_kernel_imports_ahead_is_not_seen_in_the_notebook(tmp_path):
    cells = ["sorted(globals())", "import os, sys; os.getcwd()", "'colorsys' in sys.modules"]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": ""}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    plain, ahead = (
        papermill.execute_notebook(
            tmp_path / "in.ipynb",
            tmp_path / "out.ipynb",
            engine_name=ENGINE,
            progress=NotebookProgress("02_extract", number=2, count=6),
            kernel_name="python3",
            kernel_manager=_KernelOfThisPython.start(tmp_path, imports),
            progress_bar=False,
        ).cells
        for imports in ([], ["colorsys", "no.such.module"])
    )
    assert [cell.execution_count for cell in ahead] == [1, 2, 3]
    assert [cell.outputs for cell in ahead[:2]] == [cell.outputs for cell in plain[:2]]
    assert str(tmp_path) in ahead[1].outputs[0].data["text/plain"]
    texts = [[output.data["text/plain"] for output in cells[2].outputs] for cells in (plain, ahead)]
    assert texts == [["False"], ["True"]]


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that a batch starts; none runs a cell."""
    started = []

    class Kernel:
        def __init__(self, folder, imports=()):
            self.folder = folder
            self.imports = list(imports)
            self.process = object()
            self.has_file = True
            started.append(self)

        @classmethod
        def start(cls, folder, imports=()):
            return cls(folder, imports)

        def kill_with_children(self):
            self.process = None

        def end(self):
            self.process = None
            self.has_file = False

        def cleanup_connection_file(self):
            self.has_file = False

    def execute(notebook, target, parameters, *, kernel_manager, **options):
        assert sum(kernel.process is not None for kernel in started) <= 2
        executed.append(kernel_manager)
        kernel_manager.process = None
        return nbformat.v4.new_notebook()

    executed = []
    monkeypatch.setattr(notebooks, "_KernelOfThisPython", Kernel)
    monkeypatch.setattr(notebooks.papermill, "execute_notebook", execute)
    return started, executed


def batch_of(tmp_path, *names):
    executions = [Execution(find_notebook(name)) for name in names]
    return Batch(executions, {}, Home(tmp_path), tmp_path / "runs")


def test_each_kernel_waits_with_its_imports(kernels, tmp_path):
    started, executed = kernels
    batch_of(tmp_path, "01_build_data", "02_extract", "03_probe").execute(Screen(io.StringIO()))
    assert executed == started
    assert [kernel.folder for kernel in started] == [tmp_path] * 3
    assert "probekit.workflow" in started[0].imports
    assert "probekit.models.load" in started[1].imports
    assert "probekit.probes.localisation" in started[2].imports


def test_a_batch_of_one_notebook_starts_one_kernel(kernels, tmp_path):
    started, _ = kernels
    batch_of(tmp_path, "02_extract").execute(Screen(io.StringIO()))
    assert len(started) == 1


def test_what_is_found_wrong_before_all_runs_ends_the_first_kernel(kernels, monkeypatch, tmp_path):
    started, _ = kernels
    monkeypatch.setenv("PROBEKIT_HOME", str(tmp_path))
    (tmp_path / "some.yaml").write_text("models: [no-such-model]\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        Batch.plan(tmp_path / "some.yaml", [])
    assert [kernel.process for kernel in started] == [None]


def test_a_kernel_that_has_died_while_it_waited_is_started_again(kernels, monkeypatch, tmp_path):
    started, executed = kernels
    execute = notebooks.papermill.execute_notebook

    def end_the_waiting_one(*arguments, **options):
        started[-1].process = None
        return execute(*arguments, **options)

    monkeypatch.setattr(notebooks.papermill, "execute_notebook", end_the_waiting_one)
    batch_of(tmp_path, "05_layer_plots", "06_inspect_examples").execute(Screen(io.StringIO()))
    assert executed == [started[0], started[2]]


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), KeyboardInterrupt()])
def test_the_waiting_kernel_is_ended_where_a_notebook_stops(kernels, monkeypatch, tmp_path, error):
    started, _ = kernels

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(notebooks.papermill, "execute_notebook", fail)
    with pytest.raises((NotebookFailedError, KeyboardInterrupt)):
        batch_of(tmp_path, "01_build_data", "02_extract").execute(Screen(io.StringIO()))
    assert [kernel.process for kernel in started] == [None, None]
    assert not any(kernel.has_file for kernel in started)


@pytest.mark.parametrize(
    ("first_cell", "modules"),
    [
        ("import pandas as pd\nfrom probekit.paths import Home", ["pandas", "probekit.paths"]),
        ("import os\nos.environ['HF_HOME'] = 'x'\nimport transformers", []),
        ("%matplotlib inline\nimport torch", []),
    ],
)
def test_only_a_cell_of_imports_is_read_ahead(tmp_path, first_cell, modules):
    parameters = nbformat.v4.new_code_cell("run = 'demo'", metadata={"tags": ["parameters"]})
    cells = [parameters, nbformat.v4.new_code_cell(first_cell)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "07_mine.ipynb")
    assert notebooks._first_imports(tmp_path / "07_mine.ipynb") == modules


def _listen_to_ctrl_c():
    """Have Ctrl-C heard: shells have commands in the background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _processes_of(home):
    """Numbers of the processes whose home it is."""
    numbers = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = file.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"PROBEKIT_HOME={home}".encode() in variables:
            numbers.append(file.parent.name)
    return numbers


def test_names_of_files_do_not_depend_on_the_locale(tmp_path):
    (tmp_path / "Läufe.yaml").write_text("run: ü/ü\n", encoding="utf-8")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "probekit", "run", "--params", "Läufe.yaml"]
    environment = os.environ | locale | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    assert result.returncode == 2
    assert result.stderr.startswith(b"probekit: run='?/?': expected str that names one folder")
