"""What importing the package does to the process."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_that_wait_do_not_spin_for_long_unless_told_otherwise(given, spins):
    environment = {name: v for name, v in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import fedbe, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment | given, capture_output=True, text=True, check=True
    )
    assert process.stdout.split() == [spins, "False"]


def test_the_tested_set_has_a_version_in_range_of_all_that_fedbe_and_its_tests_need():
    root = Path(__file__).parents[1]
    lines = (root / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {package.name: str(package.specifier).removeprefix("==") for package in pinned}
    assert all(package.specifier.contains(versions[package.name], prereleases=True) for package in pinned)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        needed = Requirement(line)
        assert needed.specifier.contains(versions[needed.name.lower()]), line
