"""A channel within one process: no network, and yet everything goes through bytes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Iterable

from fedbe.engines.remote import RemoteClient


class LoopbackChannel:
    """Runs clients in threads of this process; see `fedbe.engines.remote.Channel`.

    Args:
        clients: Each with a model of its own; their names are their addresses.
    """

    def __init__(self, clients: Iterable[RemoteClient] = ()) -> None:
        self._inbox: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self._ends: dict[str, LoopbackConnection] = {}
        self._threads: list[threading.Thread] = []
        for client in clients:
            self.run(client)

    def run(self, client: RemoteClient) -> None:
        """Start a client."""
        end = self.connect(client.client_id)

        def serve() -> None:
            try:
                client.serve(end)
            finally:
                end.gone.set()

        self._threads.append(threading.Thread(target=serve, name=client.client_id, daemon=True))
        self._threads[-1].start()

    def connect(self, address: str) -> LoopbackConnection:
        """Return a client's end at an address; one that was there before is gone."""
        if address in self._ends:
            self._ends[address].end()
        self._ends[address] = LoopbackConnection(address, self._inbox)
        return self._ends[address]

    def present(self) -> Collection[str]:
        """Return the addresses whose clients run."""
        return [address for address, end in list(self._ends.items()) if not end.gone.is_set()]

    def send(self, address: str, data: bytes) -> None:
        """Send bytes to a client.

        Raises:
            ConnectionError: It is not there.
        """
        if address not in self.present():
            raise ConnectionError(f"{address!r} is not there")
        self._ends[address].outbox.put(data)

    def receive(self, seconds: float, most_bytes: int) -> tuple[str, bytes] | None:
        """Return what the next client sends, and its address; ``None`` if nothing comes in time or it is too large."""
        try:
            address, data = self._inbox.get(timeout=seconds)
        except queue.Empty:
            return None
        return (address, data) if len(data) <= most_bytes else None

    def close(self) -> None:
        """Wait until the clients have ended."""
        for end in self._ends.values():
            end.end()
        for thread in self._threads:
            thread.join()


class LoopbackConnection:
    """A client's end; see `fedbe.engines.remote.Connection`.

    Args:
        address: The client's.
        inbox: Where the server receives.

    Attributes:
        outbox: What the server has sent; ``None`` at the end.
        gone: Set when the client is not there any more.
    """

    def __init__(self, address: str, inbox: queue.Queue[tuple[str, bytes]]) -> None:
        self.address = address
        self.outbox: queue.Queue[bytes | None] = queue.Queue()
        self.gone = threading.Event()
        self._inbox = inbox

    def end(self) -> None:
        """Let whoever receives here know that nothing comes any more."""
        self.gone.set()
        self.outbox.put(None)

    def send(self, data: bytes) -> None:
        """Send bytes to the server."""
        self._inbox.put((self.address, data))

    def receive(self, most_bytes: int) -> bytes | None:
        """Wait for what the server sends; ``None`` if it has closed the channel."""
        data = self.outbox.get()
        return data if data is None or len(data) <= most_bytes else b""
