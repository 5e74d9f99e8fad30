"""The notebooks as a batch: one file of parameters, executed one after the other with papermill."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from weakref import WeakSet

import nbformat
import papermill
import psutil
import yaml
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager, KernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from pyarrow import parquet
from traitlets import default

from probekit.cli.progress import ENGINE, NotebookProgress, Screen
from probekit.cli.stopping import deaf_to_signals
from probekit.parameters import PARAMETERS, TYPES, Kind, read_parameter, remark, suggest
from probekit.paths import NUMBERED_NOTEBOOKS, Home

# A kernel warns that it listens on the loopback interface, and would keep cells in a history file.
KERNEL_ARGUMENTS = ["--IPKernelApp.log_level=40", "--HistoryManager.hist_file=:memory:"]

# Seconds that a kernel may take to start and to import; one that dies is noticed at once.
LONGEST_START = 600

# What a notebook needs in any case and imports only where it is used, by the notebook's number.
IMPORTED_LATER = {
    "02": ("transformers.models.auto.processing_auto",),
    "04": ("nbformat",),  # by plotly, to show a figure
    "05": ("nbformat",),
    "06": ("probekit.report.explorer",),
}

# Seconds between two looks whether a notebook has ended, and until it is left alone after Ctrl-C.
POLL_SECONDS = 0.1
LONGEST_ENDING = 10

# Heading of a notebook's cells that print what it has written.
WRITTEN = "## What is written"

# Endings that JupyterLab, browsers, editors and file managers give to copies.
COPY_ENDING = re.compile(r"(-Copy\d*|[ _-]copy( ?\d+)?|-checkpoint| ?\(\d+\))+", re.IGNORECASE)

# What takes less memory, by the notebook's number.
SMALLER = {
    "02": "with a smaller batch_tokens, which goes on where this stopped",
    "03": "with a smaller memory_gb",
}


Value = TypeVar("Value")


class _KernelOfThisPython(AsyncKernelManager):
    """Starts kernels of this interpreter, whatever kernelspecs the machine has.

    A kernelspec "python3" may be that of another environment, which lacks this package.
    """

    managers: ClassVar[WeakSet[_KernelOfThisPython]] = WeakSet()
    latest_end = 0.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.managers.add(self)

    @default("kernel_spec_manager")
    def _without_kernelspecs(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])

    @classmethod
    def start(cls, folder: Path, imports: Sequence[str]) -> _KernelOfThisPython:
        """Start a kernel in a folder; it imports modules before it runs any cell.

        Its user namespace stays empty, and a failing import is left to the cell that needs it.
        """
        kernel = cls(kernel_name="python3")
        arguments = list(KERNEL_ARGUMENTS)
        if imports:
            statement = f"import {', '.join(imports)}"
            arguments.append(f"--IPKernelApp.exec_lines=exec({statement!r}, {{}})")
        KernelManager.start_kernel(kernel, extra_arguments=arguments, cwd=str(folder))
        return kernel

    @property
    def process(self) -> subprocess.Popen | None:
        """Its process, as long as that runs."""
        process = getattr(self.provisioner, "process", None)
        return process if process is not None and process.poll() is None else None

    async def shutdown_kernel(  # type: ignore[override]  # as in AsyncKernelManager
        self, now: bool = False, restart: bool = False
    ) -> None:
        """Ask the kernel to end, which takes it a second: the next notebook need not wait."""
        self.latest_end = time.monotonic() + LONGEST_ENDING
        await self.request_shutdown(restart=restart)

    def end(self) -> None:
        """Wait until the kernel has ended, for some seconds from when it was asked to.

        Left to itself, one with processes of joblib takes half a minute: it sends them SIGTERM for
        14 seconds, which one of them ignores.
        """
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0, self.latest_end - time.monotonic()))
        self.kill_with_children()
        self.cleanup_connection_file()

    def kill_with_children(self) -> None:
        """Kill the kernel, if it runs, with all processes that it started."""
        process = self.process
        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            kernel = psutil.Process(process.pid)
            kernel.suspend()  # it starts no others
            for one in (*kernel.children(recursive=True), kernel):  # Chrome is in another group
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        if sys.platform != "win32":
            with contextlib.suppress(OSError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)  # also what has lost its parent


class NotebookFailedError(RuntimeError):
    """A cell failed, or the kernel died; the message says where to look."""


@dataclass(frozen=True)
class Parameter:
    """What a notebook declares: ``name = default  # type: kind  meaning``.

    Attributes
    ----------
    kind : str
        ``str``, ``int``, ``float``, ``bool``, ``list`` or ``str|list``.
    default : object
    notebook : str
    """

    kind: str
    default: object
    notebook: str


def list_notebooks() -> list[Path]:
    """Return the numbered notebooks in their order, without copies that Jupyter made of them.

    Raises
    ------
    FileNotFoundError
        There are none.
    """
    folder = Home.find().notebooks
    notebooks = sorted(folder.glob(NUMBERED_NOTEBOOKS))
    if not notebooks:
        raise FileNotFoundError(
            f"there are no numbered notebooks in {folder}, and neither here nor beside the package "
            "is a checkout of probekit: start in a checkout, or set PROBEKIT_HOME to one"
        )
    names = {notebook.stem for notebook in notebooks}
    return [notebook for notebook in notebooks if not _is_copy(notebook.stem, names)]


def list_copies() -> list[Path]:
    """Return the copies of numbered notebooks, which are not run."""
    notebooks = list_notebooks()
    return sorted(set(Home.find().notebooks.glob(NUMBERED_NOTEBOOKS)) - set(notebooks))


def _is_copy(stem: str, stems: Collection[str]) -> bool:
    return any(stem != other and COPY_ENDING.fullmatch(stem.removeprefix(other)) for other in stems)


def find_notebook(name: str) -> Path:
    """Return a notebook by its name without ending.

    Raises
    ------
    FileNotFoundError
        It is not there.
    """
    for notebook in list_notebooks():
        if notebook.stem == name:
            return notebook
    raise FileNotFoundError(
        f"{Home.find().notebooks} has no notebook {name}: copy it there from a checkout of probekit"
    )


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """Return the parameters that a notebook declares, by name."""
    inspected = papermill.inspect_notebook(str(notebook))
    return {
        name: Parameter(
            parameter["inferred_type_name"],
            ast.literal_eval(parameter["default"]),
            notebook.stem,
        )
        for name, parameter in inspected.items()
    }


def all_declared_parameters() -> dict[str, Parameter]:
    """Return the parameters that any notebook declares, by name."""
    parameters: dict[str, Parameter] = {}
    for notebook in list_notebooks():
        parameters |= declared_parameters(notebook)
    return parameters


# ------------------------------------------------------------------------------ parameter files


class _UniqueKeyLoader(yaml.SafeLoader):
    """Reads YAML; a key that stands twice in a mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[object, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable):
                if key in lines:
                    raise ValueError(
                        f"{key!r} stands twice, in line {lines[key]} and in line {line}: keep one"
                    )
                lines[key] = line
        return super().construct_mapping(node, deep)


