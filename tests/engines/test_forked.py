import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy import ToyData, toy_loop

from fedbe.algorithms import BlockExpansion, FedBE, FedIT, FedSALoRA, FLoRA, HetLoRA, LocalOnly, SLoRA
from fedbe.engines import Forked, InProcess
from fedbe.engines.forked import _answer, _news_of, _text_of, check_workers
from fedbe.errors import ConfigError, Facts
from fedbe.federation import run_state
from fedbe.federation.callback import FederatedCallback
from fedbe.messages import Failure, FitTask, Update, decode
from fedbe.objectives import Scaffold
from fedbe.prefix.store import News, PrefixReuse, Store

pytestmark = pytest.mark.skipif(bool(check_workers(2, "")), reason="needs fork, and no accelerator")

ALGORITHMS = {
    "expansion": lambda: BlockExpansion([0, 2]),
    "fedbe": FedBE,
    "fedit": lambda: FedIT(rank=2),
    "flora": lambda: FLoRA(rank=2),
    "hetlora": lambda: HetLoRA(ranks=[1, 2]),
    "slora": lambda: SLoRA(rank=2),
    "fedsa": lambda: FedSALoRA(rank=2),
    "local": lambda: LocalOnly(BlockExpansion([1])),
}


def forked(folder: Path, workers: int, **options):
    return toy_loop(folder, engine=Forked(workers) if workers else InProcess(), **options)


def ran(folder: Path, workers: int, **options):
    loop = forked(folder, workers, **options)
    loop.run()
    return loop


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_results_do_not_depend_on_the_number_of_processes(tmp_path, name):
    alone, *others = (ran(tmp_path / str(n), n, algorithm=ALGORITHMS[name]()) for n in (0, 1, 3))
    for other in others:
        assert_same(run_state.tensors(alone), run_state.tensors(other))
        assert alone.record.downstream == other.record.downstream
        assert list(alone.record.client_seconds) == list(other.record.client_seconds)
        assert alone.record.personalised == other.record.personalised


def test_what_clients_keep_for_their_objective_comes_back(tmp_path):
    options = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    alone, other = (ran(tmp_path / str(n), n, objective=Scaffold(), **options) for n in (0, 2))
    kept = {key.split("/")[3] for key in run_state.tensors(other) if key.startswith("engine/objective/")}
    assert kept == {"client-0", "client-1", "client-2", "client-3"}
    assert_same(run_state.tensors(alone), run_state.tensors(other))


@pytest.mark.parametrize("on_disk", [False, True])
def test_processes_share_what_frozen_blocks_compute(tmp_path, on_disk):
    prefix = PrefixReuse(gib=0.01, on_disk=on_disk, folder=tmp_path)
    options = {"algorithm": BlockExpansion([2]), "trainer": {"max_steps": 8}, "rounds": 3, "prefix": prefix}
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    alone = ran(tmp_path / "a" / "run", 0, **{**options, "algorithm": BlockExpansion([2])})
    other = ran(tmp_path / "b" / "run", 2, **{**options, "algorithm": BlockExpansion([2])})
    assert_same(alone.server.state, other.server.state)
    first, second = alone.summary["prefix"], other.summary["prefix"]
    assert first["sequences"] == second["sequences"]
    # Two clients of one round that have the same sequence compute it twice.
    assert 0.6 < second["known"] <= first["known"]


def test_a_store_is_filled_in_parts_and_what_one_process_kept_the_others_learn():
    here, there = Store(96, parts=3), Store(96, parts=3)
    there._buffer = here._buffer
    there.join(1)
    row = torch.arange(8.0).view(2, 4)
    assert here.put(b"h", row) and there.put(b"t", row + 1)
    assert not there.put(b"more", row)
    assert here.get(b"t") is None and here.misses == 1
    there.get(b"t"), there.get(b"h")
    here.learn(there.news())
    assert torch.equal(here.get(b"t"), row + 1) and torch.equal(here.get(b"h"), row)
    assert (here.hits, here.misses, here.used) == (3, 2, 64)
    assert there.news().places == {} and there.hits == 0


class Trouble(ToyData):
    """Reading the data of one client does something else in one round."""

    def __init__(self, trouble):
        super().__init__()
        self.trouble = trouble

    def client_dataset(self, client_id):
        rows = super().client_dataset(client_id)
        if client_id == "client-1" and os.getpid() != HERE:
            rows.__class__ = type("Rows", (type(rows),), {"__getitem__": lambda rows, index: self.trouble()})
        return rows


HERE = os.getpid()


def raise_what_cannot_be_sent():
    class Local(Exception):
        pass

    raise Local("of a class that nobody else knows")


