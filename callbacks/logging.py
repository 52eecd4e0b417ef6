"""The run on a dashboard: Weights & Biases, or any other logger of Lightning."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from fedbe.errors import Facts, Problem, check_at_least
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.federation.record import flatten
from fedbe.federation.view import RunView
from fedbe.messages import FitTask, Update


class LoggingCallback(FederatedCallback):
    """Writes the run to its logger, one row a round; without a logger it does nothing.

    ``round/*`` are the round's figures over the round, what callbacks have logged among them, and ``client/<id>/*`` a
    client's over the number of rounds in which it was heard (``client/<id>/step``). Weights & Biases also gets the
    configuration, the allocation, a table of retention and the pictures, and its run is closed however the federation
    ends.

    Rounds after the checkpoint from which a run is continued are logged again. `CSVLog` replaces them, and TensorBoard
    hides them where the logger was built with a ``purge_step``. Weights & Biases only adds rows: it holds such a round
    twice, with the same ``round`` and, up to measured times, the same values. Lightning's own `CSVLogger` deletes the
    rows of the run before.

    Args:
        max_clients: Clients that get series of their own, the first of the data module.
    """

    phase = Phase.LOG

    def __init__(self, max_clients: int = 50) -> None:
        self.max_clients = max_clients
        self._steps: dict[str, int] = {}
        self._clients: dict[str, dict[str, float]] = {}
        self._defined: set[str] = set()
        self._open = False

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the number."""
        return check_at_least(key, 0, max_clients=self.max_clients)

    def on_run_start(self, run: RunView) -> None:
        """Open the run and log the configuration."""
        if run.logger is None:
            return
        self._followed = list(run.client_ids)[: self.max_clients]
        run.logger.log_hyperparams(dict(run.config))
        self._open = True

    def on_client_end(self, run: RunView, task: FitTask, update: Update) -> None:
        """Collect the figures of one client."""
        if not self._open or task.client_id not in self._followed:
            return
        self._steps[task.client_id] = self._steps.get(task.client_id, 0) + 1
        figures = {"step": self._steps[task.client_id], "samples": update.samples, **update.metrics}
        space = f"client/{task.client_id}"
        self._clients[f"{space}/step"] = {f"{space}/{name}": value for name, value in figures.items()}

    def on_round_written(self, run: RunView) -> None:
        """Log the round and its clients as one row."""
        if run.logger is None:
            return
        by_axis = {"round": _round_figures(run.history[-1]), **self._clients}
        self._clients = {}
        metrics = {name: value for figures in by_axis.values() for name, value in figures.items()}
        if isinstance(run.logger, WandbLogger):
            self._define_axes(run.logger, by_axis)
            # A `step` would become another axis; the rows carry their own: "round" and "client/<id>/step".
            run.logger.log_metrics(metrics)
        else:
            run.logger.log_metrics(metrics, step=run.record.round)
            run.logger.save()

    def on_exception(self, run: RunView, exception: BaseException) -> None:
        """Close the run as failed."""
        self._close(run, "failed")

    def on_run_written(self, run: RunView) -> None:
        """Log tables and pictures, and close the run."""
        if isinstance(run.logger, WandbLogger):
            _log_results(run, run.logger, self._followed)
        self._close(run, "success")

    def state_dict(self) -> dict[str, Any]:
        """Return how often each client has taken part."""
        return {"steps": dict(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the clients' own axes."""
        self._steps = dict(state["steps"])

    def _define_axes(self, logger: WandbLogger, by_axis: Mapping[str, Mapping[str, float]]) -> None:
        """Tell W&B what each new series is drawn over, by its exact name.

        Lightning has already defined ``*`` over its own global step, and which of two matching patterns W&B takes is
        not laid down; an exact name comes before both.
        """
        for axis, figures in by_axis.items():
            for name in figures:
                if name not in self._defined:
                    logger.experiment.define_metric(name, step_metric=None if name == axis else axis)
                    self._defined.add(name)

    def _close(self, run: RunView, status: str) -> None:
        if run.logger is None or not self._open:
            return
        self._open = False
        run.logger.finalize(status)
        if isinstance(run.logger, WandbLogger):
            run.logger.experiment.finish(exit_code=int(status != "success"))


def _round_figures(record: Mapping[str, Any]) -> dict[str, float]:
    figures = {"clients": len(record["cohort"]), **flatten(record)}
    return {"round": record["round"], **{f"round/{name}": value for name, value in figures.items()}}


def _log_results(run: RunView, logger: WandbLogger, clients: list[str]) -> None:
    import wandb  # here, so that runs without it do not wait for its import

    results: dict[str, Any] = {
        f"plots/{path.stem}": wandb.Image(str(path)) for path in sorted(run.folder.plots.glob("*.png"))
    }
    columns: list[str | int] = ["task", "base", "final", "retention", "delta_ce"]
    results["tables/retention"] = wandb.Table(columns, list(_retention_rows(run.summary)))
    rows = [
        [record["round"], client, ", ".join(map(str, units))]
        for record in run.history
        for client, units in record["allocation"].items()
        if client in clients
    ]
    results["tables/allocation"] = wandb.Table(["round", "client", "blocks"], rows)
    logger.experiment.log(results)
    shown = {name: value for name, value in run.summary.items() if name not in ("convergence", "versions")}
    logger.experiment.summary.update(shown)


def _retention_rows(summary: Mapping[str, Any]) -> Iterator[list[Any]]:
    general, kept, losses = (summary.get(key) or {} for key in ("general", "retention", "delta_ce"))
    for name, score in general.get("base", {}).items():
        yield [name, score["score"], general["final"][name]["score"], kept.get(name), losses.get(name)]
