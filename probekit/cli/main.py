"""``python -m probekit``: run the notebooks, look at models, shards and the machine."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from probekit.cli.stopping import Stopped, stopped_by_signals
from probekit.parameters import Remark

DESCRIPTION = "What each layer of a vision-language model knows."
GOES_ON = "Run the same command again: it goes on where it stopped"


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns
    -------
    int
        The exit code: 0, 1 where a notebook failed, something is damaged or a run is beyond its
        limit, 2 where the input is wrong, 128 and the signal's number where it was stopped: 130
        with Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not have all characters
            stream.reconfigure(errors="replace")
    options = make_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.run_command
    try:
        with stopped_by_signals(), _remarks_as_lines():
            return command(options)
    except KeyboardInterrupt as stop:
        print(f"\nprobekit: stopped. {options.after_stop}", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Stopped) else 130
    except (
        ArithmeticError,
        MemoryError,
        OSError,
        ValueError,
    ) as error:  # their messages name the fix
        print(f"probekit: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _remarks_as_lines() -> Iterator[None]:
    """Show remarks without the line of code that they come from, each once."""
    show_others = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if issubclass(category, Remark):
            from tqdm import tqdm  # below it may be a bar

            tqdm.write(f"probekit: {message}", file=sys.stderr)
        else:
            show_others(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("once", Remark)
        warnings.showwarning = show
        yield


def make_parser() -> argparse.ArgumentParser:
    """Describe all commands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m probekit",
        description=DESCRIPTION,
        **_example("run --params notebooks/params/demo.yaml"),
    )
    parser.set_defaults(after_stop="Run it again when you like")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands)
    _add_extract(commands)
    _add_plan(commands)
    _add_models(commands)
    _add_download(commands)
    _add_compare(commands)
    _add_verify(commands)
    doctor = commands.add_parser(
        "doctor",
        help="check Python, torch, COCO, model cache, Chrome, widgets",
        **_example("doctor"),
    )
    doctor.set_defaults(run_command=run_doctor)
    return parser


def _example(arguments: str) -> dict[str, Any]:
    """Return what shows an example below a parser's help, as it is to be typed."""
    return {
        "epilog": f"example:\n  python -m probekit {arguments}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--params", required=True, type=Path, help="YAML file, e.g. notebooks/params/demo.yaml"
    )
    parser.add_argument(
        "-p",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a notebook's parameter, its value in YAML",
    )


def _add_run(commands) -> None:
    parser = commands.add_parser(
        "run",
        help="execute the notebooks with papermill",
        **_example("run --params notebooks/params/demo.yaml -p run=mine --from 03"),
    )
    _add_parameters(parser)
    parser.add_argument(
        "--from", dest="start", default="01", metavar="NN", help="first notebook to run, e.g. 03"
    )
    parser.add_argument("--to", dest="end", default="99", metavar="NN", help="last notebook to run")
    parser.set_defaults(run_command=run_notebooks, after_stop=GOES_ON)


def _add_extract(commands) -> None:
    parser = commands.add_parser(
        "extract",
        help="make shards of 02_extract, as one of several processes",
        **_example("extract --params notebooks/params/paper.yaml --rank 0 --world-size 2"),
    )
    _add_parameters(parser)
    parser.add_argument(
        "--rank", type=int, help="number of this process from 0; torchrun and SLURM say it"
    )
    parser.add_argument("--world-size", type=int, help="how many processes there are")
    parser.set_defaults(run_command=run_extract, after_stop=GOES_ON)


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="what an extraction takes, before it runs: tokens, bytes, memory, hours",
        **_example("plan --params notebooks/params/paper.yaml --flops 3.5e14"),
    )
    _add_parameters(parser)
    parser.add_argument(
        "--flops",
        type=float,
        help="operations per second that a device keeps up, e.g. 3.5e14 for an H100 in half "
        "precision; without it a sample is run here",
    )
    parser.add_argument("--sample", type=int, default=32, help="images that are looked at")
    parser.add_argument(
        "--workers", type=int, default=8, help="largest number of workers in the table"
    )
    parser.set_defaults(run_command=run_plan)


def _add_models(commands) -> None:
    parser = commands.add_parser(
        "models",
        help="list the checkpoints that have a name here, or describe one",
        **_example("models data/models/tiny-qwen2-vl"),
    )
    parser.add_argument(
        "id",
        nargs="?",
        help="name, hub id, folder or file.py:Class: its stages and layers, without its weights "
        "(but a class loads them)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="load it, and check layers, batches, image tokens, sharing and answers",
    )
    parser.set_defaults(run_command=run_models)


def _add_download(commands) -> None:
    parser = commands.add_parser(
        "download",
        help="fetch a sample of MS COCO, not all of its images",
        **_example("download coco --images 3000"),
    )
    parser.add_argument("what", choices=["coco"], help="a dataset")
    parser.add_argument("--split", default="val2017", help="split of --images")
    parser.add_argument("--images", type=int, default=2000, help="how many images of it")
    parser.add_argument("--train", type=int, default=0, help="how many images of train2017 besides")
    parser.add_argument("--folder", default="data/coco", help="where they go")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--archive", help="another address of the annotation archive")
    parser.set_defaults(run_command=run_download, after_stop=GOES_ON)


