"""What importing the package does to the process, and what can be found in it."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedbe

ROOT = Path(__file__).parent.parent


def python(code, folder, *, path=ROOT, **environment):
    """What a process of its own prints as JSON, started in an empty folder."""
    kept = {name: v for name, v in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = kept | environment | {"PYTHONPATH": str(path)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_of_a_command_that_wait_do_not_spin_for_long_unless_told_otherwise(given, spins, tmp_path):
    code = (
        "import json, os; from fedbe.cli import main; main(['bench']); print(json.dumps(os.getenv('GOMP_SPINCOUNT')))"
    )
    assert python(code, tmp_path, **given) == spins


def test_importing_the_library_and_reading_a_configuration_leave_the_process_as_it_is(tmp_path):
    code = """
import json, logging, os, sys, warnings
environment = dict(os.environ)
import fedbe
light = not {"torch", "lightning", "jsonargparse"} & set(sys.modules)
import lightning, datasets, transformers
from lightning.fabric.utilities import registry
def state():
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")
    levels = [logging.getLogger(name).level for name in names]
    return [levels, len(warnings.filters), registry.entry_points.__module__, datasets.are_progress_bars_disabled()]
before = state()
import fedbe.callbacks
from fedbe.config.parser import read_run, run_parser, shipped_config
filters = len(warnings.filters)
read_run(run_parser("fit"), [f"--config={shipped_config('quickstart')}"])
after = state()
unchanged = before[:1] + before[2:] == after[:1] + after[2:] and after[1] == filters
import torch
print(json.dumps([light, unchanged, {k: v for k, v in os.environ.items() if environment.get(k) != v}]))
"""
    light, unchanged, environment = python(code, tmp_path)
    assert light and unchanged
    assert "GOMP_SPINCOUNT" not in environment and "OMP_WAIT_POLICY" not in environment


def test_the_list_of_commands_is_shown_without_importing_what_they_need(tmp_path):
    code = """
import json, sys
from fedbe.cli import main
codes = [main([]), main(["--help"]), main(["fly"])]
print(json.dumps([codes, sorted({"torch", "lightning", "jsonargparse", "yaml", "numpy"} & set(sys.modules))]))
"""
    assert python(code, tmp_path) == [[0, 0, 2], []]


@pytest.fixture
def installation(tmp_path):
    """The packages as an installation has them, by the table in `pyproject.toml`."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in tables["packages"]:
        source = ROOT / tables["package-dir"].get(package, package.replace(".", "/"))
        target = tmp_path / "site" / package.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for file in source.glob("*"):
            if file.suffix in (".py", ".yaml"):
                shutil.copy(file, target)
    return tmp_path / "site"


@pytest.mark.parametrize("installed", [False, True])
def test_of_the_folders_beside_the_package_three_are_found_in_it_and_no_other(installed, tmp_path, request):
    path = request.getfixturevalue("installation") if installed else ROOT
    code = """
import importlib.util, json
from importlib.resources import files
import fedbe
names = ["callbacks", "datamodules", "configs", "benchmarks", "tests", "examples", "build", "runs", "fedbe"]
found = {name: importlib.util.find_spec(f"fedbe.{name}") for name in names}
places = {name: list(spec.submodule_search_locations)[0] for name, spec in found.items() if spec}
import fedbe.callbacks.faults, fedbe.datamodules.flower
print(json.dumps([places, fedbe.__path__, (files("fedbe.configs") / "quickstart.yaml").is_file()]))
"""
    places, search, has_configs = python(code, tmp_path, path=path)
    home = path / "fedbe" if installed else ROOT
    assert places == {name: str(home / name) for name in ("callbacks", "datamodules", "configs")}
    assert search == [str(path / "fedbe")] and has_configs


@pytest.mark.parametrize(("old", "new"), sorted(fedbe._MOVED.items()))
def test_a_module_that_has_moved_is_the_same_under_its_old_name(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"{old} is now {new}"):
        assert importlib.import_module(old) is importlib.import_module(new)
    assert importlib.import_module(old).__spec__.name == new


def test_every_package_is_installed():
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    inside = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "fedbe").rglob("__init__.py")}
    assert packages == inside | {"fedbe.callbacks", "fedbe.configs", "fedbe.datamodules"}
