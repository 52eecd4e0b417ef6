"""What clients keep to themselves from one of their rounds to the next, by client and round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """What one client keeps after a round.

    Attributes:
        tensors: What the adaptation keeps, by exact parameter name.
        objective: What the local objective keeps, by exact parameter name.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    objective: Mapping[str, Tensor] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, str]) -> Kept:
        """Return it under the parameters' new names, old → new."""
        parts = ({names.get(n, n): t for n, t in part.items()} for part in (self.tensors, self.objective))
        return Kept(*parts)


NOTHING = Kept()


class ClientMemory:
    """What clients keep, in an engine of this process or at the client itself; it never travels.

    A client's update may be refused, arrive late or be lost: then its next round goes on from what it kept in the round
    whose update was accepted last (`FitTask.resumes`), and what it kept since is dropped. So the entries of at most two
    rounds are held for each client.
    """

    def __init__(self) -> None:
        self._entries: dict[str, dict[int, Kept]] = {}

    def get(self, client_id: str, round_index: int | None) -> Kept:
        """Return what a client kept in a round; nothing for ``None`` or a round in which it kept nothing."""
        return NOTHING if round_index is None else self._entries.get(client_id, {}).get(round_index, NOTHING)

    def put(self, client_id: str, round_index: int, kept: Kept, resumes: int | None) -> None:
        """Keep what a client has after a round, beside what it went on from; all else of the client is dropped."""
        before = {resumes: self.get(client_id, resumes)} if resumes is not None else {}
        entries = {**before, round_index: kept}
        self._entries[client_id] = {number: own for number, own in entries.items() if own.tensors or own.objective}

    def rename(self, renamed: Mapping[str, str]) -> None:
        """Follow parameters that have new names, old → new."""
        self._entries = {
            client_id: {number: kept.renamed(renamed) for number, kept in entries.items()}
            for client_id, entries in self._entries.items()
        }

    def tensors(self, accepted: Mapping[str, int]) -> dict[str, Tensor]:
        """Return what it takes to continue, by ``part/round/client/name``.

        Args:
            accepted: Client → the round of its last accepted update; nothing else is needed any more.
        """
        found: dict[str, Tensor] = {}
        for client_id, round_index in accepted.items():
            kept = self.get(client_id, round_index)
            for part, tensors in (("tensors", kept.tensors), ("objective", kept.objective)):
                found |= {f"{part}/{round_index}/{client_id}/{name}": tensor for name, tensor in tensors.items()}
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `tensors`."""
        parts: dict[tuple[str, int], dict[str, dict[str, Tensor]]] = {}
        for key, tensor in tensors.items():
            part, number, rest = key.split("/", 2)
            client_id, _, name = rest.rpartition("/")
            own = parts.setdefault((client_id, int(number)), {"tensors": {}, "objective": {}})
            own[part][name] = tensor
        self._entries = {}
        for (client_id, round_index), own in parts.items():
            self._entries.setdefault(client_id, {})[round_index] = Kept(own["tensors"], own["objective"])