def _add_compare(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="two or more runs side by side: which scores differ, and whether a peak moved",
        description="Compare the first run with each of the others, and write a page.\nThe exit "
        "code is 1 where a peak moved further, or a score fell lower, by all of\nits interval.",
        **_example("compare base tuned --peak-may-move 2"),
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="names of runs, the base first")
    parser.add_argument(
        "--models",
        action="append",
        default=[],
        metavar="BASE=OTHER",
        help="a model of the first run and that of the others which it is compared with; without "
        "it those of the same name",
    )
    parser.add_argument("--task", action="append", default=[], help="compare only this task")
    parser.add_argument("--pooling", action="append", default=[], help="compare only this pooling")
    parser.add_argument("--probe", default="logreg", help="kind of probe")
    parser.add_argument(
        "--resamples", type=int, default=2000, help="bootstrap resamples of the test images"
    )
    parser.add_argument(
        "--peak-may-move",
        type=float,
        metavar="N",
        help="exit with 1 where the whole interval of a peak's shift lies more than N layers away",
    )
    parser.add_argument(
        "--score-may-fall",
        type=float,
        metavar="X",
        help="exit with 1 where the whole interval of a score's change at the best layer lies "
        "below -X",
    )
    parser.set_defaults(run_command=run_compare)


def _add_verify(commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="check every byte of the shards below a folder",
        **_example("verify data/activations --remove"),
    )
    parser.add_argument(
        "folder",
        nargs="?",
        default="data/activations",
        help="a path or a URL; default: data/activations",
    )
    parser.add_argument(
        "--remove", action="store_true", help="delete what is damaged: 02_extract makes it again"
    )
    parser.set_defaults(run_command=run_verify)


# ---------------------------------------------------------------------------------------- commands
# Imports are inside: --help answers at once.


def run_notebooks(options: argparse.Namespace) -> int:
    """Execute the notebooks, and say what they wrote and where the results are."""
    from probekit.cli.notebooks import (
        Batch,
        NotebookFailedError,
        find_notebook,
        read_notebook_parameters,
    )
    from probekit.cli.progress import Screen
    from probekit.paths import Home

    with contextlib.closing(Screen(sys.stderr)) as screen:
        screen.show("checking the parameters")
        batch = Batch.plan(options.params, options.overrides, start=options.start, end=options.end)
        failure = ""
        try:
            batch.execute(screen)
        except NotebookFailedError as error:
            failure = str(error)
        finally:
            screen.close()
            print(f"\n{batch.describe()}", flush=True)
            if batch.unfinished:
                number = batch.unfinished.notebook.name[:2]
                command = command_of_run(
                    options.params, options.overrides, start=number, end=options.end
                )
                options.after_stop = f"Go on with\n\n    {command}"
    if failure:
        print(f"\n{failure}\n\nprobekit: failed. {options.after_stop}", file=sys.stderr)
        return 1
    print(f"\nexecuted notebooks: {batch.folder}")
    plots = find_notebook("05_layer_plots")
    if (batch.folder / plots.name).exists():
        run = read_notebook_parameters(plots, options.params, options.overrides)["run"]
        print(f"open {Home.find().figures / str(run) / 'index.html'}")
    return 0


def command_of_run(params: Path, overrides: Sequence[str], *, start: str, end: str = "99") -> str:
    """Return the command that runs notebooks with these parameters from a number on."""
    command = ["python", "-m", "probekit", "run", "--params", str(params)]
    for override in overrides:
        command += ["-p", override]
    command += ["--from", start]
    if end != "99":
        command += ["--to", end]
    return shlex.join(command)


def run_extract(options: argparse.Namespace) -> int:
    """Make this process's share of the shards of a run."""
    from probekit import workflow
    from probekit.cli.notebooks import find_notebook, read_notebook_parameters
    from probekit.cli.planning import extractions
    from probekit.extraction.jobs import plan_job
    from probekit.extraction.launch import Launcher, rank_from_environment

    environment = rank_from_environment()
    launcher = Launcher(
        rank=environment.rank if options.rank is None else options.rank,
        world_size=environment.world_size if options.world_size is None else options.world_size,
    )
    parameters = read_notebook_parameters(
        find_notebook("02_extract"), options.params, options.overrides
    )
    if parameters["engine"] != "local":
        raise ValueError(
            f"engine={parameters['engine']} starts workers by itself, and extract is one that you "
            "start: say python -m probekit run, or engine=local"
        )
    device = _device_of_rank(parameters, environment.local_rank)
    examples = workflow.open_examples(parameters["run"])
    made = 0
    for settings, controls in extractions(parameters):
        tables = workflow.tables_with_controls(examples, controls)
        job = plan_job(settings, tables, device=device, root=parameters["activations_root"])
        made += len(launcher.make_shards(job))
    print(
        f"rank {launcher.rank} of {launcher.world_size} made {made} shards: when all ranks are "
        f"done, go on with {command_of_run(options.params, options.overrides, start='02')}"
    )
    return 0


