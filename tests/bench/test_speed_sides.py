import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "speed"


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.parametrize("prefix", [False, True])
def test_fedbe_and_the_bare_loop_come_to_the_same_tensors(tmp_path, prefix):
    from case import Case
    from framework import measure
    from prepare import prepare
    from report import report

    kind = {"kind": "blocks", "positions": (1,)} if prefix else {"kind": "lora", "rank": 2}
    case = Case("tiny", clients=2, rounds=2, steps=2, batch_size=2, length=8, hidden=64, layers=2, **kind)
    prepare(case, tmp_path / "case")
    result = measure(case, tmp_path / "case", ["paired", *(["prefix"] if prefix else [])])
    assert result["difference"] < 1e-6
    assert all(0 < r["steps"] < r["bare"] < 60 for r in result["rounds"])
    lines = tmp_path / "results.jsonl"
    lines.write_text(json.dumps({"case": vars(case), "side": "fedbe", **result, "startup": 1.0}))
    assert "bare (fedbe)" in report(lines)


CHILD = "x = bytearray(64 * 2**20); import time; time.sleep(0.8)"
PARENT = f"""
import subprocess, sys, time
subprocess.run([sys.executable, "-c", {CHILD!r}], start_new_session=True)
print('{{"began": ' + str(time.monotonic()) + '}}')
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")
def test_memory_of_the_processes_that_a_side_starts_is_counted():
    from processes import run_measurement

    result = run_measurement([sys.executable, "-c", PARENT], {}, 0.05, 60)
    assert result["processes"] == 2 and 64 * 2**20 < result["peak_bytes"] < 128 * 2**20
    assert result["startup"] > 0.8


def test_a_side_that_fails_says_why():
    from processes import run_measurement

    with pytest.raises(RuntimeError, match="no such luck"):
        run_measurement([sys.executable, "-c", "raise SystemExit('no such luck')"], {}, None, 60)
