import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedbe.assets import micro_path
from fedbe.cli.main import main
from fedbe.errors import ConfigError
from fedbe.pretraining.pretrain import (
    Exports,
    PretrainConfig,
    PretrainModule,
    Windows,
    build_model,
    consecutive,
    held_out_score,
    pretrain,
    token_stream,
    train_tokenizer,
)

WORDS = [
    "the",
    "a",
    "of",
    "model",
    "tensor",
    "returns",
    "value",
    "when",
    "given",
    "list",
    "dict",
    "block",
    "layer",
    "is",
    "not",
    "and",
]


class Sentences:
    """Random words, the same at every call."""

    def __init__(self, words=100, column="text"):
        self.words, self.column = words, column

    def load(self, split):
        source = random.Random(split)
        return Dataset.from_dict({self.column: [" ".join(source.choices(WORDS, k=self.words)) for _ in range(20)]})

    def check(self, key, facts):
        return []


def tiny(output, **changes):
    config = PretrainConfig(
        output=str(output),
        corpus=Sentences(),
        vocabulary_size=290,
        hidden_size=16,
        intermediate_size=32,
        blocks=2,
        heads=2,
        key_value_heads=1,
        sequence_length=32,
        batch_size=4,
        steps=30,
        interval=10,
        warmup_steps=5,
        learning_rate=1e-2,
        validation_sequences=8,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return pretrain(tiny(tmp_path_factory.mktemp("run") / "tiny"))


class Stop(Exception):
    pass


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_result_loads_without_fedbe(finished):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    assert model.dtype == torch.float32 and model.config.num_hidden_layers == 2
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len(tokenizer) == model.config.vocab_size == 290
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


@pytest.mark.parametrize("text", ["", "  two  spaces\n\n\tand a tab", "ünïcode 😀 §", "def f(x):\n    return x\n"])
def test_any_text_survives_the_tokenizer(finished, text):
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_lowers_the_held_out_loss_and_reports_each_interval(finished):
    found = lines(finished.parent)
    assert [line["step"] for line in found] == [10, 20, 30]
    assert found[-1]["validation_loss"] < found[0]["validation_loss"] < 6
    assert found[-1]["validation_accuracy"] > 0.04


def test_the_model_card_tells_data_loss_licences_and_the_way_back(finished):
    card = (finished / "README.md").read_text()
    for part in ("30 steps", "| train | 20 |", "Sentences", "accuracy", "fedbe pretrain --config", "Apache-2.0"):
        assert part in card


def test_a_stopped_run_continues_to_the_same_weights(finished, tmp_path, monkeypatch):
    ordinary = Exports.on_train_epoch_end

    def stop(self, trainer, module):
        ordinary(self, trainer, module)
        if trainer.global_step == 10:
            raise Stop

    config = tiny(tmp_path / "stopped")
    monkeypatch.setattr(Exports, "on_train_epoch_end", stop)
    with pytest.raises(Stop):
        pretrain(config)
    meanwhile = load_file(tmp_path / "stopped" / "latest" / "model.safetensors")
    monkeypatch.undo()
    continued, expected = load_file(pretrain(config) / "model.safetensors"), load_file(finished / "model.safetensors")
    assert all(torch.equal(continued[name], expected[name]) for name in expected)
    assert not all(torch.equal(meanwhile[name], expected[name]) for name in expected)
    assert [line["step"] for line in lines(tmp_path / "stopped")] == [10, 20, 30]


def test_a_finished_run_is_not_trained_again(finished):
    before = load_file(finished / "model.safetensors")
    again = load_file(pretrain(tiny(finished.parent)) / "model.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)
    assert len(lines(finished.parent)) == 3


def test_the_seed_decides_the_weights(tmp_path):
    tokenizer = train_tokenizer(["some text"], 290, 32)
    first, same, other = (build_model(tiny(tmp_path, seed=seed), tokenizer).state_dict() for seed in (0, 0, 1))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name])


def test_every_document_stands_between_begin_and_end():
    tokenizer = train_tokenizer(WORDS, 290, 32)
    stream = token_stream(tokenizer, ["the model", "a list"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (stream == bos).sum() == (stream == eos).sum() == 2
    assert tokenizer.decode(stream.tolist()) == "<|bos|>the model<|eos|><|bos|>a list<|eos|>"


def test_consecutive_sequences_do_not_overlap():
    assert consecutive(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_training_sequences_are_whole_pieces_of_the_stream(tmp_path):
    data = Windows({"train": torch.arange(1000), "validation": torch.arange(100)}, tiny(tmp_path))
    sequences = torch.cat([batch for (batch,) in data.train_dataloader()])
    assert sequences.shape == (40, 32)
    assert (sequences - sequences[:, :1] == torch.arange(32)).all()
    assert len(sequences[:, 0].unique()) > 20


def test_held_out_score_counts_every_predicted_token_once(tmp_path):
    config = tiny(tmp_path)
    module = PretrainModule(build_model(config, train_tokenizer(WORDS, 290, 32)), config)
    stream = torch.randint(290, (32 * 6 + 5,), generator=torch.Generator().manual_seed(0))
    loss, accuracy = held_out_score(module, stream)
    tokens = stream[: 32 * 6].view(6, 32)
    expected = module.model(input_ids=tokens, labels=tokens).loss.item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert accuracy * 6 * 31 == pytest.approx(round(accuracy * 6 * 31))


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"steps": 0, "blocks": -1}, ["blocks", "steps"]),
        ({"steps": 25, "vocabulary_size": 100}, ["vocabulary_size", "steps"]),
        ({"heads": 3}, ["heads"]),
        ({"heads": 4, "key_value_heads": 3}, ["key_value_heads"]),
        ({"sequence_length": 1}, ["sequence_length"]),
    ],
)
def test_settings_that_cannot_work_are_all_reported_and_nothing_is_written(tmp_path, changes, keys):
    with pytest.raises(ConfigError) as caught:
        pretrain(tiny(tmp_path / "run", **changes))
    assert [problem.key for problem in caught.value.problems] == keys
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("corpus", [Sentences(words=0), Sentences(column="body")])
def test_a_corpus_without_text_is_reported_and_nothing_is_written(tmp_path, corpus):
    with pytest.raises(ConfigError, match="corpus"):
        pretrain(tiny(tmp_path / "run", corpus=corpus, sequence_length=128))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_else_is_not_touched(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="output"):
        pretrain(tiny(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_run_is_not_continued_with_other_settings(finished):
    with pytest.raises(ConfigError, match=r"learning_rate = 0\.5"):
        pretrain(tiny(finished.parent, learning_rate=0.5))


def test_the_shipped_config_is_what_the_command_runs(monkeypatch):
    configs = []
    monkeypatch.setattr("fedbe.pretraining.pretrain.pretrain", configs.append)
    path = Path(__file__).parents[2] / "configs" / "pretrain_micro.yaml"
    assert main(["pretrain", "--config", str(path)]) == 0
    assert configs[0].settings == PretrainConfig(output="").settings


def test_the_packaged_model_is_small_and_knows_english():
    folder = micro_path()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6e6
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "Returns the value of the given key, or the default value if the key is not in the dictionary."
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert loss < 0.6 * torch.log(torch.tensor(len(tokenizer))).item()
