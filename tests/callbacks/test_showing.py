import io
import json
import struct
import warnings
from collections import Counter

import pytest
from full_disk import no_room
from matplotlib.figure import Figure
from rich.console import Console
from toy import toy_loop

from fedbe.callbacks import FaultInjection, PlotCallback, ProgressCallback, summary_table
from fedbe.datamodules.report import ClientShare
from fedbe.evaluation.dial import Dial, DialPoint
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.figures.dial import dial_figure, dial_table
from fedbe.figures.learning import figures, learning_figure, spread
from fedbe.figures.partition import plot_partition, print_partition
from fedbe.figures.style import save
from fedbe.figures.tables import readable_bytes, readable_seconds


def progress(terminal):
    callback = ProgressCallback()
    callback.console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    return callback


def test_without_a_terminal_each_round_is_one_plain_line_and_the_table_comes_last(fake_loop, history):
    callback = progress(terminal=False)
    loop = fake_loop(callback)
    loop.play(history)
    lines = callback.console.file.getvalue().splitlines()
    assert len(lines) == 7
    assert lines[2] == "round 2/6 · accuracy 0.297 · kept 96.0 % · 6 kB sent · 4.0 s"
    loop.finish()
    text = callback.console.file.getvalue()
    assert not any(ord(character) < 32 and character != "\n" for character in text)
    assert "12.3 MB down" in text and str(loop.folder.path / "model") in text


def test_many_rounds_are_about_fifty_lines(fake_loop, record):
    callback = progress(terminal=False)
    loop = fake_loop(callback, rounds=1003)
    loop.play([record(number) for number in range(1004)])
    lines = callback.console.file.getvalue().splitlines()
    assert len(lines) < 60
    assert lines[-1].startswith("round 1003/1003")


def test_on_a_terminal_the_display_is_closed_by_an_exception(fake_loop, history):
    callback = progress(terminal=True)
    loop = fake_loop(callback)
    loop.play(history)
    display = callback._display
    assert display.live.is_started
    assert [task.completed for task in display.tasks] == [6, 3]
    loop.call("on_exception", RuntimeError())
    assert not display.live.is_started
    assert "\x1b[?25h" in callback.console.file.getvalue()  # the cursor is shown again
    loop.call("on_exception", RuntimeError())


def test_a_client_whose_update_is_refused_is_counted_once(tmp_path):
    callback, counts = progress(terminal=True), []

    class Watch(FederatedCallback):
        phase = Phase.DISPLAY

        def on_aggregate(self, run, new_state):
            counts.append([(task.completed, task.total) for task in callback._display.tasks])

    toy_loop(tmp_path / "run", rounds=1, callbacks=[callback, FaultInjection("nan", ["client-1"]), Watch()]).run()
    assert counts == [[(0, 1), (4, 4)]]


def rendered(summary, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(summary_table(summary))
    return console.file.getvalue()


def test_the_table_holds_base_final_change_and_what_was_kept(fake_loop, history):
    loop = fake_loop()
    loop.history = history
    loop.finish()
    downstream, docs, mean = (
        line.split() for line in rendered(loop.summary, 80).splitlines() if line.startswith(("  d", "  general"))
    )
    assert downstream == ["downstream", "0.200", "0.373", "+0.173", "-0.500"]
    assert " ".join(docs) == "docs 0.500 ± 0.010 0.440 ± 0.010 -0.060 88.0 % +0.250"
    assert " ".join(mean) == "general, mean 88.0 % +0.250"


def test_the_table_of_a_run_without_general_tasks_has_the_downstream_row_only():
    scores = {"downstream_base": {"accuracy": 0.1, "loss": 1.0}, "downstream": {"accuracy": 0.2, "loss": 0.5}}
    text = rendered(scores | {"general": None, "retention": None, "delta_ce": None})
    assert "+0.100" in text and "mean" not in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_340_000, "12.3 MB"), (5e12, "5 TB")]
)
def test_bytes_are_readable(count, text):
    assert readable_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(1.25, "1.2 s"), (83, "1:23 min"), (3723, "1:02:03 h")])
def test_seconds_are_readable(seconds, text):
    assert readable_seconds(seconds) == text


