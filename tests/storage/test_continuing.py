"""What `--ckpt_path last` continues from, and what it says where it cannot."""

import json
import shutil

import pytest
import torch
from toy import Sequences, ToyData, resumed, tiny_llama, toy_loop

from fedbe.callbacks import CheckpointCallback
from fedbe.engines import InProcess
from fedbe.engines.remote import RemoteEngine
from fedbe.errors import ConfigError
from fedbe.storage.checkpoint import Checkpoints, fingerprint, load_tensors, read_checkpoint, save_tensors
from fedbe.storage.metrics_file import MetricsFile
from fedbe.storage.run_folder import RunFolder


def run(folder, rounds):
    loop = toy_loop(folder, rounds=rounds, callbacks=[CheckpointCallback(keep=9)])
    loop.run()
    return loop


def last(folder):
    place = RunFolder(folder)
    return Checkpoints(place.checkpoints).last(MetricsFile(place.metrics).fits)


def test_after_a_run_went_on_from_an_older_checkpoint_the_newer_ones_are_set_aside(tmp_path):
    run(tmp_path / "run", 4)
    again = toy_loop(tmp_path / "run", rounds=4, callbacks=[CheckpointCallback(keep=9)])
    again.setup()
    again.resume(read_checkpoint(tmp_path / "run" / "checkpoints" / "round_000001.safetensors"))
    names = sorted(path.name for path in again.folder.checkpoints.glob("round_*"))
    assert names[:2] == ["round_000000.safetensors", "round_000001.safetensors"]
    assert all(name.endswith(".superseded") for name in names[2:]) and len(names) == 5
    again.advance()
    assert last(tmp_path / "run").name == "round_000002.safetensors"


def test_last_is_the_newest_that_the_metrics_file_bears_out(tmp_path):
    """A process killed right after it had rewound the file leaves newer checkpoints that no longer fit it."""
    loop = run(tmp_path / "run", 3)
    older = read_checkpoint(loop.folder.checkpoints / "round_000001.safetensors")
    MetricsFile(loop.folder.metrics).rewind(older.state["metrics"])
    assert last(tmp_path / "run").name == "round_000001.safetensors"
    again = resumed_from_last(tmp_path / "run", 3)
    while not again.done:
        again.advance()
    assert [record["round"] for record in again.history] == [0, 1, 2, 3]
    assert all(torch.equal(again.server.state[n], t) for n, t in loop.server.state.items())


def resumed_from_last(folder, rounds):
    loop = toy_loop(folder, rounds=rounds, callbacks=[CheckpointCallback(keep=9)])
    loop.setup()
    loop.resume(read_checkpoint(last(folder)))
    return loop


def test_more_newer_files_than_are_kept_do_not_cost_the_new_ones(tmp_path):
    loop = run(tmp_path / "run", 6)
    folder = loop.folder.checkpoints
    again = toy_loop(tmp_path / "run", rounds=6, callbacks=[CheckpointCallback(keep=2)])
    again.setup()
    again.resume(read_checkpoint(folder / "round_000002.safetensors"))
    again.advance()
    assert (folder / "round_000003.safetensors").exists()


def test_what_a_killed_run_had_still_to_delete_is_deleted_when_it_goes_on(tmp_path):
    loop = run(tmp_path / "run", 3)
    again = toy_loop(tmp_path / "run", rounds=3, callbacks=[CheckpointCallback(keep=2)])
    again.setup()
    again.resume(read_checkpoint(last(tmp_path / "run")))
    left = sorted(path.name for path in loop.folder.checkpoints.glob("round_*"))
    assert left == ["round_000002.safetensors", "round_000003.safetensors"]


def test_a_checkpoint_of_another_format_is_refused_with_words(tmp_path):
    loop = run(tmp_path / "run", 1)
    path = loop.folder.checkpoints / "round_000001.safetensors"
    tensors, state = load_tensors(path)
    save_tensors(path, tensors, {name: value for name, value in state.items() if name != "format"})
    with pytest.raises(ConfigError, match="another version of fedbe"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "key", ["progress", "server", "engine", "callbacks", "summary", "simulated_seconds", "metrics"]
)
@pytest.mark.parametrize("damage", ["missing", "of another type"])
def test_a_state_that_does_not_fit_is_refused_with_words(tmp_path, key, damage):
    if key == "engine" and damage == "of another type":
        pytest.skip("an engine in this process has no state to look at")
    loop = run(tmp_path / "run", 1)
    path = loop.folder.checkpoints / "round_000001.safetensors"
    tensors, state = load_tensors(path)
    changed = {name: value for name, value in state.items() if name != key}
    if damage == "of another type":
        changed[key] = [7]
    save_tensors(path, tensors, changed)
    with pytest.raises(ConfigError, match="ckpt_path"):
        resumed(toy_loop(tmp_path / "run", rounds=2, callbacks=[CheckpointCallback()]))


