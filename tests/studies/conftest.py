"""The command line as a person runs it: in a process of its own, with the toy study of `own/` among the papers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OWN = Path(__file__).parent / "own"


@pytest.fixture
def lathe(tmp_path):
    """Runs `lathe ARGUMENTS` in an empty folder; returns the finished process with its text."""
    environment = {**os.environ, "LATHE_STUDIES": str(OWN), "COLUMNS": "200", "NO_COLOR": "1"}

    def call(*arguments: str, code: int | None = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "lathe.cli", *arguments],
            cwd=tmp_path,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert "Traceback" not in done.stderr + done.stdout, done.stderr
        if code is not None:
            assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
        return done

    call.folder, call.environment = tmp_path, environment
    return call
