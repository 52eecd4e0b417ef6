import csv
import json
import shutil
import time
from pathlib import Path

import pytest
import wandb
from full_disk import no_room
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from toy import resumed, toy_loop
from wandb.proto.wandb_internal_pb2 import Record

from fedbe.callbacks import CheckpointCallback, LoggingCallback, PlotCallback
from fedbe.errors import StorageError
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.federation.record import flatten
from fedbe.storage.csv_log import CSVLog


def offline_records(path: Path) -> list[Record]:
    """Read a `.wandb` file: after 7 bytes, blocks of 32 KiB with chunks of (crc, length, type), as LevelDB's log."""
    data, place, found, begun = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        chunk = data[place + 7 : place + 7 + length]
        place += 7 + length
        begun = chunk if kind in (1, 2) else begun + chunk
        if kind in (1, 4):
            found.append(Record.FromString(begun))
    return found


def wandb_logger(folder):
    settings = wandb.Settings(silent=True, console="off")
    return WandbLogger(project="fedbe", name="test", save_dir=str(folder), offline=True, settings=settings)


def rows_of(records):
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def run_offline(fake_loop, tmp_path, history, *callbacks, fail=False):
    loop = fake_loop(*callbacks, logger=wandb_logger(tmp_path))
    loop.play(history)
    if fail:
        loop.call("on_exception", RuntimeError())
    else:
        loop.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20
    while not exit_codes(records := offline_records(file)):  # another process writes what is left
        assert time.monotonic() < deadline, "the run was not closed"
        time.sleep(0.05)
    return records


def test_an_offline_run_holds_rounds_clients_tables_pictures_and_config(fake_loop, tmp_path, history):
    records = run_offline(fake_loop, tmp_path, history, PlotCallback(), LoggingCallback(max_clients=2))
    assert wandb.run is None
    rows = list(rows_of(records))
    rounds = [row for row in rows if "round" in row]
    assert [row["round"] for row in rounds] == list(range(7))
    for row, record in zip(rounds, history, strict=True):
        assert row["round/downstream/accuracy"] == pytest.approx(record["downstream"]["accuracy"])
        assert row["round/retention/mean"] == pytest.approx(record["retention"]["mean"])
        assert row["round/bytes/up"] == record["bytes"]["up"]
        assert "trainer/global_step" not in row
    clients = {key.split("/")[1] for row in rows for key in row if key.startswith("client/")}
    assert clients == {"c0", "c1"}
    taken_part = sum("c0" in record["cohort"] for record in history)
    assert [row["client/c0/step"] for row in rows if "client/c0/step" in row] == list(range(1, taken_part + 1))
    last = {key.split(".")[0] for row in rows[-1:] for key in row}
    assert {"tables/retention", "tables/allocation", "plots/learning", "plots/allocation"} <= {
        key.removesuffix("/_type") for key in last
    }
    config = {item.key: item.value_json for r in records for item in r.config.update}
    assert config["seed"] == "3"


