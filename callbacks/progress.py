"""What is seen of a run while it goes on, and the table at its end."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.federation.view import RunView
from fedbe.figures.tables import readable_bytes, readable_seconds, readable_share, summary_lines, summary_table
from fedbe.messages import Failure, FitTask, Update

_MOST_LINES = 50


class ProgressCallback(FederatedCallback):
    """One quiet display of rounds and clients on a terminal, plain lines elsewhere, and the table at the end.

    Elsewhere (a file, a pipe, a notebook) a round is at most one line, and a run is about fifty.
    """

    phase = Phase.DISPLAY

    def __init__(self) -> None:
        self.console = Console()
        self._display: Progress | None = None

    def on_run_start(self, run: RunView) -> None:
        """Open the display, if there is a terminal to show it on."""
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(12),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._display = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
            self._rounds = self._display.add_task("rounds", total=run.rounds, completed=len(run.history), note="")
            self._clients = self._display.add_task("clients", total=None, note="")
            self._display.start()

    def on_round_start(self, run: RunView) -> None:
        """Begin a new cohort."""
        self._update_clients(total=len(run.record.cohort), completed=0)

    def on_client_start(self, run: RunView, task: FitTask) -> None:
        """Name the client that trains."""
        self._update_clients(note=task.client_id)

    def on_client_end(self, run: RunView, task: FitTask, update: Update) -> None:
        """Count the client."""
        self._update_clients(advance=1)

    def on_client_failure(self, run: RunView, task: FitTask, failure: Failure) -> None:
        """Say who is left out, and why."""
        self._update_clients(advance=1)
        self._print(f"round {run.record.round} · without {failure.client_id}, {failure.kind}: {failure.reason}")

    def on_aggregate(self, run: RunView, new_state: object) -> None:
        """Say that the new model is being scored."""
        self._update_clients(note="scoring")

    def on_round_written(self, run: RunView) -> None:
        """Show the round's figures."""
        number, total = run.record.round, run.rounds
        note = _note(run)
        if self._display is not None:
            self._display.update(self._rounds, completed=number, note=note)
        elif number % -(-total // _MOST_LINES) == 0 or number == total:
            wall = readable_seconds(run.history[-1]["wall_seconds"])
            self._print(f"round {number:>{len(str(total))}}/{total} · {note} · {wall}")

    def on_last_round(self, run: RunView) -> None:
        """Say that the final model is being scored."""
        self._update_clients(note="scoring the final model")

    def on_exception(self, run: RunView, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    def on_run_written(self, run: RunView) -> None:
        """Close the display and print the table."""
        self._close()
        self.console.print(summary_table(run.summary))
        for line in summary_lines(run.summary, run.folder.path):
            self._print(line)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _update_clients(self, **changes: Any) -> None:
        if self._display is not None:
            self._display.update(self._clients, **changes)

    def _close(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None


def _note(run: RunView) -> str:
    downstream, kept = run.record.downstream, run.record.retention
    parts = [f"accuracy {downstream['accuracy']:.3f}"] if downstream else []
    parts += [f"kept {readable_share(kept['mean'])}"] if kept else []
    sent = sum(sum(record["bytes"].values()) for record in run.history)
    return " · ".join([*parts, f"{readable_bytes(sent)} sent"])
