import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from survival.survivor import ROUNDS

MEASURED = {
    "wall_seconds",
    "evaluation_seconds",
    "simulated_seconds",
    "client_seconds",
    "peak_rss_bytes",
    "versions",
    "convergence",
}
HERE = Path(__file__).parent


def what_is_left(folder: Path) -> dict[str, object]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]
    summary = {k: v for k, v in json.loads((folder / "summary.json").read_text()).items() if k not in MEASURED}
    files = sorted(path for path in folder.rglob("*.safetensors"))
    tensors = {
        f"{path.relative_to(folder)}/{name}": tensor.tolist()
        for path in files
        for name, tensor in load_file(path).items()
    }
    return {"records": records, "summary": summary, "tensors": tensors}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("each_client", [False, True])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(tmp_path, each_client):
    command = [sys.executable, str(HERE / "survivor.py"), str(tmp_path / "killed"), str(each_client)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 20
    killed, undisturbed = what_is_left(tmp_path / "killed"), what_is_left(tmp_path / "undisturbed")
    assert [record["round"] for record in killed["records"]] == list(range(ROUNDS + 1))
    assert any(name.startswith(f"checkpoints/round_{ROUNDS:06d}") for name in killed["tensors"])
    assert killed == undisturbed
