"""A run's folder belongs to one process at a time."""

import json
import subprocess
import sys

import pytest
from full_disk import no_room

from fedbe.errors import ConfigError, StorageError
from fedbe.storage.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from fedbe.storage.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).in_use():
    print("here", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        yield process
        process.kill()


def test_a_second_process_is_kept_out_and_a_killed_one_keeps_nobody_out(tmp_path, holder):
    folder = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match="another process is running there"), folder.in_use(wait_seconds=0.1):
        pass
    holder.kill()
    with folder.in_use():
        pass


def test_a_folder_that_was_only_held_is_still_empty_for_a_new_run(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.in_use():
        folder.create({"seed": 0})
    assert RunFolder.problem(tmp_path) is not None
    other = RunFolder(tmp_path / "other")
    with other.in_use():
        pass
    assert RunFolder.problem(other.path) is None


def test_a_summary_for_which_there_is_no_room_leaves_the_one_before_and_says_how_to_go_on(tmp_path):
    folder = RunFolder(tmp_path)
    with no_room(), pytest.raises(StorageError, match=r"summary\.json cannot be written, .*--ckpt_path last"):
        folder.write_summary({"rounds": 1})
    assert list(tmp_path.iterdir()) == []
    folder.write_summary({"rounds": 1})
    with no_room(), pytest.raises(StorageError):
        folder.write_summary({"rounds": 2})
    assert json.loads(folder.summary.read_text()) == {"rounds": 1} and list(tmp_path.iterdir()) == [folder.summary]
