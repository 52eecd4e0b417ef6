"""What travels between server and clients."""

from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.federation.view import RunView
from fedbe.messages import FitTask, Update


class CommunicationCallback(FederatedCallback):
    """Counts the bytes of the tensors that travel, exactly: down to the clients and up to the server.

    An update that is refused, or late, has travelled too.
    """

    phase = Phase.MEASURE

    def on_client_start(self, run: RunView, task: FitTask) -> None:
        """Count what the client receives."""
        run.record.bytes["down"] += task.bytes_down

    def on_client_update(self, run: RunView, task: FitTask, update: Update) -> None:
        """Count what the client sends, whatever becomes of it."""
        run.record.bytes["up"] += update.bytes_up

    def on_run_end(self, run: RunView) -> None:
        """Add the totals of all rounds to the summary."""
        sent = {way: sum(record["bytes"][way] for record in run.history) for way in ("up", "down")}
        run.summarise(bytes_up=sent["up"], bytes_down=sent["down"])
