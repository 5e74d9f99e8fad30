"""``python -m probekit``: run the notebooks, or look at the machine."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where a notebook failed, 2 where the input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m probekit", description="What each layer of a VLM knows.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the notebooks with papermill")
    run.add_argument("--params", required=True, type=Path, help="YAML file, e.g. notebooks/params/demo.yaml")
    run.add_argument("-p", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                     help="a notebook's parameter, its value in YAML")
    run.add_argument("--from", dest="start", default="01", metavar="NN", help="first notebook to run, e.g. 03")
    run.add_argument("--to", dest="end", default="99", metavar="NN", help="last notebook to run")
    extract = commands.add_parser("extract", help="make shards of 02_extract, as one of several processes")
    extract.add_argument("--params", required=True, type=Path, help="as for run")
    extract.add_argument("-p", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    extract.add_argument("--rank", type=int, help="number of this process from 0; torchrun and SLURM say it")
    extract.add_argument("--world-size", type=int, help="how many processes there are")
    models = commands.add_parser("models", help="list the checkpoints that have a name here, or describe one")
    models.add_argument("id", nargs="?", help="name, hub id or folder: its stages and layers, from its config alone")
    download = commands.add_parser("download", help="fetch a sample of MS COCO, not all of its images")
    download.add_argument("what", choices=["coco"])
    download.add_argument("--split", default="val2017", help="split of --images")
    download.add_argument("--images", type=int, default=2000, help="how many images of it")
    download.add_argument("--train", type=int, default=0, help="how many images of train2017 besides")
    download.add_argument("--folder", default="data/coco")
    download.add_argument("--seed", type=int, default=0, help="of the sample")
    download.add_argument("--archive", help="another address of the annotation archive")
    plan = commands.add_parser("plan", help="what an extraction takes, before it runs: tokens, bytes, memory, hours")
    plan.add_argument("--params", required=True, type=Path, help="as for run")
    plan.add_argument("-p", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    plan.add_argument("--flops", type=float, help="operations a second that a device keeps up, e.g. 3.5e14 for an H100 "
                                                  "in half precision; without it a sample is run here")
    plan.add_argument("--sample", type=int, default=32, help="images that are looked at")
    plan.add_argument("--workers", type=int, default=8, help="largest number of workers in the table")
    verify = commands.add_parser("verify", help="check every byte of the shards below a folder")
    verify.add_argument("folder", nargs="?", default="data/activations", help="default: data/activations")
    verify.add_argument("--remove", action="store_true", help="delete what is damaged: 02_extract makes it again")
    commands.add_parser("doctor", help="check Python, torch, COCO, model cache, Chrome, widgets")
    options = parser.parse_args(arguments)
    known = {"doctor": _doctor, "download": _download, "extract": _extract, "models": _models, "plan": _plan,
             "run": _run, "verify": _verify}
    try:
        return known[options.command](options)
    except (ArithmeticError, MemoryError, OSError, ValueError) as error:  # what messages with a mend are raised as
        print(f"probekit: {error}", file=sys.stderr)
        return 2


def _download(options: argparse.Namespace) -> int:
    from probekit.data.download import ARCHIVE, Server, download_coco

    if options.train and options.split == "train2017":
        raise ValueError("--split train2017 --train are two numbers for the same images: say --images alone")
    wanted = {options.split: options.images} | ({"train2017": options.train} if options.train else {})
    lost = download_coco(options.folder, wanted, options.seed, Server(options.archive or ARCHIVE))
    there = ", ".join(f"{n:,} images of {split}" for split, n in lost.attrs["there"].items())
    print(f"{there} in {options.folder}: take it as the dataset of a run")
    for row in lost.itertuples():
        print(f"probekit: left out {row.split}/{row.file}: {row.reason}", file=sys.stderr)
    return 1 if len(lost) else 0


def _extract(options: argparse.Namespace) -> int:
    import torch

    from probekit import paths
    from probekit.cli.notebooks import notebooks, parameters_of
    from probekit.extraction import extract
    from probekit.extraction.launch import Launch, place_among
    from probekit.models.load import best_device
    from probekit.tasks import building

    rank, world_size, local = place_among()
    rank = rank if options.rank is None else options.rank
    world_size = world_size if options.world_size is None else options.world_size
    launch = Launch(rank=rank, world_size=world_size)
    book, = (book for book in notebooks() if book.stem == "02_extract")
    parameters = parameters_of(book, options.params, options.overrides)
    if parameters["engine"] != "local":
        raise ValueError(f"engine={parameters['engine']} starts workers of its own, and extract is one that you start: "
                         "say python -m probekit run, or engine=local")
    device = parameters["device"] or best_device()
    parameters["device"] = f"cuda:{local % max(1, torch.cuda.device_count())}" if device == "cuda" else device
    examples = building.load_examples(paths.Home.find().data / "tasks" / parameters["run"])
    made = [len(launch.make(job)) for job in extract.jobs(parameters, examples)]
    same = "".join(f" -p {shlex.quote(one)}" for one in options.overrides)
    print(f"rank {rank} of {world_size} made {sum(made)} shards, and all are there: go on with python -m probekit run "
          f"--params {options.params}{same} --from 02")
    return 0


def _models(options: argparse.Namespace) -> int:
    from probekit.models.load import describe_model
    from probekit.models.presets import list_models

    if not options.id:
        print(list_models())
        return 0
    found = describe_model(options.id)
    print(f"{options.id}: {found.attrs['type']}, {found.attrs['parameters'] / 1e6:,.0f} million parameters\n"
          f"{found.to_string(index=False)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from probekit.cli.doctor import report

    print("\n".join(report()))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from probekit.cli.notebooks import notebooks, parameters_of
    from probekit.extraction import planning

    if min(options.sample, options.workers, 1 if options.flops is None else options.flops) < 1:
        raise ValueError("--sample, --workers and --flops are numbers from 1")
    data, extraction = (parameters_of(book, options.params, options.overrides) for book in notebooks()[:2])
    table = planning.estimates(data, extraction, options.flops, options.sample)
    print(planning.told(table, options.workers, options.flops))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from probekit.extraction import verify

    table = verify.verify(options.folder)
    if options.remove:
        print(f"{verify.remove(table)} damaged shards removed")
    print(verify.told(table, options.remove))
    return int((table.state != "sound").any())


def _run(options: argparse.Namespace) -> int:
    from probekit import paths
    from probekit.cli.notebooks import NotebookFailed, notebooks, parameters_of, run

    try:
        folder = run(options.params, options.overrides, options.start, options.end)
        print(f"executed notebooks: {folder}")
        plots, = (book for book in notebooks() if book.stem == "04_layer_plots")
        if (folder / plots.name).exists():
            name = parameters_of(plots, options.params, options.overrides)["run"]
            print(f"open {paths.Home.find().figures / name / 'index.html'}")
    except NotebookFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