@pytest.mark.parametrize(
    ("trouble", "kind", "said"),
    [
        (raise_what_cannot_be_sent, "error", "nobody else knows"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "memory", "SIGKILL"),
        (lambda: os._exit(3), "error", "exit code 3"),
    ],
)
def test_what_happens_to_a_process_costs_its_clients_round_and_nothing_else(tmp_path, trouble, kind, said):
    loop = ran(tmp_path / "run", 2, data=Trouble(trouble))
    for record in loop.history[1:]:
        [failure] = record["failures"]
        assert (failure["client"], failure["kind"]) == ("client-1", kind) and said in failure["reason"]
        assert list(record["client_seconds"]) == ["client-0", "client-2", "client-3"]


def test_a_client_that_hangs_within_a_step_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("fedbe.engines.forked._GRACE_SECONDS", 0.5)
    loop = forked(tmp_path / "run", 2, rounds=1, data=Trouble(lambda: time.sleep(600)), timeout_seconds=2.0)
    loop.run()
    [failure] = loop.record.failures
    assert (failure["client"], failure["kind"]) == ("client-1", "timeout") and "2.5 s" in failure["reason"]


def test_processes_end_with_their_round_however_it_ends(tmp_path):
    class Stop(FederatedCallback):
        def on_client_end(self, run, task, update):
            raise RuntimeError("enough")

    before = multiprocessing.active_children()
    loop = forked(tmp_path / "run", 2, callbacks=[Stop()])
    with pytest.raises(RuntimeError, match="enough"):
        loop.run()
    assert multiprocessing.active_children() == before


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """Killed, it can end nothing itself: its processes notice."""
    program = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from toy import ToyData, toy_loop
from fedbe.engines import Forked

HERE = os.getpid()

class Slow(ToyData):
    def client_dataset(self, client_id):
        if os.getpid() != HERE:
            os.write(1, f"{{os.getpid()}}\\n".encode())
            time.sleep(1.0)
        return super().client_dataset(client_id)

toy_loop(Path({str(tmp_path / "run")!r}), data=Slow(), engine=Forked(2)).run()
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    processes = [int(run.stdout.readline()) for _ in range(2)]
    run.kill()
    run.communicate(timeout=60)  # until nobody is left who could write to the pipe
    assert run.returncode == -signal.SIGKILL and len(set(processes)) == 2


def test_frozen_weights_are_in_memory_once(tmp_path):
    class Private(ToyData):
        def client_dataset(self, client_id):
            if os.getpid() != HERE:
                lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
                kib = next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))
                (tmp_path / f"{client_id}.txt").write_text(str(kib))
            return super().client_dataset(client_id)

    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs /proc")
    loop = forked(tmp_path / "run", 2, rounds=1, data=Private())
    loop.model.register_parameter("ballast", torch.nn.Parameter(torch.ones(2**26), requires_grad=False))
    loop.run()
    used = [int((tmp_path / f"client-{k}.txt").read_text()) for k in range(4)]
    assert max(used) * 1024 < 2**26  # a quarter of the ballast's bytes


def test_impossible_numbers_of_processes_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"engine\.init_args\.workers = 0: give 1 or more"):
        forked(tmp_path / "run", 2).engine.__class__(0).start(None)
    assert Forked(2).check("engine.init_args", Facts()) == []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for workers in (1, 2):
        [problem] = Forked(workers).check("engine.init_args", Facts())
        assert problem.key == "engine.init_args.workers" and "fedbe.engines.InProcess" in problem.remedy


def test_what_a_process_says_of_its_store_comes_back_without_pickle():
    news = News({b"\x00\xff": (64, torch.Size([2, 3]), torch.bfloat16)}, {1: 128}, 3, 4)
    assert _news_of(_text_of(news)) == news


def test_what_cannot_travel_is_the_client_s_failure():
    task = FitTask("a", 0, 0, {}, ())
    sparse = Update("a", {"w": torch.eye(2).to_sparse()}, 1)
    for outcome, kept in ((sparse, {}), (Update("a", {}, 1), {"tensors/w": torch.eye(2).to_sparse()})):
        failure = decode(_answer(task, outcome, kept)[0])
        assert isinstance(failure, Failure) and failure.kind == "update" and "cannot travel" in failure.reason


def test_a_signal_to_the_whole_group_leaves_clients_to_the_one_that_started_them(tmp_path):
    """As Ctrl-C at a terminal, and SIGTERM of a batch system or a service manager."""

    class Signalled(ToyData):
        def client_dataset(self, client_id):
            if os.getpid() != HERE:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
            return super().client_dataset(client_id)

    loop = ran(tmp_path / "run", 2, rounds=1, data=Signalled())
    assert loop.record.failures == [] and len(loop.record.client_seconds) == 4
