"""The run on a dashboard: Weights & Biases, or any other logger of Lightning."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from fedbe.errors import Problem, check_at_least
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.loop import FederatedLoop
from fedbe.federation.record import flatten
from fedbe.messages import ClientTask, Update


class LoggingCallback(FederatedCallback):
    """Writes the run to `loop.logger`, one row a round; without a logger it does nothing.

    ``round/*`` are the round's figures over the round, ``client/<id>/*`` a client's over the number of rounds it has
    taken part in (``client/<id>/step``). Weights & Biases also gets the configuration, the allocation, a table of
    retention and the pictures, and its run is closed however the federation ends.

    Args:
        max_clients: Clients that get series of their own, the first of the data module.
    """

    def __init__(self, max_clients: int = 50) -> None:
        self.max_clients = max_clients
        self._steps: dict[str, int] = {}
        self._clients: dict[str, dict[str, float]] = {}
        self._defined: set[str] = set()
        self._open = False

    def check(self, key: str, metrics: Collection[str] = ()) -> list[Problem]:
        """Return what is wrong with the number."""
        return check_at_least(key, 0, max_clients=self.max_clients)

    def on_run_start(self, loop: FederatedLoop) -> None:
        """Open the run and log the configuration."""
        if loop.logger is None:
            return
        self._followed = list(loop.data.client_ids)[: self.max_clients]
        loop.logger.log_hyperparams(dict(loop.config))
        self._open = True

    def on_client_end(self, loop: FederatedLoop, task: ClientTask, update: Update) -> None:
        """Collect the figures of one client."""
        if not self._open or task.client_id not in self._followed:
            return
        self._steps[task.client_id] = self._steps.get(task.client_id, 0) + 1
        figures = {"step": self._steps[task.client_id], "samples": update.samples, **update.metrics}
        space = f"client/{task.client_id}"
        self._clients[f"{space}/step"] = {f"{space}/{name}": value for name, value in figures.items()}

    def on_round_written(self, loop: FederatedLoop) -> None:
        """Log the round and its clients as one row."""
        if loop.logger is None:
            return
        by_axis = {"round": _round_figures(loop.record), **self._clients}
        self._clients = {}
        metrics = {name: value for figures in by_axis.values() for name, value in figures.items()}
        if isinstance(loop.logger, WandbLogger):
            self._define_axes(loop.logger, by_axis)
            # A `step` would become another axis; the rows carry their own: "round" and "client/<id>/step".
            loop.logger.log_metrics(metrics)
        else:
            loop.logger.log_metrics(metrics, step=loop.record["round"])
            loop.logger.save()

    def on_exception(self, loop: FederatedLoop, exception: BaseException) -> None:
        """Close the run as failed."""
        self._close(loop, "failed")

    def on_run_written(self, loop: FederatedLoop) -> None:
        """Log tables and pictures, and close the run."""
        if isinstance(loop.logger, WandbLogger):
            _log_results(loop, loop.logger, self._followed)
        self._close(loop, "success")

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

    def _close(self, loop: FederatedLoop, status: str) -> None:
        if loop.logger is None or not self._open:
            return
        self._open = False
        loop.logger.finalize(status)
        if isinstance(loop.logger, WandbLogger):
            loop.logger.experiment.finish(exit_code=int(status != "success"))


def _round_figures(record: Mapping[str, Any]) -> dict[str, float]:
    figures = {"clients": len(record["cohort"]), **flatten(record)}
    return {"round": record["round"], **{f"round/{name}": value for name, value in figures.items()}}


def _log_results(loop: FederatedLoop, logger: WandbLogger, clients: list[str]) -> None:
    import wandb  # here, so that runs without it do not wait for its import

    run = logger.experiment
    results: dict[str, Any] = {
        f"plots/{path.stem}": wandb.Image(str(path)) for path in sorted(loop.folder.plots.glob("*.png"))
    }
    columns: list[str | int] = ["task", "base", "final", "retention", "delta_ce"]
    results["tables/retention"] = wandb.Table(columns, list(_retention_rows(loop.summary)))
    rows = [
        [record["round"], client, ", ".join(map(str, units))]
        for record in loop.history
        for client, units in record["allocation"].items()
        if client in clients
    ]
    results["tables/allocation"] = wandb.Table(["round", "client", "blocks"], rows)
    run.log(results)
    run.summary.update({name: value for name, value in loop.summary.items() if name not in ("convergence", "versions")})


def _retention_rows(summary: Mapping[str, Any]) -> Iterator[list[Any]]:
    general, kept, losses = (summary.get(key) or {} for key in ("general", "retention", "delta_ce"))
    for name, score in general.get("base", {}).items():
        yield [name, score["score"], general["final"][name]["score"], kept.get(name), losses.get(name)]