@pytest.mark.parametrize("name", ["run", "exp/run", "a-1/run", "run-2"])
def test_the_latest_folder_of_a_name_is_found_whatever_the_name(tmp_path, name):
    assert RunFolder.latest(tmp_path, name) is None
    first, second = tmp_path / name, tmp_path / f"{name}-2"
    first.mkdir(parents=True)
    assert RunFolder.latest(tmp_path, name) == first
    second.mkdir(parents=True)
    assert RunFolder.latest(tmp_path, name) == second and RunFolder.next_free(tmp_path, name) == tmp_path / f"{name}-3"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_changed_value_of_the_base_is_noticed(dtype):
    model = tiny_llama().to(dtype)
    before = fingerprint(model)
    assert fingerprint(model) == before
    for name, parameter in model.named_parameters():
        place = parameter.data.view(-1)
        kept = place[-1].clone()
        place[-1] += 1
        assert fingerprint(model) != before, name
        place[-1] = kept
    assert fingerprint(model) == before


def test_metrics_jsonl_that_is_gone_is_said(tmp_path):
    loop = run(tmp_path / "run", 1)
    shutil.move(loop.folder.metrics, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not what the checkpoint's run had written"):
        resumed(toy_loop(tmp_path / "run", rounds=2, callbacks=[CheckpointCallback()]))
    assert json.loads((tmp_path / "elsewhere").read_text().splitlines()[0])["round"] == 0


class Edited(ToyData):
    """The toy's data, changed after the run began: a token of `client-1`, a row more in the validation split."""

    def client_dataset(self, client_id):
        dataset = super().client_dataset(client_id)
        if client_id == "client-1":
            dataset.rows[0, 0] += 1
        return dataset

    def validation_dataset(self):
        return self.rows(0, 9, "validation")


class Encoded(ToyData):
    """The toy's data as another tokenizer or template encodes it."""

    def rows(self, step, count, purpose):
        return Sequences(super().rows(step, count, purpose).rows.flip(1))


def test_data_that_has_changed_is_refused_and_the_message_says_what_differs(tmp_path):
    run(tmp_path / "run", 1)
    with pytest.raises(ConfigError) as caught:
        resumed(toy_loop(tmp_path / "run", rounds=2, data=Edited(), callbacks=[CheckpointCallback()]))
    [problem] = caught.value.problems
    assert problem.key == "data" and "leave ckpt_path out" in problem.remedy and "all of it" not in problem.remedy
    assert problem.value == "validation (9 samples, were 8), client client-1 (10 samples, other values)"


def test_clients_that_come_or_go_are_named(tmp_path):
    run(tmp_path / "run", 1)
    with pytest.raises(ConfigError, match=r"client client-3 \(is gone\)"):
        resumed(toy_loop(tmp_path / "run", rounds=2, data=ToyData(clients=3), callbacks=[CheckpointCallback()]))
    with pytest.raises(ConfigError, match=r"client client-4 \(is new\).*client client-8 \(is new\), 1 more"):
        resumed(toy_loop(tmp_path / "run", rounds=2, data=ToyData(clients=10), callbacks=[CheckpointCallback()]))


def test_data_that_is_encoded_otherwise_is_refused_with_the_likely_cause(tmp_path):
    run(tmp_path / "run", 1)
    with pytest.raises(ConfigError, match="another tokenizer or template"):
        resumed(toy_loop(tmp_path / "run", rounds=2, data=Encoded(), callbacks=[CheckpointCallback()]))


class Splits(ToyData):
    """The data of a server whose clients' rows are on machines of their own."""

    def client_dataset(self, client_id):
        raise AssertionError(f"the data of {client_id} is not here")


def test_the_server_of_remote_clients_looks_at_its_own_splits_only(tmp_path):
    class Elsewhere(InProcess):
        offers = RemoteEngine.offers

    loop = toy_loop(tmp_path / "run", engine=Elsewhere(), data=Splits())
    loop.setup()
    assert list(loop.identity.data) == ["validation", "test"]