def _load_yaml(text: bytes | str, source: str) -> Any:
    """Parse YAML; bytes are UTF-8, or UTF-16 with a byte order mark."""
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"{source} is not YAML in UTF-8 ({error.reason}): save it as UTF-8"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{source}{place} is not YAML: {error.problem}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def read_parameters(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Read the parameters of a YAML file, changed by ``key=value`` texts whose values are YAML.

    Parameters
    ----------
    file : Path
        A relative one starts at the working directory, else beside the notebooks' folder.
    overrides : sequence of str
        Of two for the same key the last counts.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; broken YAML, or a key twice; an override without ``=``.
    """
    file = _find_parameter_file(file)
    parameters = _load_yaml(file.read_bytes(), str(file)) or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{file} must hold lines of name: value")
    overridden = set()
    for override in overrides:
        key, sign, value = override.partition("=")
        key = key.strip()
        if not sign:
            raise ValueError(f"-p {override}: write -p {override}=VALUE")
        if key in overridden:
            remark(f"-p {key} is named twice: {override} counts")
        overridden.add(key)
        parameters[key] = _load_yaml(value, f"-p {override}")
    return parameters


def _find_parameter_file(file: Path) -> Path:
    notebooks = Home.find().notebooks
    for candidate in (file, notebooks.parent / file):
        if candidate.is_file():
            return candidate
    shipped = sorted((notebooks / "params").glob("*.yaml"))
    names = ", ".join(map(str, shipped)) or "none that are shipped"
    if file.is_dir():
        raise FileNotFoundError(f"{file} is a folder: name a file of parameters; there are {names}")
    raise FileNotFoundError(f"{file} does not exist; there are {names}")


def check_parameters(
    parameters: Mapping[str, Any], declared: Mapping[str, Parameter]
) -> dict[str, Any]:
    """Return parameters as they are meant.

    Raises
    ------
    ValueError
        No notebook declares a name, or a value is not allowed; the message names the parameter and
        the fix.

    Warns
    -----
    Remark
        A value is read as something else than it says.
    """
    values = {}
    for name, value in parameters.items():
        if name not in declared:
            unknown = f"no notebook declares the parameter {name!r}"
            raise ValueError(unknown + suggest(str(name), declared))
        value = read_parameter(name, value, _kind_of(name, declared[name]))
        values[name] = list(value) if isinstance(value, tuple) else value
    return values


def _kind_of(name: str, parameter: Parameter) -> Kind:
    """Return what a parameter may be; of one that a user's notebook adds, the declared type."""
    if name in PARAMETERS:
        return PARAMETERS[name]
    may_be_none = parameter.default is None
    if parameter.kind in TYPES:
        return Kind(parameter.kind, may_be_none=may_be_none)
    entries = parameter.default if isinstance(parameter.default, list) else []
    entry_types = [kind for kind in TYPES if all(Kind(kind).allows(one) for one in entries)]
    entry_type = entry_types[0] if entries else "anything"
    is_either = parameter.kind == "str|list"
    return Kind(entry_type, is_list=not is_either, may_be_list=is_either, may_be_none=may_be_none)


def read_notebook_parameters(
    notebook: Path, file: Path, overrides: Sequence[str]
) -> dict[str, Any]:
    """Return the parameters of one notebook: what a file and overrides say, else what it declares.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`read_parameters` and :func:`check_parameters` raise them.
    """
    values = check_parameters(read_parameters(file, overrides), all_declared_parameters())
    return _values_of(notebook, values)


# ------------------------------------------------------------------------------------ execution


@dataclass
class Execution:
    """One notebook of a batch.

    Attributes
    ----------
    notebook : Path
    state : str
        ``"not run"``, ``"stopped"`` (it runs, or did so when all was stopped), ``"failed"``,
        ``"done"``.
    seconds : float
    written : list of str
        Lines about what it wrote.
    """

    notebook: Path
    state: str = "not run"
    seconds: float = 0
    written: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """Notebooks that are executed one after the other.

    Attributes
    ----------
    executions : list of Execution
    parameters : dict
        Those that are set, by name.
    home : Home
    folder : Path
        Of the executed copies.
    waiting : list of kernels
        That of the next notebook, if it runs already.
    """

    executions: list[Execution]
    parameters: dict[str, Any]
    home: Home
    folder: Path
    waiting: list[_KernelOfThisPython] = field(default_factory=list)

    @classmethod
    def plan(
        cls, file: Path, overrides: Sequence[str], *, start: str = "01", end: str = "99"
    ) -> Batch:
        """Check all that can be checked before the notebooks from number `start` to `end` run.

        Raises
        ------
        FileNotFoundError, ValueError
            What the parameters say is not there or not right.
        """
        first = start[:2].zfill(2)
        last = end[:2].zfill(2)
        notebooks = [one for one in list_notebooks() if first <= one.name[:2] <= last]
        if not notebooks:
            names = ", ".join(notebook.stem for notebook in list_notebooks())
            raise ValueError(f"--from {start} --to {end}: there are {names}")
        declared = all_declared_parameters()
        parameters = check_parameters(read_parameters(file, overrides), declared)
        home = Home.find()
        if not home.notebooks.is_relative_to(home.root):
            remark(f"{home.root} has no notebooks: those of {home.notebooks.parent} are run")
        for copy in list_copies():
            remark(f"{copy.name} is a copy of a notebook and is not run")
        _report_unused_overrides(overrides, notebooks, declared)
        os.environ["PYTHONUTF8"] = "1"  # of the kernels, whatever the locale
        waiting = [_start_kernel(notebooks[0], home)]
        try:
            from probekit.cli.planning import check_steps  # loads torch

            check_steps({notebook.stem: _values_of(notebook, parameters) for notebook in notebooks})
        except BaseException:
            _kill(waiting)
            raise
        executions = [Execution(notebook) for notebook in notebooks]
        folder = home.data / "runs" / f"{datetime.now():%Y%m%d-%H%M%S.%f}-{file.stem}"
        return cls(executions, parameters, home, folder, waiting)

    def execute(self, screen: Screen) -> None:
        """Execute the notebooks, and show on a screen how far they are.

        Raises
        ------
        NotebookFailedError
            A notebook stopped; the message shows the cell, and where the notebook lies as far as
            it came.
        KeyboardInterrupt
            No process of the notebook is left.
        """
        count = len(self.executions)
        used: list[_KernelOfThisPython] = []
        try:
            self.folder.mkdir(parents=True)
            for number, execution in enumerate(self.executions, start=1):
                name = execution.notebook.stem
                screen.write(f"[{number}/{count}] {name}")
                progress = NotebookProgress(name, number=number, count=count)
                started = time.monotonic()
                execution.state = "stopped"
                try:
                    executed = self._execute(number, progress, screen, used)
                except NotebookFailedError:
                    execution.state = "failed"
                    raise
                finally:
                    execution.seconds = time.monotonic() - started
                execution.state = "done"
                execution.written = _written_lines(executed, self.home)
            for kernel in used:
                kernel.end()
        finally:
            _kill([*self.waiting, *used])

    def _execute(
        self,
        number: int,
        progress: NotebookProgress,
        screen: Screen,
        used: list[_KernelOfThisPython],
    ) -> NotebookNode:
        """Execute a notebook, from 1, in the kernel that waits for it, and have the next one wait.

        What a kernel imports costs seconds, which a second core has while this notebook runs. The
        kernel is added to the `used` ones.
        """
        notebook = self.executions[number - 1].notebook
        following = [execution.notebook for execution in self.executions[number : number + 1]]
        declared = declared_parameters(notebook)
        values = {name: value for name, value in self.parameters.items() if name in declared}
        target = self.folder / notebook.name

        def execute() -> NotebookNode:
            kernel = self.waiting.pop() if self.waiting else _start_kernel(notebook, self.home)
            if kernel.process is None:  # a lack of memory may have ended it
                kernel = _start_kernel(notebook, self.home)
            used.append(kernel)
            self.waiting.extend(_start_kernel(one, self.home) for one in following)
            return papermill.execute_notebook(
                str(notebook),
                str(target),
                values,
                engine_name=ENGINE,
                progress=progress,
                kernel_name="python3",
                kernel_manager=kernel,
                cwd=str(self.home.root),
                progress_bar=False,
                start_timeout=LONGEST_START,
            )

        try:
            return _call_in_thread(execute, meanwhile=lambda: progress.refresh(screen))
        except papermill.PapermillExecutionError as error:
            raise NotebookFailedError(
                f"A cell of {notebook.stem} failed:\n\n{error.source}\n\n{error.ename}: "
                f"{error.evalue}\n\nThe notebook as far as it came: {target}"
            ) from error
        except DeadKernelError as error:
            remedy = SMALLER.get(notebook.stem[:2], "with fewer images")
            raise NotebookFailedError(
                f"The kernel of {notebook.stem} died, most likely for want of memory: run it again "
                f"{remedy}. The notebook as far as it came: {target}"
            ) from error
        except RuntimeError as error:
            raise NotebookFailedError(
                f"{notebook.stem} could not be started with {sys.executable} ({error}): "
                "pip install -e . again, in the checkout and with this Python"
            ) from error

    @property
    def unfinished(self) -> Execution | None:
        """The first notebook that is not done."""
        return next((one for one in self.executions if one.state != "done"), None)

    def describe(self) -> str:
        """Return a table: notebook, seconds, what it wrote or what became of it."""
        width = max(len(execution.notebook.stem) for execution in self.executions)
        lines = [f"{'notebook':{width}}  seconds  wrote"]
        for execution in self.executions:
            is_run = execution.state != "not run"
            seconds = f"{execution.seconds:,.0f}" if is_run else ""
            first, *others = (
                execution.written or ["nothing"] if execution.state == "done" else [execution.state]
            )
            lines.append(f"{execution.notebook.stem:{width}}  {seconds:>7}  {first}")
            lines += [f"{'':{width}}  {'':7}  {other}" for other in others]
        return "\n".join(lines)


def _start_kernel(notebook: Path, home: Home) -> _KernelOfThisPython:
    return _KernelOfThisPython.start(home.root, _first_imports(notebook))


def _kill(kernels: Sequence[_KernelOfThisPython]) -> None:
    with deaf_to_signals():
        for kernel in kernels:
            kernel.kill_with_children()
            kernel.cleanup_connection_file()


def _first_imports(notebook: Path) -> list[str]:
    """Return the modules that a notebook imports in any case, before it does anything else.

    There are none where its first cell does more than import: it may set what these go by.
    """
    first = next(
        (
            cell.source
            for cell in nbformat.read(notebook, as_version=4).cells
            if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", ())
        ),
        "",
    )
    try:
        statements = ast.parse(first).body
    except SyntaxError:  # a command of IPython
        return []
    modules: list[str] = []
    for statement in statements:
        if isinstance(statement, ast.Import):
            modules += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            modules.append(statement.module)
        else:
            return []
    return [*modules, *IMPORTED_LATER.get(notebook.stem[:2], ())] if modules else []


def _written_lines(executed: NotebookNode, home: Home) -> list[str]:
    """Return what the cells below :data:`WRITTEN` print, with the sizes of files and folders."""
    lines: list[str] = []
    is_below = False
    for cell in executed.cells:
        if cell.cell_type == "markdown":
            is_below = is_below or cell.source.startswith(WRITTEN)
        elif is_below:
            for output in cell.get("outputs", ()):
                if output.get("name") == "stdout":
                    lines += filter(str.strip, output.text.splitlines())
    return [_with_size(line.replace(f"{home.root}{os.sep}", ""), home) for line in lines]


def _with_size(line: str, home: Home) -> str:
    """Return a line that names a file or folder with its size, any other as it is."""
    path = home.resolve(line)
    try:
        if path.is_dir():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        else:
            size = path.stat().st_size
    except OSError:  # it names none: a sentence, a URL
        return line
    size_words = f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.0f} kB"
    if path.suffix != ".parquet":
        return f"{line} ({size_words})"
    return f"{line} ({parquet.read_metadata(path).num_rows:,} rows, {size_words})"


