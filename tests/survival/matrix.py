"""Runs killed at random instants and continued, one configuration after another, beside undisturbed ones.

    PYTHONPATH=tests python -m survival.matrix --kills 20 [--table FILE] [CASE …]

Each run is a fork of this process, which has imported everything, and calls `fedbe fit … --ckpt_path last` until it
comes to its end. Every part of what it leaves must equal what the undisturbed run leaves: the tensors of its model and
of its checkpoints, `metrics.jsonl`, `summary.json`, the files of its logger; measured times and memory aside.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from golden.cases import CASES, of, toy
from golden.runs import make_stand_ins
from safetensors.torch import load_file

from fedbe.cli import main

MEASURED = {
    "wall_seconds", "evaluation_seconds", "simulated_seconds", "client_seconds", "peak_rss_bytes", "versions",
    "convergence", "seconds", "note",
}  # fmt: skip
EACH_CLIENT = of("callbacks.CheckpointCallback", each_client=True)
OWN = {
    "kept/every_client_of_a_round": toy(callbacks=[EACH_CLIENT], federation__rounds=3),
    "kept/every_client_of_a_personalised_round": toy(
        algorithm=of("algorithms.FedSALoRA", rank=4), callbacks=[EACH_CLIENT], federation__rounds=3
    ),
    "kept/every_client_beside_workers": toy(engine="workers", callbacks=[EACH_CLIENT]),
}
"""Runs that only matter here: what one client has sent is on disk before the round is over."""

CHOSEN = [
    "algorithm/block_expansion", "algorithm/fedbe", "algorithm/fedavg", "algorithm/fedit", "algorithm/ffa_lora",
    "algorithm/flora", "algorithm/fedex_lora", "algorithm/fed_talora", "algorithm/fedsa_lora", "algorithm/slora",
    "algorithm/gated", "algorithm/local_only", "algorithm/centralized", "algorithm/unfreeze",
    "ranks/hetlora_that_prunes", "ranks/flexlora_of_mixed_ranks", "ranks/fedex_lora_of_a_partial_cohort",
    "averaging/private_mean", "averaging/krum", "averaging/trimmed_mean", "averaging/coordinate_median",
    "averaging/norm_clipping", "server/fedadam", "server/fedavgm", "server/fedyogi", "server/fedadagrad",
    "objective/scaffold", "objective/fedprox", "objective/anchor", "fedbe/fedbe_grows_with_a_clock_and_moments",
    "fedbe/fedbe_by_losses", "fedbe/fedbe_grows_with_control_variates", "gate/gated_fedbe_with_a_clock",
    "control/fedsa_lora_of_a_classifier", "engine/workers_blocks", "engine/one_pass_blocks",
    "engine/in_process_high_block_on_a_prefix", "mishap/rounds_that_are_taken_back", "mishap/the_best_round_is_kept",
    "mishap/clients_that_fail", "training/general_tasks", *OWN,
]  # fmt: skip
"""Configurations that together hold every algorithm, averaging rule, server optimizer, objective and engine."""


@dataclass
class Result:
    """What came of one configuration.

    Attributes:
        case: Its name.
        kills: How many times one of its processes was killed while it ran.
        runs: How many runs came to their end.
        seconds: How long the undisturbed run takes.
        differs: What of a killed run differs from the undisturbed one; empty if nothing does.
    """

    case: str
    kills: int
    runs: int
    seconds: float
    differs: list[str]


def words(case: str, stand_ins: Path, folder: Path) -> list[str]:
    given = OWN[case] if case in OWN else CASES[case]
    given = [word.replace("STAND_INS", str(stand_ins)) for word in given]
    return ["fit", *given, f"--output={folder}", "--logger=csv", "--ckpt_path=last"]


def forked(arguments: list[str], log: Path) -> int:
    """Return the id of a new process that begins or continues a run."""
    process = os.fork()
    if process:
        return process
    os.setsid()  # its own workers end with it
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        with patch("matplotlib.figure.Figure.savefig"):
            code = main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)


def left(folder: Path) -> dict[str, object]:
    """Return all that a run leaves, as values that can be compared."""
    found: dict[str, object] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[f"metrics.jsonl/{record['round']}"] = without_measured(record)
    found["metrics.jsonl"] = len((folder / "metrics.jsonl").read_text().splitlines())
    found["summary.json"] = without_measured(json.loads((folder / "summary.json").read_text()))
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.relative_to(folder)}/{name}"] = tensor.float().tolist()
    for path in sorted((folder / "csv").rglob("*.csv")):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        kept = [place for place, name in enumerate(rows[0]) if not any(part in name for part in MEASURED)]
        found[str(path.relative_to(folder))] = [[row[place] for place in kept] for row in rows]
    return found


def without_measured(value):
    if isinstance(value, dict):
        return {name: without_measured(inner) for name, inner in value.items() if name not in MEASURED}
    return [without_measured(inner) for inner in value] if isinstance(value, list) else value


def tried(case: str, kills: int, stand_ins: Path, folder: Path) -> Result:
    """Kill runs of a configuration until there were enough kills, and compare each with an undisturbed one."""
    chance = random.Random(case)
    undisturbed, started = folder / "undisturbed", time.monotonic()
    if os.waitpid(forked(words(case, stand_ins, undisturbed), folder / "undisturbed.log"), 0)[1]:
        return Result(
            case, 0, 0, 0.0, ["the undisturbed run failed: " + (folder / "undisturbed.log").read_text()[-800:]]
        )
    seconds = time.monotonic() - started
    expected = left(undisturbed)
    result = Result(case, 0, 0, seconds, [])
    while result.kills < kills and not result.differs:
        run, log = folder / f"run{result.runs}", folder / f"run{result.runs}.log"
        in_this_run = 0
        while True:
            process = forked(words(case, stand_ins, run), log)
            if in_this_run < 6 and result.kills < kills:  # later kills hit what is left of the run
                time.sleep(chance.uniform(0.02, seconds))
                os.kill(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
            if os.WIFSIGNALED(status):
                result.kills += 1
                in_this_run += 1
            elif os.WEXITSTATUS(status):
                result.differs.append(f"could not be continued: {log.read_text()[-800:]}")
                break
            else:
                found = left(run)
                result.differs += sorted(
                    name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
                )
                break
        result.runs += 1
    return result


def table(results: list[Result]) -> str:
    """Return the results as a table in Markdown."""
    lines = ["| configuration | kills | runs | s, undisturbed | equal in all that is left |", "|---|--:|--:|--:|---|"]
    for result in results:
        equal = "yes" if not result.differs else f"no: {result.differs[0][:80]} and {len(result.differs) - 1} more"
        lines.append(f"| `{result.case}` | {result.kills} | {result.runs} | {result.seconds:.1f} | {equal} |")
    total = sum(result.kills for result in results)
    lines.append(f"| {len(results)} configurations | {total} | {sum(r.runs for r in results)} | | |")
    return "\n".join(lines)


def run_matrix(cases: list[str], kills: int) -> list[Result]:
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as place:
        stand_ins = Path(place) / "stand_ins"
        make_stand_ins(stand_ins)
        for case in cases:
            folder = Path(place) / case.replace("/", "_")
            folder.mkdir()
            results.append(tried(case, kills, stand_ins, folder))
            print(table(results[-1:]).splitlines()[2], flush=True)
    return results


def command() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--table", type=Path)
    parser.add_argument("cases", nargs="*", default=CHOSEN)
    options = parser.parse_args()
    results = run_matrix(options.cases, options.kills)
    if options.table:
        options.table.write_text(table(results) + "\n")
    failed = [result for result in results if result.differs]
    for result in failed:
        print(f"{result.case}: {result.differs[:5]}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    command()
