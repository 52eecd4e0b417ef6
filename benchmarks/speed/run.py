"""Measures fedbe beside a bare PyTorch loop and Flower's simulation, and prints what came of it.

    python benchmarks/speed/run.py --flower FLOWER_ENVIRONMENT/bin/python

Each measurement is a process of its own; repeats go through all of them in turn. Results are lines of a file: what is
there already is not measured again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from case import Case
from prepare import prepare
from processes import run_measurement
from report import report

HERE = Path(__file__).parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
}
SIDES = {
    "bare": ("bare.py",),
    "fedbe": ("framework.py",),
    "fedbe beside bare": ("framework.py", "paired"),
    "fedbe, side by side": ("framework.py", "side-by-side"),
    "fedbe, prefix, beside bare": ("framework.py", "paired", "prefix"),
    "Flower": ("flower.py",),
    "Flower, model kept": ("flower.py", "kept"),
    "Flower, model kept, side by side": ("flower.py", "kept", "side-by-side"),
}
FLOWER = tuple(side for side in SIDES if side.startswith("Flower"))
ADAPTERS = Case("adapters, 10 clients", steps=10, rounds=7)
BLOCKS = Case("upper blocks, 10 clients", kind="blocks", layers=12, positions=(8, 10), steps=6, rounds=7)
LARGE = Case("64 MB, 10 clients", hidden=512, layers=8, rank=203, steps=2, length=32, rounds=2)


@dataclass(frozen=True)
class Measurement:
    """One side on one case.

    Attributes:
        case: The case.
        side: A key of `SIDES`.
        memory: Whether memory is sampled and not time measured.
    """

    case: Case
    side: str
    memory: bool = False


def plan(quick: bool) -> list[Measurement]:
    """Return everything to measure once."""
    hundred = replace(ADAPTERS, name="adapters, 100 clients", clients=100, steps=4, rounds=3)
    timed = [Measurement(ADAPTERS, side) for side in ("bare", "fedbe beside bare", "fedbe, side by side", *FLOWER)]
    timed += [Measurement(hundred, side) for side in ("fedbe beside bare", *FLOWER[1:])]
    timed += [Measurement(BLOCKS, side) for side in ("fedbe beside bare", "fedbe, prefix, beside bare")]
    sampled = [Measurement(LARGE, side, memory=True) for side in ("bare", "fedbe", "fedbe, side by side", *FLOWER)]
    whole = [*timed, *sampled]
    return [replace(m, case=smaller(m.case)) for m in whole] if quick else whole


def smaller(case: Case) -> Case:
    """Return a case that is over soon."""
    clients = 20 if case.clients > 10 else 3
    small = {"clients": clients, "rounds": 3, "steps": 2, "hidden": 128, "rank": min(case.rank, 64)}
    return replace(case, name=f"quick: {case.name}", **small)


def measure(measurement: Measurement, folder: Path, flower: Path | None, sample_seconds: float) -> dict[str, Any]:
    """Run one measurement in a process of its own, on a case that has been prepared."""
    program, *options = SIDES[measurement.side]
    python = str(flower) if program == "flower.py" else sys.executable
    threads = str(measurement.case.threads)
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [python, str(HERE / program), str(folder), *options]
    return run_measurement(command, environment, sample_seconds if measurement.memory else None, 900)


def remaining(results: Path, repeats: int, quick: bool, flower: bool) -> Iterator[tuple[int, Measurement]]:
    """Yield what is not among the results yet, each repeat through all measurements in turn."""
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(line["repeat"], line["case"]["name"], line["side"]) for line in lines}
    for repeat in range(repeats):
        for measurement in plan(quick):
            key = (repeat, measurement.case.name, measurement.side)
            if key not in done and (flower or measurement.side not in FLOWER):
                yield repeat, measurement


def main() -> None:
    """Measure what is left, and print a table of all there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flower", type=Path, help="Python of the environment with Flower; leave out to go without")
    parser.add_argument("--results", type=Path, default=Path("runs/speed.jsonl"), help="added to, if it is there")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small cases, to see that everything runs")
    parser.add_argument("--sample-seconds", type=float, default=0.1, help="between samples of the memory")
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedbe-speed-") as folder:
        for repeat, measurement in remaining(options.results, options.repeats, options.quick, bool(options.flower)):
            case = Path(folder) / measurement.case.name
            if not case.exists():
                prepare(measurement.case, case)
            started = time.monotonic()
            result = measure(measurement, case, options.flower, options.sample_seconds)
            line = {"repeat": repeat, "case": asdict(measurement.case), "side": measurement.side, **result}
            with options.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            seconds = time.monotonic() - started
            print(
                f"{repeat + 1}/{options.repeats}  {line['case']['name']:<36}{line['side']:<36}{seconds:6.1f} s",
                flush=True,
            )
    print(report(options.results))


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main()