def png_size(path):
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:24])


def test_the_pictures_are_written(fake_loop, history):
    loop = fake_loop(PlotCallback())
    loop.history = history
    loop.call("on_run_written")
    names = {path.name for path in loop.folder.plots.iterdir()}
    assert names == {"learning.png", "learning_by_second.png", "learning_by_byte.png", "allocation.png"}
    for path in loop.folder.plots.iterdir():
        width, height = png_size(path)
        assert width > 600 and height > 300


def test_pictures_for_which_there_is_no_room_are_left_out_and_a_line_says_so(fake_loop, history, capsys):
    loop = fake_loop(PlotCallback())
    loop.history = history
    with no_room():
        loop.call("on_run_written")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fedbe: the picture") and "the disk is full" in line
    assert list(loop.folder.plots.iterdir()) == []


NAMES = [r"c$\frac{$", "$", "$$a$$", r"\$x$", "_hidden", "a\x00b", "half \ud83d", "[/bold]", "ü" * 300, ""]
"""Names that matplotlib or rich would read as something else than text."""


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_user_can_stand_in_any_picture_and_table(name, tmp_path, history):
    warnings.simplefilter("ignore")  # about glyphs that a font lacks, and about room
    named = json.loads(json.dumps(history).replace('"c1"', json.dumps(name)).replace('"docs"', json.dumps(name)))
    named = json.loads(json.dumps(named).replace('"block 1"', json.dumps(name)))
    for file, figure in figures(named, {}):
        save(figure, tmp_path / file)
    shares = [ClientShare(name, 5, labels=Counter({name: 5})), ClientShare("other", 5, labels=Counter({"b": 5}))]
    plot_partition(shares, tmp_path / "partition.png")
    scores = {name: 0.5, "other": 1.0, "mean": 0.75}
    dial = Dial([DialPoint(factor, factor, scores) for factor in (0.0, 1.0)], 1.0, None)
    save(dial_figure(dial), tmp_path / "dial.png")
    tables = [dial_table(dial), summary_table({"algorithm": name, "general": {"base": {}, "final": {}}})]
    console = Console(file=io.StringIO(), width=100)
    for table in tables if name.isprintable() else ():
        console.print(table)
    print_partition(shares, console)
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_no_legend_leaves_a_name_out():
    shares = [ClientShare("a", 5, labels=Counter({"_hidden": 3, "shown": 2}))]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedbe.figures.partition.save", lambda figure, path: drawn.append(figure))
        plot_partition(shares, "unused.png")
    assert {text.get_text().strip() for text in drawn[0].axes[0].get_legend().get_texts()} == {"_hidden", "shown"}


@pytest.mark.parametrize("name", ["picture.svg", "picture"])
def test_a_picture_is_written_in_the_format_of_its_name(tmp_path, name):
    save(Figure(), tmp_path / name)
    assert (tmp_path / name).read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_learning_picture_shows_the_records_over_cumulative_bytes(history):
    learned, kept, retention = learning_figure(history, "bytes").axes
    assert "(kB)" in learned.get_xlabel()
    curve = learned.get_lines()[0]
    assert list(curve.get_xdata()) == [0, 3, 6, 9, 12, 15, 18]
    assert list(curve.get_ydata()) == [record["downstream"]["accuracy"] for record in history]
    assert list(kept.get_lines()[0].get_ydata()) == [record["general"]["docs"]["score"] for record in history]
    assert list(kept.get_lines()[1].get_ydata()) == [0.5, 0.5]  # the base's level, dashed
    assert list(retention.get_lines()[0].get_ydata()) == [record["retention"]["docs"] for record in history]


def test_without_general_tasks_the_picture_is_what_was_learned(history):
    bare = [record | {"general": None, "retention": None} for record in history]
    assert len(learning_figure(bare).axes) == 1


def test_names_at_the_ends_of_curves_are_spread_in_order_below_the_top():
    assert spread([0.5, 0.5, 0.1], 0.1, 1.0) == pytest.approx([0.5, 0.6, 0.1])
    assert spread([0.98, 1.0, 0.97], 0.1, 1.0) == pytest.approx([0.9, 1.0, 0.8])
    assert spread([], 0.1, 1.0) == []
