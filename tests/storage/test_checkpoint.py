import errno
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from command import run, small_config
from toy import resumed, tiny_llama, toy_loop

import fedbe.storage.checkpoint
from fedbe.callbacks import CheckpointCallback
from fedbe.errors import ConfigError, FedBEError
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.interrupts import stopping_on_interrupt
from fedbe.storage.checkpoint import FORMAT, Checkpoints, load_tensors, read_checkpoint, save_tensors
from fedbe.storage.files import replacing
from fedbe.storage.metrics_file import MetricsFile


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_and_state_come_back_to_the_bit(tmp_path, dtype):
    tensors = {"a": (torch.randn(3, 4) * 100).to(dtype).T, "b/c": torch.tensor(1).to(dtype), "d": torch.zeros(0)}
    save_tensors(tmp_path / "x", tensors, {"text": "ü", "number": 1.5, "list": [None, True]})
    loaded, state = load_tensors(tmp_path / "x")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)
    assert state == {"text": "ü", "number": 1.5, "list": [None, True]}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("damage", ["cut", "byte", "state", "foreign", "empty"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for number in range(3):
        path = checkpoints.save(number, {"a": torch.arange(100.0)}, {"round": number})
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-7]
    elif damage == "byte":
        content[-50] ^= 1
    elif damage == "state":
        content = content.replace(b'\\"round\\": 2', b'\\"round\\": 3')
    elif damage == "foreign":
        from safetensors.torch import save

        content = save({"a": torch.zeros(2)})
    else:
        content = b""
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot be used: .*the one before it is .*round_000001\.safetensors"):
        read_checkpoint(path)


def test_only_the_newest_are_kept_in_the_order_of_rounds(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in (8, 9, 10, 11):
        checkpoints.save(number, {}, {})
    assert [path.name for path in checkpoints.newest_first()] == [
        "round_000011.safetensors",
        "round_000010.safetensors",
    ]


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, monkeypatch):
    loop = toy_loop(tmp_path / "run", rounds=3, callbacks=[CheckpointCallback()])
    original = fedbe.storage.checkpoint.save_file

    def full(tensors, path, metadata):
        if loop.progress.completed == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, metadata)

    monkeypatch.setattr(fedbe.storage.checkpoint, "save_file", full)
    with pytest.raises(FedBEError, match=r"round 2 cannot be written, the disk is full; .*round_000001.* is intact"):
        loop.run()
    names = sorted(path.name for path in loop.folder.checkpoints.iterdir())
    assert names == ["round_000000.safetensors", "round_000001.safetensors"]
    monkeypatch.undo()
    again = resumed(toy_loop(tmp_path / "run", rounds=3, callbacks=[CheckpointCallback()]))
    assert again.progress.completed == 1
    again.advance()
    assert [record["round"] for record in again.history] == [0, 1, 2]


