import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from comparison.runs import dial, write_run

from fedbe.assets import micro_path
from fedbe.cli.main import main
from fedbe.comparison import compare, read_comparison
from fedbe.comparison.execution import DialJob, Job, carry_out, start_process
from fedbe.errors import ConfigError

TEXT = "The number {} comes before the number {}, as everyone who has learned to count will tell you. "
BLOCKS = {"class_path": "fedbe.algorithms.BlockExpansion", "init_args": {"positions": [5]}}


class Ended:
    """A run that ended before it was asked about."""

    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code

    def terminate(self):
        raise AssertionError("it has ended")

    wait = poll


class Starter:
    """Runs jobs in this process; those in `broken` fail."""

    def __init__(self, broken=()):
        self.broken, self.started = broken, []

    def __call__(self, job, parallel):
        self.started.append(str(job))
        if job.arm in self.broken:
            job.folder.mkdir(exist_ok=True)
            (job.folder / "half").write_text("a result")
            return Ended(3)
        return Ended(main(job.arguments))


class Pretender(Starter):
    """Makes up what jobs leave; the runs, or the dials, of arms in `broken` fail.

    Args:
        broken: Names of arms.
        kind: Which of their jobs fail.
        accuracies: Learning rate → final validation accuracy; all the same where it says nothing.
    """

    def __init__(self, broken=(), kind=DialJob, accuracies=None):
        super().__init__(broken)
        self.kind, self.accuracies = kind, accuracies or {}

    def __call__(self, job, parallel):
        if job.arm in self.broken and type(job) is self.kind:
            return super().__call__(job, parallel)
        self.started.append(str(job))
        if not isinstance(job, DialJob):
            write_run(job.folder, accuracy=self.accuracies.get(job.learning_rate, 0.3))
        else:
            points = [(factor, 0.1 + 0.2 * factor, 1 - factor / 2) for factor in (0, *job.factors, 1)]
            file = job.folder / "summary.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"dial": dial(*points)}))
        return Ended(0)


