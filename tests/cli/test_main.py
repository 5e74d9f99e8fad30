"""The commands' help: quick, and with an example of each."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

import pytest

from probekit.cli.main import make_parser

resource = pytest.importorskip("resource", reason="Windows counts no seconds of its children")
COMMANDS = next(
    action.choices
    for action in make_parser()._actions
    if isinstance(action, argparse._SubParsersAction)
)
each_command = pytest.mark.parametrize("command", COMMANDS)


@each_command
def test_the_help_of_a_command_ends_with_an_example_that_can_be_run(command):
    lines = COMMANDS[command].format_help().rstrip().splitlines()
    example = lines[lines.index("example:") + 1 :]
    assert len(example) == 1
    arguments = shlex.split(example[0].strip().removeprefix("python -m probekit "))
    assert make_parser().parse_args(arguments).command == command


@each_command
def test_every_option_of_a_command_is_explained(command):
    assert all(action.help for action in COMMANDS[command]._actions)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_answers_at_once(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = [sys.executable, "-m", "probekit", *([command] if command else []), "--help"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stdout.startswith("usage: python -m probekit")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
