"""What it takes to continue a run, on disk after each round."""

from fedbe.errors import Facts, Problem, check_at_least
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.federation.kept_outcomes import KeptOutcomes
from fedbe.federation.view import RunView
from fedbe.storage.checkpoint import Checkpoints


class CheckpointCallback(FederatedCallback):
    """Writes `checkpoints/round_N.safetensors` after each round, whole or not at all.

    A run is continued by ``--ckpt_path last``, to the same result as if it had never ended.

    Args:
        every_n_rounds: Write every n rounds, after the last, and when the run is interrupted.
        keep: How many to keep, the newest.
        each_client: Also keep what each client has sent until its round is done: a run that ended within a round
            does not train them again. It takes the space of a cohort's updates.
    """

    phase = Phase.SAVE

    def __init__(self, every_n_rounds: int = 1, keep: int = 2, each_client: bool = False) -> None:
        self.every_n_rounds = every_n_rounds
        self.keep = keep
        self.each_client = each_client

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the numbers."""
        return check_at_least(key, 1, every_n_rounds=self.every_n_rounds, keep=self.keep)

    def on_run_start(self, run: RunView) -> None:
        """Have what clients send kept, if that is asked for; finish what a killed run had begun to delete."""
        Checkpoints(run.folder.checkpoints, self.keep).prune()
        if self.each_client:
            run.keep_outcomes(KeptOutcomes(run.folder.checkpoints / "round", run.identity))

    def on_round_written(self, run: RunView) -> None:
        """Save the tensors and the run's state in one file.

        Raises:
            StorageError: The disk is full; the checkpoints before this one are intact.
        """
        if run.completed % self.every_n_rounds == 0 or run.done or run.interrupted:
            Checkpoints(run.folder.checkpoints, self.keep).save(run.completed, *run.checkpoint())
            if run.kept_outcomes is not None:
                run.kept_outcomes.clear()
