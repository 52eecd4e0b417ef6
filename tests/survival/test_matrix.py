"""A few kills a configuration; the whole matrix is `python -m survival.matrix`, its table in benchmarks/faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from survival.matrix import CHOSEN

TESTS = Path(__file__).parents[1]
KILLS = os.environ.get("FEDBE_KILLS", "0")
PER_PROCESS = 9


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not hasattr(os, "fork") or KILLS == "0", reason="needs fork, and FEDBE_KILLS=20 to ask for it")
@pytest.mark.parametrize("first", range(0, len(CHOSEN), PER_PROCESS))
def test_runs_that_are_killed_and_continued_leave_what_undisturbed_ones_leave(first):
    cases = CHOSEN[first : first + PER_PROCESS]
    command = [sys.executable, "-m", "survival.matrix", "--kills", KILLS, *cases]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