def _values_of(notebook: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parameters of a notebook: those that are set, else what it declares."""
    return {
        name: parameters.get(name, parameter.default)
        for name, parameter in declared_parameters(notebook).items()
    }


def _report_unused_overrides(
    overrides: Sequence[str], notebooks: Sequence[Path], declared: dict[str, Parameter]
) -> None:
    used = {name for notebook in notebooks for name in declared_parameters(notebook)}
    for override in overrides:
        name = override.partition("=")[0].strip()
        if name not in used:
            remark(
                f"-p {name} is for {declared[name].notebook}, which is not run now: it changes "
                "nothing here"
            )


def _call_in_thread(call: Callable[[], Value], *, meanwhile: Callable[[], None]) -> Value:
    """Call what executes a notebook, so that Ctrl-C ends it at once.

    In the main thread nbclient would take Ctrl-C for itself, and end the kernel when it has time.

    Parameters
    ----------
    call : callable
    meanwhile : callable
        Called every :data:`POLL_SECONDS`, and once at the end.

    Returns
    -------
    object
        What `call` returns.

    Raises
    ------
    KeyboardInterrupt
        No process of the notebook is left.
    """
    values: list[Value] = []
    errors: list[BaseException] = []
    ended = threading.Event()  # an interrupted Thread.join takes the thread for ended

    def call_and_keep_error() -> None:
        try:
            values.append(call())
        except BaseException as error:  # raised in the main thread
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=call_and_keep_error, daemon=True).start()
    try:
        while not ended.wait(POLL_SECONDS):
            meanwhile()
        meanwhile()
    except BaseException:  # a signal, or what shows the progress
        with deaf_to_signals():
            _end_kernels(ended)
        raise
    if errors:
        raise errors[0]
    return values[0]


def _end_kernels(ended: threading.Event) -> None:
    """Kill kernels until the thread that executes a notebook has ended, or for some seconds."""
    deadline = time.monotonic() + LONGEST_ENDING
    while not ended.wait(POLL_SECONDS) and time.monotonic() < deadline:
        for manager in list(_KernelOfThisPython.managers):  # one may just be starting
            manager.kill_with_children()
