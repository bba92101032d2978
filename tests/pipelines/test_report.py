"""Reports: what the command says and writes."""

import re
from pathlib import Path

import pytest
from world import Command


def test_the_command_prints_figures_for_the_last_stage(command: Command, tmp_path: Path):
    out = tmp_path / "coverage.png"
    outcome = command("report", "coverage", "cifar10-bcm", "--laws", "paper", "wide", "--out", str(out))
    assert (outcome.code, outcome.err) == (0, "")
    assert "cifar10-bcm, N = 1281" in outcome.out and out.is_file()
    assert re.search(r"^paper +0\.244 +0\.290 +0\.00017$", outcome.out, re.MULTILINE)
    assert re.search(r"^wide +0\.244 ", outcome.out, re.MULTILINE)


def test_a_dry_run_of_a_report_writes_nothing(command: Command, tmp_path: Path):
    outcome = command("report", "coverage", "digits", "--N", "11", "--out", str(tmp_path / "x.png"), "--dry-run")
    assert outcome.code == 0 and "N = 11" in outcome.out and "x.png" in outcome.out
    assert list(tmp_path.glob("*.png")) == []


def test_reports_are_listed(command: Command):
    assert "coverage" in command("report").out
    assert "--laws" in command("report", "coverage", "--help").out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("coverige digits", "Unrecognized options: coverige"),
        ("coverage digitz", "did you mean 'digits'?"),
        ("coverage digits --laws papr", "unknown law 'papr': did you mean 'paper'?"),
        ("coverage digits --N 2", "--N is 2"),
        ("coverage cifar10-ict", "recipe cifar10-ict draws no pairs of times"),
        ("coverage digits --out /dev/null/x.png", "cannot write /dev/null/x.png: "),
        ("coverage digits --out x.tiff", "the name of a picture ends in .png"),
    ],
)
def test_a_wrong_report_is_explained(command: Command, line: str, said: str):
    outcome = command("report", *line.split())
    assert outcome.code == 2
    assert said in " ".join(outcome.err.replace("│", " ").split())
