import importlib.util
from pathlib import Path

import torch

from fedbe.datamodules import describe_partition
from fedbe.errors import Facts

EXAMPLE = Path(__file__).with_name("custom_example.py")


def test_the_readmes_data_module_works_and_is_short(tokenizer, llama_config):
    assert len(EXAMPLE.read_text().splitlines()) < 40
    spec = importlib.util.spec_from_file_location("custom_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    data = example.SumsData(clients=3)
    assert data.check("data.init_args", Facts()) == []
    data.connect(tokenizer, llama_config, seed=0)
    data.prepare_data()
    data.setup("fit")
    assert [share.samples for share in describe_partition(data)] == [64] * 3
    batches = [
        [batch["input_ids"].tolist() for batch in data.client_dataloader("2", torch.Generator().manual_seed(1))]
        for _ in range(2)
    ]
    assert batches[0] == batches[1] and len(batches[0]) == 8
    assert len(data.test_dataset()) == len(data.validation_dataset()) == 64
