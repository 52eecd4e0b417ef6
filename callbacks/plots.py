"""Pictures of a run, as files."""

from fedbe.federation.callback import FederatedCallback
from fedbe.federation.loop import FederatedLoop
from fedbe.figures.learning import figures


class PlotCallback(FederatedCallback):
    """Writes the pictures of a finished run into its folder `plots/`.

    Learning and forgetting by round, by simulated second and by byte; who trained which block when.
    """

    def on_run_written(self, loop: FederatedLoop) -> None:
        """Draw and write the pictures."""
        for name, figure in figures(loop.history):
            figure.savefig(loop.folder.plots / name)
