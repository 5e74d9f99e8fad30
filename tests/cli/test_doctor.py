"""The doctor looks at the machine, and survives what is broken."""

from __future__ import annotations

import io
import sys

import pytest

from probekit.cli import doctor
from probekit.cli.doctor import Finding
from probekit.cli.main import main


def test_the_doctor_names_every_check(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for name in doctor.CHECKS:
        assert name in output


def test_what_is_missing_or_broken_comes_with_a_fix(monkeypatch):
    def fail() -> Finding:
        raise ImportError("torchvision does not match")

    missing_chrome = Finding(False, "none", "install Chrome or Chromium")
    monkeypatch.setitem(doctor.CHECKS, "Chrome", lambda: missing_chrome)
    monkeypatch.setitem(doctor.CHECKS, "device", fail)
    lines = doctor.report_lines()
    assert len(lines) == len(doctor.CHECKS)
    assert any("▸ install Chrome or Chromium" in line for line in lines)
    assert any("torchvision does not match" in line and "▸" in line for line in lines)


@pytest.mark.parametrize("has_coco", [True, False])
def test_coco_is_looked_for_in_the_home(data, has_coco):
    if has_coco:
        (data / "coco" / "annotations").mkdir(parents=True)
        (data / "coco" / "annotations" / "captions_val2017.json").write_text("{}")
    finding = doctor.check_coco()
    assert finding.is_fine is has_coco
    assert ("val2017" in finding.text) is has_coco


def test_a_terminal_that_lacks_a_character_gets_another(monkeypatch):
    missing_chrome = Finding(False, "none", "install it")
    monkeypatch.setattr(doctor, "CHECKS", {"Chrome": lambda: missing_chrome})
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["doctor"]) == 0
    terminal.flush()
    assert b"none  ? install it" in terminal.buffer.getvalue()