@pytest.fixture
def config(tmp_path):
    rows = [{"text": TEXT.format(i, i + 1) * 4, "speaker": f"s{i % 2}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    corpus = {"class_path": "fedbe.corpora.FilesCorpus", "init_args": {"train": "${folder}/rows.jsonl"}}
    data = {
        "class_path": "fedbe.datamodules.CausalLMDataModule",
        "init_args": {
            "corpus": corpus, "sequence_length": 32, "batch_size": 2,
            "partitioner": {"class_path": "fedbe.datamodules.NaturalPartitioner", "init_args": {"column": "speaker"}},
            "max_validation_sequences": 2, "max_test_sequences": 2,
        },
    }  # fmt: skip
    task = {"corpus": corpus, "sequence_length": 32, "max_sequences": 2}
    return {
        "output": str(tmp_path / "out"), "learning_rates": [0.001, 0.01], "seeds": [0, 1], "tuning_seeds": [0],
        "base": {
            "data": data, "algorithm": BLOCKS, "federation": {"rounds": 1, "cohort": 1}, "logger": "none",
            "client": {"optimizer": {"class_path": "torch.optim.AdamW"}},
            "trainer": {"max_steps": 1, "accelerator": "cpu"},
            "general_tasks": [{"class_path": "fedbe.evaluation.NextTokenTask", "init_args": task}],
        },
        "arms": {"one block": {}, "another": {"algorithm.init_args.positions": [0]}},
    }  # fmt: skip


@pytest.fixture
def read(tmp_path):
    def read(config, **variables):
        path = tmp_path / "comparison.yaml"
        path.write_text(yaml.safe_dump(config))
        return read_comparison(path, variables or {"folder": str(tmp_path)}, {})

    return read


@pytest.mark.parametrize("best", [0.001, 0.01])
def test_two_arms_are_tuned_run_and_compared_and_nothing_runs_twice(best, config, read, tmp_path):
    starter, said, comparison_read = Pretender(accuracies={best: 0.4}), [], read(config)
    comparison, failures = compare(comparison_read, starter, said.append)
    assert not failures and len(starter.started) == len(set(starter.started)) == 2 * 2 + 2
    assert [len(arm.runs) for arm in comparison.arms] == [2, 2]
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    assert len(rows) == 6 and [row["chosen"] for row in rows].count("True") == 4
    assert {float(row["learning_rate"]) for row in rows if row["chosen"] == "True"} == {best}
    again, _ = compare(comparison_read, starter, said.append)
    assert len(starter.started) == 6 and [len(arm.runs) for arm in again.arms] == [2, 2]


def test_changed_runs_are_set_aside_and_run_again_and_interrupted_ones_go_on(config, read, tmp_path):
    config |= {"learning_rates": [0.01], "seeds": [0]}
    compare(read(config), Starter(), list.append.__get__([]))
    runs = tmp_path / "out" / "runs"
    interrupted = runs / "one_block-0.01-0"
    (interrupted / "summary.json").unlink()
    lines = (interrupted / "metrics.jsonl").read_text()
    config["arms"]["another"] = {"algorithm.init_args.positions": [1]}
    starter = Starter()
    compare(read(config), starter, list.append.__get__([]))
    assert len(starter.started) == 2
    aside = runs / "set_aside"
    assert not (aside / "one_block-0.01-0").exists()
    assert (interrupted / "metrics.jsonl").read_text() == lines  # measured times included: no round was run again
    assert (aside / "another-0.01-0" / "summary.json").exists()
    assert (interrupted / "summary.json").exists()
    before = yaml.safe_load((aside / "another-0.01-0.yaml").read_text())
    assert before["algorithm"]["init_args"]["positions"] == [0]


def test_an_interrupted_run_with_a_damaged_checkpoint_is_set_aside_and_started_over(config, read, tmp_path):
    config |= {"learning_rates": [0.01], "seeds": [0]}
    compare(read(config), Starter(), list.append.__get__([]))
    run = tmp_path / "out" / "runs" / "one_block-0.01-0"
    (run / "summary.json").unlink()
    newest = max((run / "checkpoints").glob("round_*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-9])
    _, failures = compare(read(config), Starter(), list.append.__get__([]))
    assert not failures and (run / "summary.json").exists()
    assert (run.parent / "set_aside" / run.name / "checkpoints" / newest.name).exists()


def test_a_failing_arm_does_not_end_the_rest_and_is_tried_again(config, read, tmp_path):
    config |= {"seeds": [0]}
    comparison, failures = compare(read(config), Pretender(broken=["one block"], kind=Job), list.append.__get__([]))
    assert [arm.name for arm in comparison.arms] == ["another"]
    assert [(failure.job.learning_rate, failure.code) for failure in failures] == [(0.001, 3), (0.01, 3)]
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "exit code 3: one block" in page and "runs/one_block-0.01-0.log" in page
    starter = Pretender()
    _, failures = compare(read(config), starter, list.append.__get__([]))
    assert not failures and len(starter.started) == 2


def test_the_dial_of_final_runs_is_measured_where_there_is_one_and_not_twice(config, read, tmp_path):
    local = {"class_path": "fedbe.algorithms.LocalOnly", "init_args": {"algorithm": BLOCKS}}
    config |= {"learning_rates": [0.01], "seeds": [0], "dial": [0.5], "arms": {"a": {}, "b": {"algorithm": local}}}
    starter, said = Pretender(), []
    comparison, failures = compare(read(config), starter, said.append)
    assert not failures and len(starter.started) == 3
    assert starter.started[-1] == "dial of a, learning rate 0.01, seed 0"
    assert [[point.factor for point in arm.runs[0].dial] for arm in comparison.arms] == [[0, 0.5, 1], []]
    a, b = csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines())
    assert a["dial_0_retention_mean"] == "1.0" and b["dial_0.5_validation_accuracy"] == ""
    assert float(a["dial_0.5_retention_mean"]) == 0.75
    compare(read(config), starter, said.append)
    assert len(starter.started) == 3 and "1 of 1 dials are done already" in said
    compare(read(config | {"dial": [0.5, 0.75]}), starter, said.append)
    assert len(starter.started) == 4


def test_a_dial_that_cannot_be_measured_does_not_end_the_rest(config, read, tmp_path):
    config |= {"learning_rates": [0.01], "seeds": [0], "arms": {"a": {}, "b": {}}, "dial": [0.5]}
    comparison, failures = compare(read(config), Pretender(broken=["a"]), list.append.__get__([]))
    assert [str(failure.job) for failure in failures] == ["dial of a, learning rate 0.01, seed 0"]
    assert [len(arm.runs[0].dial) for arm in comparison.arms] == [0, 3]
    assert "runs/a-0.01-0.dial.log" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"federation": {"rounds": 9}}, "arms.another.federation.rounds = 9"),
        ({"trainer.max_steps": 9}, "arms.another.trainer.max_steps = 9"),
        ({"model": {"name": "other"}}, "arms.another.model.name = 'other'"),
        ({"client.optimizer.init_args.lr": 0.1}, "arms.another.client.optimizer.init_args.lr = 0.1"),
        ({"learning_rates": [0.1]}, "arms.another.learning_rates = [0.1]"),
        ({"algorithm.init_args.positions": [99]}, "arms.another.algorithm.init_args.positions"),
    ],
)
def test_unequal_budgets_and_arms_that_cannot_run_are_refused_with_the_key(config, read, tmp_path, change, expected):
    config["arms"]["another"] = change
    with pytest.raises(ConfigError, match=re.escape(expected)):
        read(config)
    assert not (tmp_path / "out").exists()


def test_what_is_allowed_may_differ_and_is_said(config, read, tmp_path):
    config |= {"allow": ["trainer.max_steps"], "learning_rates": [0.01], "seeds": [0]}
    config["arms"]["another"] = {"trainer": {"max_steps": 2}}
    starter = Pretender()
    compare(read(config), starter, list.append.__get__([]))
    assert "`trainer.max_steps`" in (tmp_path / "out" / "comparison.md").read_text()