def test_each_series_has_its_own_axis(fake_loop, tmp_path, history):
    records = run_offline(fake_loop, tmp_path, history, LoggingCallback(max_clients=1))
    axes = {r.metric.name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert axes["round/downstream/accuracy"] == axes["round/bytes/up"] == "round"
    assert axes["client/c0/loss"] == axes["client/c0/samples"] == "client/c0/step"


def exit_codes(records):
    return [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]


@pytest.mark.parametrize("fail", [False, True])
def test_the_run_is_closed_however_the_federation_ends(fake_loop, tmp_path, history, fail):
    records = run_offline(fake_loop, tmp_path, history[:2], LoggingCallback(), fail=fail)
    assert wandb.run is None
    assert exit_codes(records) == [int(fail)]


def test_csv_gets_a_row_a_round(fake_loop, tmp_path, history):
    loop = fake_loop(LoggingCallback(), logger=CSVLog(tmp_path / "csv"))
    loop.play(history)
    loop.finish()
    header, *rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 7
    values = dict(zip(header.split(","), rows[3].split(","), strict=True))
    assert values["step"] == values["round"] == "3"
    assert float(values["round/downstream/accuracy"]) == pytest.approx(history[3]["downstream"]["accuracy"])
    assert "seed: 3" in (tmp_path / "csv" / "hparams.yaml").read_text()


def continued(fake_loop, tmp_path, history, checkpoint, killed):
    """What a run has in `metrics.csv` that is killed after a round, and continued from an earlier one's checkpoint."""
    callback = LoggingCallback()
    loop = fake_loop(callback, logger=CSVLog(tmp_path / "csv"))
    loop.play(history[: checkpoint + 1])
    state = json.loads(json.dumps(callback.state_dict()))
    rest = history[checkpoint + 1 :]
    loop.play_on(rest[: killed - checkpoint])
    again = LoggingCallback()
    again.load_state_dict(state)
    loop.callbacks, loop.logger, loop.history = [again], CSVLog(tmp_path / "csv"), loop.history[: checkpoint + 1]
    loop.call("on_run_start")
    loop.play_on(rest)
    return (tmp_path / "csv" / "metrics.csv").read_bytes()


@pytest.mark.parametrize(("checkpoint", "killed"), [(3, 3), (3, 4), (1, 5), (0, 6)])
def test_csv_of_a_continued_run_is_that_of_one_that_never_ended(fake_loop, tmp_path, history, checkpoint, killed):
    for record in history[4:]:  # a column that is new, and one that was there only in rounds that are run again
        record["metrics"]["late"] = 0.5
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    loop = fake_loop(LoggingCallback(), logger=CSVLog(tmp_path / "a" / "csv"))
    loop.play(history)
    whole = (tmp_path / "a" / "csv" / "metrics.csv").read_bytes()
    assert whole.count(b"\n") == 8 and b"round/late" in whole.splitlines()[0]
    shutil.rmtree(tmp_path / "plots")
    shutil.rmtree(tmp_path / "checkpoints")
    assert continued(fake_loop, tmp_path / "b", history, checkpoint, killed) == whole


class Fails(FederatedCallback):
    """Ends the run after a round's row was written, before its checkpoint is."""

    phase = Phase.LOG

    def on_round_written(self, run):
        if run.record.round == 3:
            raise RuntimeError("killed")


def test_csv_of_a_real_run_that_fails_between_row_and_checkpoint(tmp_path):
    def make(folder, *more):
        callbacks = [LoggingCallback(), CheckpointCallback(), *more]
        logger = CSVLog(tmp_path / folder / "csv")
        return toy_loop(tmp_path / folder, rounds=4, cohort=2, callbacks=callbacks, logger=logger)

    def rows(folder):
        with (tmp_path / folder / "csv" / "metrics.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
        return [{name: cell for name, cell in row.items() if not name.endswith("seconds")} for row in found]

    make("whole").run()
    with pytest.raises(RuntimeError, match="killed"):
        make("broken", Fails()).run()
    assert [row["round"] for row in rows("broken")] == ["0", "1", "2", "3"]
    loop = resumed(make("broken"))
    while not loop.done:
        loop.advance()
    assert rows("broken") == rows("whole") and len(rows("whole")) == 5


def test_half_a_row_and_a_run_that_began_here_before_leave_nothing(tmp_path):
    log = CSVLog(tmp_path)
    for step in range(3):
        log.log_metrics({"a": step, "b": 0.25}, step)
    with log.metrics.open("a") as file:
        file.write("3,0.2")
    log = CSVLog(tmp_path)
    log.log_metrics({"a": 30.0, "c": 1}, 2)
    assert log.metrics.read_text().splitlines() == ["a,b,c,step", "0,0.25,,0", "1,0.25,,1", "30.0,,1,2"]
    log = CSVLog(tmp_path)
    log.log_metrics({"a": 7}, 0)
    assert log.metrics.read_text().splitlines() == ["a,step", "7,0"]


@pytest.mark.parametrize("new", [{}, {"new": 1.0}])
def test_a_full_disk_leaves_the_rows_before_and_says_how_to_go_on(tmp_path, new):
    log = CSVLog(tmp_path)
    log.log_metrics({"a": 1}, 0)
    before = log.metrics.read_bytes()
    with no_room(), pytest.raises(StorageError, match=r"metrics\.csv cannot be written, .*--ckpt_path last"):
        log.log_metrics({"a": 2, **new}, 1)
    assert log.metrics.read_bytes() == before
    log.log_metrics({"a": 2, **new}, 1)
    assert len(log.metrics.read_text().splitlines()) == 3


def test_what_a_callback_logs_stands_beside_the_other_figures(fake_loop, tmp_path, record):
    loop = fake_loop(LoggingCallback(), logger=CSVLog(tmp_path / "csv"))
    loop.play([record(0), record(1, metrics={"largest_update": 2.5})])
    header, first, second = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("round/largest_update")
    assert (first.split(",")[column], second.split(",")[column]) == ("", "2.5")


def test_tensorboard_hides_rounds_that_are_logged_again(fake_loop, tmp_path, history):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loop = fake_loop(LoggingCallback(), logger=TensorBoardLogger(str(tmp_path), name="tb", version=""))
    loop.play(history)
    loop.call("on_exception", RuntimeError())
    time.sleep(1.1)  # files are read in the order of the second in which they were made
    loop.logger = TensorBoardLogger(str(tmp_path), name="tb", version="", purge_step=4)
    loop.history = loop.history[:4]
    for record in history[4:]:
        record["downstream"] = {"accuracy": 0.9, "loss": 1.0}
    loop.call("on_run_start")
    loop.play_on(history[4:])
    loop.finish()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    series = [(event.step, event.value) for event in events.Scalars("round/downstream/accuracy")]
    assert [step for step, _ in series] == list(range(7))
    assert [value for _, value in series[4:]] == [pytest.approx(0.9)] * 3


def test_tensorboard_gets_series_over_rounds(fake_loop, tmp_path, history):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loop = fake_loop(LoggingCallback(), logger=TensorBoardLogger(str(tmp_path), name="tb", version=""))
    loop.play(history)
    loop.finish()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    series = events.Scalars("round/downstream/accuracy")
    assert [event.step for event in series] == list(range(7))


def test_without_a_logger_nothing_happens(fake_loop, tmp_path, history):
    loop = fake_loop(LoggingCallback())
    loop.play(history)
    loop.finish()
    loop.call("on_exception", RuntimeError())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_clients_continue_their_own_axis(fake_loop, history):
    first, second = LoggingCallback(), LoggingCallback()
    first._steps = {"c0": 4}
    second.load_state_dict(first.state_dict())
    assert second._steps == {"c0": 4}


def test_what_was_not_measured_is_not_logged(record):
    metrics = flatten(record(2, None, general={"cloze": {"score": 0.5, "standard_error": 0.1, "cross_entropy": None}}))
    assert "general/cloze/score" in metrics
    assert not any(name.startswith("downstream") or name.endswith("cross_entropy") for name in metrics)
