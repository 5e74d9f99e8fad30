"""``python -m probekit``: run the notebooks, or look at the machine."""

from __future__ import annotations

import argparse
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
    models = commands.add_parser("models", help="list the checkpoints that have a name here, or describe one")
    models.add_argument("id", nargs="?", help="name, hub id or folder: its stages and layers, from its config alone")
    commands.add_parser("doctor", help="check Python, torch, COCO, model cache, Chrome, widgets")
    options = parser.parse_args(arguments)
    return {"doctor": _doctor, "models": _models, "run": _run}[options.command](options)


def _models(options: argparse.Namespace) -> int:
    from probekit.models import describe
    from probekit.presets import known

    if not options.id:
        print(known())
        return 0
    try:
        found = describe(options.id)
    except (OSError, ValueError) as error:
        print(f"probekit: {error}", file=sys.stderr)
        return 2
    print(f"{options.id}: {found.attrs['type']}, {found.attrs['parameters'] / 1e6:,.0f} million parameters\n"
          f"{found.to_string(index=False)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from probekit.doctor import report

    print("\n".join(report()))
    return 0


def _run(options: argparse.Namespace) -> int:
    from probekit.run import NotebookFailed, run

    try:
        print(f"executed notebooks: {run(options.params, options.overrides, options.start)}")
    except (FileNotFoundError, ValueError) as error:
        print(f"probekit: {error}", file=sys.stderr)
        return 2
    except NotebookFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
