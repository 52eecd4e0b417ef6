import json
import time
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from wandb.proto.wandb_internal_pb2 import Record

from fedbe.callbacks import LoggingCallback, PlotCallback
from fedbe.federation.record import flatten


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
    loop = fake_loop(LoggingCallback(), logger=CSVLogger(str(tmp_path), name="csv", version=""))
    loop.play(history)
    loop.finish()
    header, *rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 7
    values = dict(zip(header.split(","), rows[3].split(","), strict=True))
    assert values["step"] == values["round"] == "3"
    assert float(values["round/downstream/accuracy"]) == pytest.approx(history[3]["downstream"]["accuracy"])
    assert "seed: 3" in (tmp_path / "csv" / "hparams.yaml").read_text()


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
