"""Ctrl-C and SIGTERM while a client trains, by the command line."""

import json
import signal

import lightning as L
import pytest
import yaml

from fedbe.cli.main import main

INTERRUPTS = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interrupt(L.Callback):
    """Sends this process a signal at one of its steps, counted over all clients."""

    taken = 0

    def __init__(self, number: int, steps: list[int]):
        self.number, self.steps = number, steps

    def on_train_batch_end(self, trainer, module, *_):
        Interrupt.taken += 1
        if Interrupt.taken in self.steps:
            signal.raise_signal(self.number)


@pytest.fixture(autouse=True)
def counted_from_zero():
    """A signal that nobody handles fails the test and does not end it; steps are counted for each test."""

    def unhandled(number, frame):
        pytest.fail(f"{signal.Signals(number).name} was not handled")

    before = {number: signal.signal(number, unhandled) for number in INTERRUPTS}
    Interrupt.taken = 0
    yield
    assert all(signal.getsignal(number) is unhandled for number in INTERRUPTS)
    for number, handler in before.items():
        signal.signal(number, handler)


def run(tmp_path, name, number, steps, *arguments, each_client=False):
    """Run three clients of two steps for two rounds; return the exit code and what the run has recorded."""
    interrupt = {"class_path": "test_interrupts.Interrupt", "init_args": {"number": int(number), "steps": steps}}
    config = {
        "data": {"class_path": "toy.ToyData", "init_args": {"clients": 3}},
        "algorithm": {"class_path": "fedbe.algorithms.BlockExpansion", "init_args": {"positions": [2]}},
        "federation": {"rounds": 2},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "callbacks": [interrupt]},
        "callbacks": [
            {"class_path": "fedbe.callbacks.CheckpointCallback", "init_args": {"each_client": each_client}},
        ],
        "logger": "none",
    }
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    folder = tmp_path / name
    code = main(["fit", f"--config={tmp_path / name}.yaml", f"--output={folder}", *arguments])
    return code, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", INTERRUPTS)
@pytest.mark.parametrize("each_client", [False, True])
def test_the_first_signal_lets_the_client_or_the_round_end_and_says_how_to_go_on(number, each_client, tmp_path, capsys):
    code, records = run(tmp_path, "run", number, [3], each_client=each_client)
    said = capsys.readouterr().err
    assert code == INTERRUPTS[number]
    assert f"ends after this {'client' if each_client else 'round'}; Ctrl-C again to end at once" in said
    assert f"the run in {tmp_path / 'run'} goes on with --ckpt_path last" in said
    assert len(records) == (1 if each_client else 2) and Interrupt.taken == (4 if each_client else 6)
    Interrupt.taken = 6  # so that no step is interrupted
    code, records = run(tmp_path, "run", number, [3], "--ckpt_path=last", each_client=each_client)
    assert code == 0 and Interrupt.taken == (14 if each_client else 12)
    _, whole = run(tmp_path, "whole", number, [], each_client=each_client)
    assert [r["downstream"] for r in records] == [r["downstream"] for r in whole] and len(whole) == 3


@pytest.mark.parametrize("number", INTERRUPTS)
def test_the_second_signal_ends_the_run_at_once(number, tmp_path, capsys):
    code, records = run(tmp_path, "run", number, [3, 4])
    assert code == INTERRUPTS[number] and Interrupt.taken == 4
    assert len(records) == 1 and "goes on with --ckpt_path last" in capsys.readouterr().err
