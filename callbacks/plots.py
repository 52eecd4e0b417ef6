"""Pictures of a run, as files."""

from fedbe.errors import StorageError
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.federation.view import RunView
from fedbe.figures.learning import figures
from fedbe.figures.style import save
from fedbe.system.notice import say


class PlotCallback(FederatedCallback):
    """Writes the pictures of a finished run into its folder `plots/`.

    Learning and forgetting by round, by simulated second and by byte; who trained which block when; which
    classes a classifier takes for which. If one cannot be
    written, for want of room for example, the rest are left out, and a line says so.
    """

    phase = Phase.SHOW

    def on_run_written(self, run: RunView) -> None:
        """Draw and write the pictures."""
        try:
            for name, figure in figures(run.history, run.summary):
                save(figure, run.folder.plots / name, f"the model and all figures are in {run.folder.path}")
        except StorageError as error:
            say(str(error))
