import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

from fedbe.cli import main
from fedbe.data import FederatedDataModule

EXAMPLE = Path(__file__).parents[2] / "examples" / "one_file.py"


def load_example():
    spec = importlib.util.spec_from_file_location("one_file", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class SumsData(FederatedDataModule):
    """The example's own rows, as a data module."""

    example = load_example()

    @property
    def client_ids(self):
        return self.example.CLIENTS

    def client_dataset(self, client_id):
        return Rows(self.example.rows_of(client_id, self.tokenizer))

    def validation_dataset(self):
        return Rows(self.example.rows_of("3", self.tokenizer, "validation"))

    def test_dataset(self):
        return Rows(self.example.rows_of("3", self.tokenizer, "test"))


@pytest.mark.slow
def test_the_example_and_fedbe_fit_come_to_the_same_tensors(tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = load_example().main()
        config = tmp_path / "run.yaml"
        config.write_text(
            f"""
model: {{name: "fedbe:micro"}}
data: {{class_path: {__name__}.SumsData, init_args: {{batch_size: 8}}}}
algorithm: {{class_path: fedbe.algorithms.BlockExpansion, init_args: {{positions: [2, 5]}}}}
federation: {{rounds: 3}}
logger: none
output: {tmp_path / "run"}
"""
        )
        assert main(["fit", f"--config={config}"]) == 0
    finally:
        torch.set_num_threads(threads)
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert expected and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_example_stays_short_enough_to_be_read_at_once():
    assert len(EXAMPLE.read_text().splitlines()) <= 120