def test_all_mistakes_are_reported_at_once(config, read):
    config |= {"seeds": [], "parallel": 0, "baseline": "nobody", "target": 2.0, "matched_level": 0, "dial": [1.5]}
    with pytest.raises(ConfigError) as caught:
        read(config)
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"seeds", "parallel", "baseline", "target", "matched_level", "dial"}


def test_a_dial_without_general_tasks_is_refused(config, read):
    del config["base"]["general_tasks"]
    with pytest.raises(ConfigError, match="general tasks"):
        read(config | {"dial": [0.5]})


def test_keys_that_do_not_exist_and_open_places_are_reported(config, read):
    config |= {"learning_rate": [1]}
    with pytest.raises(ConfigError) as caught:
        read(config, other="x")
    assert {problem.key for problem in caught.value.problems} == {"learning_rate", "folder", "--set other"}


def test_a_mistake_of_the_base_is_reported_once(config, read):
    config["base"]["sed"] = 3
    with pytest.raises(ConfigError) as caught:
        read(config)
    assert [problem.key for problem in caught.value.problems] == ["base.sed"]


def test_a_base_of_its_own_file_is_found_beside_the_comparison(config, read, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config["base"]))
    expected = read(config)
    assert read(config | {"base": "base.yaml"}) == expected


def test_a_folder_that_holds_something_else_is_left_alone(config, read, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="output"):
        compare(read(config), Starter())


def test_the_command_runs_each_run_in_a_process_of_its_own(config, tmp_path, capfd):
    config |= {"learning_rates": [0.01], "seeds": [0], "arms": {"one block": {}}, "dial": [0.5]}
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["compare", f"--config={path}", "--set", f"folder={tmp_path}"]) == 0
    output = capfd.readouterr().out
    assert "[1/1] one block, learning rate 0.01, seed 0" in output and "comparison.md" in output
    runs = tmp_path / "out" / "runs"
    assert "kept" in (runs / "one_block-0.01-0.log").read_text()
    points = json.loads((runs / "one_block-0.01-0" / "summary.json").read_text())["dial"]["points"]
    assert [point["factor"] for point in points] == [0, 0.5, 1]


def test_the_command_wants_a_file_or_runs(capsys):
    assert main(["compare"]) == 2 and main(["compare", "runs/a", "--config=b.yaml"]) == 2
    assert "either --config FILE or folders" in capsys.readouterr().err


def sleeper(seconds, log):
    def start(job, parallel):
        lines = f"import time; time.sleep({seconds})"
        process = subprocess.Popen([sys.executable, "-c", lines])
        log.append(process)
        return process

    return start


def jobs(tmp_path, count):
    return [Job("a", 0.1, seed, {"seed": seed}, tmp_path / "runs" / f"a-{seed}") for seed in range(count)]


def test_no_more_run_at_a_time_than_asked(tmp_path):
    alive, most, processes = [], [], []

    def start(job, parallel):
        alive[:] = [process for process in processes if process.poll() is None]
        most.append(len(alive) + 1)
        return sleeper(0.1, processes)(job, parallel)

    failures = carry_out(jobs(tmp_path, 4), 2, start, lambda line: None)
    assert max(most) == 2 and len(failures) == 4  # they leave no summary


def test_an_interrupt_ends_the_runs_under_way(tmp_path):
    processes, began = [], time.perf_counter()

    def start(job, parallel):
        if processes:
            raise KeyboardInterrupt
        return sleeper(60, processes)(job, parallel)

    with pytest.raises(KeyboardInterrupt):
        carry_out(jobs(tmp_path, 2), 2, start, lambda line: None)
    assert processes[0].poll() is not None and time.perf_counter() - began < 30


def test_runs_side_by_side_get_one_thread_each(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: seen.update(options))
    (job,) = jobs(tmp_path, 1)
    job.folder.parent.mkdir()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for parallel, threads in ((1, "7"), (2, "1")):
        start_process(job, parallel)
        assert seen["env"]["OMP_NUM_THREADS"] == threads


def test_the_shipped_comparison_can_be_run(tmp_path):
    shipped = Path(__file__).parents[2] / "benchmarks" / "baselines" / "baselines.yaml"
    for split in ("train", "validation", "test"):
        rows = [{"text": TEXT.format(i, i + 1), "speaker": f"s{i % 10}"} for i in range(40)]
        (tmp_path / f"{split}.jsonl.gz").write_bytes(packed(rows))
    variables = {"model": str(micro_path()), "shakespeare": str(tmp_path), "tinystories": f"{tmp_path}/test.jsonl.gz"}
    config = read_comparison(shipped, variables, {})
    assert len(config.arms) >= 14 and {len(config.rates(arm)) for arm in config.arms} == {3}


def packed(rows):
    import gzip

    return gzip.compress("\n".join(json.dumps(row) for row in rows).encode())
