"""A run that is killed again and again and continued, for `test_survival`: ``survivor.py FOLDER KEEP_EACH_CLIENT``.

Its processes are forks of one that has imported everything. Prints how many were killed.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from toy import toy_loop

from fedbe.aggregation import FedAdam
from fedbe.callbacks import CheckpointCallback, CommunicationCallback, EarlyStopping, KeepBest
from fedbe.federation.callback import FederatedCallback
from fedbe.storage.checkpoint import Checkpoints, read_checkpoint
from fedbe.storage.run_folder import RunFolder
from fedbe.system.libraries import quiet_libraries

HOOKS = [name for name in vars(FederatedCallback) if name.startswith("on_") and name not in
         ("on_exception", "on_client_failure")]  # fmt: skip
RANDOM_KILLS, ROUNDS = 16, 24


class KillAt(FederatedCallback):
    """Kills its own process at the first call of a hook."""

    def __init__(self, hook: str | None):
        if hook is not None:
            setattr(self, hook, lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def go_on(folder: Path, each_client: bool, hook: str | None = None) -> None:
    """Begin the run in `folder`, or continue it."""
    callbacks = [CommunicationCallback(), KeepBest(), EarlyStopping(patience=100),
                 CheckpointCallback(each_client=each_client), KillAt(hook)]  # fmt: skip
    place = RunFolder(folder, begin_again=True)
    loop = toy_loop(folder, rounds=ROUNDS, cohort=3, server_optimizer=FedAdam(), callbacks=callbacks, run_folder=place)
    newest = next(Checkpoints(loop.folder.checkpoints).newest_first(), None)
    loop.run(None if newest is None else read_checkpoint(newest))


def forked(*arguments: object) -> int:
    """Return the id of a new process that goes on with the run."""
    process = os.fork()
    if process == 0:
        try:
            go_on(*arguments)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return process


def main(folder: Path, each_client: bool) -> None:
    torch.set_num_threads(1)
    quiet_libraries()
    chance, killed = random.Random(0), 0
    for hook in [*[None] * RANDOM_KILLS, *HOOKS]:
        process = forked(folder, each_client, hook)
        if hook is None:
            time.sleep(chance.uniform(0, 0.45))
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            sys.exit(f"after {killed} kills the run could not be continued")
        killed += os.WIFSIGNALED(status)
    for name in (folder, folder.with_name("undisturbed")):
        if os.waitpid(forked(name, each_client), 0)[1]:
            sys.exit(f"{name} did not come to its end")
    print(killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "True")
