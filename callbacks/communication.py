"""What travels between server and clients."""

from fedbe.federation.callback import FederatedCallback
from fedbe.federation.loop import FederatedLoop
from fedbe.messages import ClientTask, Update


class CommunicationCallback(FederatedCallback):
    """Counts the bytes of the tensors that travel, exactly: down to the clients and up to the server."""

    def on_client_start(self, loop: FederatedLoop, task: ClientTask) -> None:
        """Count what the client receives."""
        loop.record["bytes"]["down"] += task.bytes_down

    def on_client_end(self, loop: FederatedLoop, task: ClientTask, update: Update) -> None:
        """Count what the client sends."""
        loop.record["bytes"]["up"] += update.bytes_up

    def on_run_end(self, loop: FederatedLoop) -> None:
        """Add the totals of all rounds to the summary."""
        for direction in ("up", "down"):
            loop.summary[f"bytes_{direction}"] = sum(record["bytes"][direction] for record in loop.history)