@pytest.mark.slow
def test_a_file_system_that_is_full_indeed_is_told_as_that(tmp_path):
    program = (
        "import resource, signal, torch, pathlib; from fedbe.storage.checkpoint import Checkpoints\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"c = Checkpoints(pathlib.Path({str(tmp_path)!r})); "
        f"c.save(1, {{'a': torch.zeros(10)}}, {{'format': {FORMAT}}})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "c.save(2, {'a': torch.zeros(100_000)}, {})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "StorageError: the checkpoint of round 2 cannot be written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["round_000001.safetensors"]
    read_checkpoint(tmp_path / "round_000001.safetensors")


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    loop = toy_loop(tmp_path / "run", rounds=1, callbacks=[CheckpointCallback()])
    loop.run()
    other = tiny_llama()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 0.1
    with pytest.raises(ConfigError, match="belongs to another base model"):
        resumed(toy_loop(tmp_path / "run", rounds=2, model=other, callbacks=[CheckpointCallback()]))


def test_metrics_that_were_changed_are_refused(tmp_path):
    loop = toy_loop(tmp_path / "run", rounds=1, callbacks=[CheckpointCallback()])
    loop.run()
    loop.folder.metrics.write_text(loop.folder.metrics.read_text().replace('"round": 1', '"round": 7'))
    with pytest.raises(ConfigError, match="not what the checkpoint's run had written"):
        resumed(toy_loop(tmp_path / "run", rounds=2, callbacks=[CheckpointCallback()]))


def test_what_was_appended_after_a_position_is_dropped_torn_lines_too(tmp_path):
    metrics = MetricsFile(tmp_path / "m")
    metrics.append({"round": 0})
    position = metrics.position
    metrics.append({"round": 1})
    with (tmp_path / "m").open("a") as file:
        file.write('{"rou')
    again = MetricsFile(tmp_path / "m")
    assert again.rewind(position) == [{"round": 0}]
    again.append({"round": 1})
    assert again.position == metrics.position
    assert (tmp_path / "m").read_text() == '{"round": 0}\n{"round": 1}\n'


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.fixture(autouse=True)
def interruptible():
    """Processes in the background may have been started with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class StopAfter(FederatedCallback):
    """Acts as Ctrl-C in the middle of a round."""

    def __init__(self, round_number: int, client: str):
        self.at = round_number, client

    def on_client_start(self, loop, task):
        if (loop.record.round, task.client_id) == self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("each_client", "rounds", "kept"), [(False, 2, 0), (True, 1, 2)])
def test_ctrl_c_ends_after_the_round_or_the_client_and_the_run_goes_on(tmp_path, each_client, rounds, kept, capsys):
    whole = toy_loop(tmp_path / "whole", rounds=3)
    whole.run()

    def make(stop_in_round):
        # Checkpoints are rarer than rounds here: the interrupt makes one all the same.
        checkpoint = CheckpointCallback(every_n_rounds=1 if each_client else 5, each_client=each_client)
        callbacks = [checkpoint, StopAfter(stop_in_round, "client-1")]
        return toy_loop(tmp_path / "run", rounds=3, callbacks=callbacks)

    loop, before = make(2), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stopping_on_interrupt(loop):
        loop.run()
    assert signal.getsignal(signal.SIGINT) == before
    assert "Ctrl-C again" in capsys.readouterr().err
    assert loop.progress.completed == rounds
    assert len(list((loop.folder.checkpoints / "round").glob("*"))) == kept
    rest = resumed(make(99))
    while not rest.done:
        rest.advance()
    assert all(torch.equal(whole.server.state[name], rest.server.state[name]) for name in whole.server.state)
    assert not (loop.folder.checkpoints / "round").exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    class Twice(StopAfter):
        def on_client_start(self, loop, task):
            super().on_client_start(loop, task)
            super().on_client_start(loop, task)

    loop = toy_loop(tmp_path / "run", rounds=3, callbacks=[CheckpointCallback(), Twice(2, "client-1")])
    with pytest.raises(KeyboardInterrupt), stopping_on_interrupt(loop):
        loop.run()
    assert loop.progress.completed == 1 and loop.record.round == 2


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop = toy_loop(tmp_path / "run", rounds=2, callbacks=[StopAfter(1, "client-0")])
    with stopping_on_interrupt(loop):
        loop.run()
    assert loop.progress.completed == 2 and not loop.interrupted


def test_outside_of_the_main_thread_signals_are_left_alone(tmp_path):
    done = []

    def work():
        with stopping_on_interrupt(toy_loop(tmp_path / "run")):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_the_command_continues_the_last_run_and_refuses_another_configuration(config, tmp_path, capsys):
    assert run(config, tmp_path) == 0
    folder = tmp_path / "run"
    first = json.loads((folder / "summary.json").read_text())
    for path in (folder / "checkpoints" / "round_000002.safetensors", folder / "summary.json"):
        path.unlink()
    assert run(config, tmp_path, "--ckpt_path=last") == 0
    again = json.loads((folder / "summary.json").read_text())
    assert first["downstream"] == again["downstream"] and first["retention"] == again["retention"]
    rounds = [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rounds == [0, 1, 2]
    assert yaml.safe_load((folder / "config.yaml").read_text())["ckpt_path"] is None

    capsys.readouterr()
    changed = config | {"seed": 3, "trainer": config["trainer"] | {"max_steps": 5}}
    assert run(changed, tmp_path, "--ckpt_path=last") == 2
    error = capsys.readouterr().err
    assert "seed = 3: 0 when the checkpoint was written" in error
    assert "trainer.max_steps = 5: 2 when the checkpoint was written" in error

    more = config | {"federation": config["federation"] | {"rounds": 3}}
    assert run(more, tmp_path, "--ckpt_path=last") == 0
    assert json.loads((folder / "summary.json").read_text())["rounds"] == 3

    assert run(config, tmp_path, f"--ckpt_path={folder / 'checkpoints' / 'round_000009.safetensors'}") == 2
    assert "No such file" in capsys.readouterr().err


def test_last_begins_where_there_is_no_checkpoint_yet(config, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x")
    (folder / "metrics.jsonl").write_text('{"round": 0}\n')
    assert run(config, tmp_path, "--ckpt_path=last") == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_last_does_not_write_into_a_folder_of_something_else(config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    assert run(config, tmp_path, "--ckpt_path=last") == 2
    assert "not empty" in capsys.readouterr().err


def test_the_newest_of_numbered_runs_is_continued(tmp_path, monkeypatch):
    from fedbe.storage.run_folder import RunFolder

    assert RunFolder.latest(tmp_path, "run") is None
    for name in ("run", "run-2", "run-3"):
        (tmp_path / name).mkdir()
        assert RunFolder.latest(tmp_path, "run") == tmp_path / name
