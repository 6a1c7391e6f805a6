"""Documented commands as tests/acceptance/documented_commands.py runs them: the files that they name are there."""

from __future__ import annotations

import re

from tests.acceptance.documented_commands import ROOT, commands, unused

MADE = ("my_rules.py", "results/", "hosts")  # by the program, or by commands before


def test_what_stands_in_for_a_readers_files_is_still_asked_for():
    assert unused() == []


def test_files_of_documented_commands_are_there():
    run = [command for command in commands() if not command.why_not]
    assert len(run) > 30
    for command in run:
        for name in re.findall(r"(?<![\w.])[\w./-]+\.(?:py|yaml|sh|json)\b", command.run):
            assert name.startswith(MADE) or (ROOT / name).is_file(), f"{command.page}: {command.written}"