def _device_of_rank(parameters: dict, local_rank: int) -> str:
    import torch

    from probekit.models.load import best_device

    device = parameters["device"] or best_device()
    if device != "cuda":
        return device
    device = f"cuda:{local_rank % max(1, torch.cuda.device_count())}"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)  # or what is allocated by the way goes to the first GPU
    return device


def run_plan(options: argparse.Namespace) -> int:
    """Print what the models of a run take."""
    from probekit.cli.notebooks import find_notebook, read_notebook_parameters
    from probekit.cli.planning import estimate_run
    from probekit.extraction.planning import describe_estimates
    from probekit.interventions.costs import describe_interventions

    flops = options.flops
    if options.sample < 1 or options.workers < 1 or (flops is not None and flops < 1):
        raise ValueError("--sample, --workers and --flops are numbers from 1")
    names = ("01_build_data", "02_extract", "04_intervene")
    parameters = [
        read_notebook_parameters(find_notebook(name), options.params, options.overrides)
        for name in names
    ]
    estimate = estimate_run(*parameters, sampled_images=options.sample, operations_per_second=flops)
    print(
        describe_estimates(
            estimate.extractions, most_workers=options.workers, operations_per_second=flops
        )
    )
    if estimate.interventions:
        print("\ninterventions (04_intervene), on one device:")
        print(
            describe_interventions(
                estimate.interventions, operations_per_hour=estimate.operations_per_hour
            )
        )
    return 0


def run_models(options: argparse.Namespace) -> int:
    """List the checkpoints that have a name, or describe one."""
    from probekit.models.load import load_skeleton, stage_table
    from probekit.models.presets import list_models

    if not options.id:
        if options.check:
            raise ValueError("--check needs a model, such as my_vlm.py:MyVlm")
        print(list_models())
        return 0
    if options.check:
        return _check_model(options.id)
    vlm, parameters = load_skeleton(options.id)
    millions = parameters / 1e6
    print(f"{options.id}: {vlm.type}, {millions:,.0f} million parameters")
    print(stage_table(vlm).to_string(index=False))
    return 0


def _check_model(model: str) -> int:
    from probekit.models.conformance import FAILED, check_model, describe_findings

    findings = check_model(model)
    print(describe_findings(findings))
    return int((findings.result == FAILED).any())


def run_download(options: argparse.Namespace) -> int:
    """Fetch a sample of MS COCO."""
    from probekit.data.download import ARCHIVE, Server, download_coco

    if options.train and options.split == "train2017":
        raise ValueError(
            "--split train2017 --train are two numbers for the same images: say --images alone"
        )
    wanted = {options.split: options.images}
    if options.train:
        wanted["train2017"] = options.train
    download = download_coco(
        options.folder, wanted, seed=options.seed, server=Server(options.archive or ARCHIVE)
    )
    counts = ", ".join(f"{n:,} images of {split}" for split, n in download.images.items())
    print(f"{counts} in {options.folder}: take it as the dataset of a run")
    for row in download.failed.itertuples():
        print(f"probekit: left out {row.split}/{row.file}: {row.reason}", file=sys.stderr)
    return 1 if len(download.failed) else 0


def run_compare(options: argparse.Namespace) -> int:
    """Compare runs, and hold them against limits."""
    from probekit.report.run_comparison import compare_runs
    from probekit.workflow import open_run

    models = []
    for pair in options.models:
        base_model, equals, model = pair.partition("=")
        if not (base_model and equals and model):
            raise ValueError(f"--models {pair}: name two models, as in --models base=tuned")
        models.append((base_model, model))
    comparison = compare_runs(
        [open_run(run) for run in options.runs],
        models=models,
        tasks=options.task,
        poolings=options.pooling,
        probe=options.probe,
        resamples=options.resamples,
    )
    verdicts = comparison.verdicts(
        peak_may_move=options.peak_may_move, score_may_fall=options.score_may_fall
    )
    print(comparison.table().to_string(index=False))
    for reason in comparison.left_out:
        print(f"probekit: not compared: {reason}", file=sys.stderr)
    for verdict in verdicts:
        print(verdict.line)
    print(f"open {comparison.write_page()}")
    return int(any(verdict.is_failure for verdict in verdicts))


def run_verify(options: argparse.Namespace) -> int:
    """Check every byte of the shards below a folder."""
    from probekit.extraction.verify import (
        describe_faults,
        remove_damaged,
        runs_that_read,
        verify_activations,
    )

    table = verify_activations(options.folder)
    if options.remove:
        print(f"{remove_damaged(table)} damaged shards removed")
    faulty_folders = set(table.folder[table.state != "sound"])
    runs = runs_that_read(faulty_folders)
    print(describe_faults(table, runs=runs, removed=options.remove))
    return int((table.state != "sound").any())


def run_doctor(options: argparse.Namespace) -> int:
    """Print what this machine has, and how to fix what it lacks."""
    from probekit.cli.doctor import report_lines

    print("\n".join(report_lines()))
    return 0
