import logging

import pytest
import torch
from transformers import GPT2Config, LlamaForCausalLM, OPTConfig

from fedbe.data import LeftOut
from fedbe.datamodules import CausalLMDataModule, IIDPartitioner, NaturalPartitioner
from fedbe.errors import ConfigError, Facts

SPEECHES = {"text": ["Speak, speak.", "Ay.", "A" * 50, "", "No more talking on it."], "who": list("abaab")}


def module(corpus, tokenizer, config, rows=SPEECHES, partitioner=None, **arguments) -> CausalLMDataModule:
    held_out = {"text": ["What is it?", "Come, come.", "Soft!"], "who": ["a", "a", "b"]}
    source = corpus(rows, held_out, held_out)
    data = CausalLMDataModule(source, partitioner or NaturalPartitioner("who"), **{"sequence_length": 16, **arguments})
    data.connect(tokenizer, config, seed=0)
    data.setup()
    return data


def texts(decode, data: CausalLMDataModule, client: str) -> list[str]:
    dataset = data.client_dataset(client)
    return [decode(data.tokenizer, dataset[index]["input_ids"]) for index in range(len(dataset))]


def test_a_begin_token_stands_before_each_document_and_empty_ones_are_left_out(corpus, tokenizer, llama_config, decode):
    data = module(corpus, tokenizer, llama_config, pack=False)
    assert texts(decode, data, "b") == ["<s>Ay.</s>", "<s>No more talking", " on it.</s>"]
    assert texts(decode, data, "a")[0] == "<s>Speak, speak.</s>"
    assert len(texts(decode, data, "a")) == 1 + 4
    (left_out,) = data.left_out
    assert left_out == LeftOut("train", "have no text", (3,), holder="a")


@pytest.mark.parametrize(
    ("arguments", "text", "expected"),
    [
        ({"pack": False, "end_token": False}, "Ay.", "<s>Ay."),
        ({"end_token": True}, "Ay.", "<s>Ay.</s>"),
        ({}, "Ay.", "<s>Ay."),
        ({"pack": False}, "<s>Ay.</s>", "<s>Ay.</s>"),
        ({"pack": False, "end_token": False}, "<s>Ay.</s>", "<s>Ay.</s>"),
        ({"separate_documents": False, "end_token": True}, "<s>Ay.", "<s>Ay.</s>"),
    ],
)
def test_begin_and_end_token_stand_once_as_asked(corpus, tokenizer, llama_config, decode, arguments, text, expected):
    data = module(corpus, tokenizer, llama_config, rows={"text": [text], "who": ["b"]}, **arguments)
    assert texts(decode, data, "b") == [expected]


def test_an_end_token_that_the_tokenizer_lacks_is_reported(corpus, make_tokenizer, llama_config):
    with pytest.raises(ConfigError, match="end_token"):
        module(corpus, make_tokenizer(eos=False), llama_config, end_token=True)


def test_an_end_token_follows_where_there_is_no_begin_token(corpus, make_tokenizer, llama_config, decode):
    data = module(corpus, make_tokenizer(bos=False), llama_config, pack=False)
    assert texts(decode, data, "b")[0] == "Ay.</s>"


def test_nothing_is_added_where_there_is_neither(corpus, make_tokenizer, llama_config, decode):
    data = module(corpus, make_tokenizer(bos=False, eos=False), llama_config, pack=False)
    assert texts(decode, data, "b")[0] == "Ay."


def test_concatenation_scores_across_documents_and_carries_no_positions(corpus, tokenizer, llama_config, decode):
    data = module(corpus, tokenizer, llama_config, separate_documents=False)
    assert texts(decode, data, "b") == ["<s>Ay.<s>No more tal", "king on it."]
    sample = data.client_dataset("b")[0]
    assert torch.equal(sample["labels"], sample["input_ids"])
    assert set(sample) == {"input_ids", "labels"}


def test_separated_documents_restart_positions_and_do_not_predict_each_other(corpus, tokenizer, llama_config, decode):
    data = module(corpus, tokenizer, llama_config, rows={"text": ["Ay.", "No more."], "who": ["b", "b"]})
    (sample,) = [data.client_dataset("b")[index] for index in range(len(data.client_dataset("b")))]
    assert decode(tokenizer, sample["input_ids"]) == "<s>No more.<s>Ay."
    assert sample["position_ids"].tolist() == [*range(9), *range(4)]
    assert (sample["labels"] == -100).nonzero()[:, 0].tolist() == [0, 9]


def test_a_family_that_lets_attention_cross_gets_no_positions_and_says_so(corpus, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        data = module(corpus, tokenizer, OPTConfig(vocab_size=200))
    sample = data.client_dataset("a")[0]
    assert "position_ids" not in sample and sample["labels"][0] == -100
    assert "does not separate" in caplog.text


def test_the_loss_of_padded_batches_is_that_of_the_scored_tokens(corpus, tokenizer, llama_config):
    data = module(corpus, tokenizer, llama_config, batch_size=8)
    (batch,) = data.client_dataloader("b", torch.Generator().manual_seed(0))
    model = LlamaForCausalLM(llama_config).eval()
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss
        alone = []
        for text in ("Ay.", "No more talking", " on it."):
            ids = tokenizer(text, add_special_tokens=not text.startswith(" "), return_tensors="pt").input_ids
            alone.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
    torch.testing.assert_close(loss, sum(alone) / (3 + 15 + 6))


def test_held_out_splits_can_be_capped(corpus, tokenizer, llama_config):
    data = module(corpus, tokenizer, llama_config, max_validation_sequences=1, pack=False)
    assert (len(data.validation_dataset()), len(data.test_dataset())) == (1, 3)


def test_the_same_seed_gives_each_client_the_same_samples(corpus, tokenizer, llama_config, decode):
    rows = {"text": [f"speech {number}" for number in range(30)], "who": ["a"] * 30}
    first, second = (module(corpus, tokenizer, llama_config, rows, IIDPartitioner(3)) for _ in range(2))
    assert [texts(decode, first, client) for client in "012"] == [texts(decode, second, client) for client in "012"]
    orders = [
        [batch["input_ids"].tolist() for batch in data.client_dataloader("1", torch.Generator().manual_seed(4))]
        for data in (first, second)
    ]
    assert orders[0] == orders[1]


def test_a_second_setup_does_nothing_and_each_split_is_loaded_once(corpus, tokenizer, llama_config):
    data = module(corpus, tokenizer, llama_config)
    before = data.client_dataset("a")
    data.setup()
    assert data.client_dataset("a") is before
    assert sorted(data.corpus.loads) == ["test", "train", "validation"]


def test_every_mistake_is_reported_at_once_with_its_key(corpus):
    data = CausalLMDataModule(
        corpus({"text": ["a", "b"]}), IIDPartitioner(3), sequence_length=1, batch_size=0, max_test_sequences=0
    )
    found = {problem.key: problem.value for problem in data.check("data.init_args", Facts())}
    assert found == {
        "data.init_args.batch_size": 0,
        "data.init_args.eval_batch_size": 0,
        "data.init_args.sequence_length": 1,
        "data.init_args.max_test_sequences": 0,
        "data.init_args.partitioner.init_args.clients": 3,
    }


@pytest.mark.parametrize(
    ("rows", "key", "value"),
    [
        ({"body": ["a"]}, "text_column", "text"),
        ({"text": [[1], [2]]}, "text_column", "text"),
        ({"text": []}, "corpus", "train"),
    ],
)
def test_a_bad_corpus_is_reported(corpus, rows: dict, key: str, value: str):
    held_out = {"text": ["a"]}
    data = CausalLMDataModule(corpus(rows, held_out, held_out), IIDPartitioner(1))
    (problem,) = data.check("data.init_args", Facts())
    assert (problem.key, problem.value) == (f"data.init_args.{key}", value)


def test_a_corpus_that_cannot_be_read_is_reported_and_not_raised(corpus):
    class Broken(corpus):
        def load(self, split: str):
            raise OSError("disk on fire")

    problems = CausalLMDataModule(Broken({"text": ["a", "b"]}), IIDPartitioner(1)).check("data.init_args", Facts())
    assert [problem.value for problem in problems] == ["train", "validation", "test"]
    assert all("disk on fire" in problem.remedy for problem in problems)


def test_sequences_longer_than_the_model_has_positions_for_are_refused(corpus, tokenizer):
    data = CausalLMDataModule(corpus({"text": ["a", "b"]}), IIDPartitioner(1), sequence_length=65)
    with pytest.raises(ConfigError, match=r"sequence_length = 65: the model has 64 positions"):
        data.connect(tokenizer, GPT2Config(vocab_size=200, n_positions=64), seed=0)


def test_a_model_without_a_tokenizer_is_refused(corpus, llama_config):
    data = CausalLMDataModule(corpus({"text": ["a", "b"]}), IIDPartitioner(1), sequence_length=16)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        data.connect(None, llama_config, seed=0)


def test_a_tokenizer_of_another_model_is_refused(corpus, tokenizer, llama_config):
    llama_config.vocab_size = 20
    with pytest.raises(ConfigError, match="embeds only 20"):
        module(corpus, tokenizer, llama_config)


def test_a_client_whose_texts_are_all_empty_is_refused(corpus, tokenizer, llama_config):
    with pytest.raises(ConfigError, match="partitioner = 'b'"):
        module(corpus, tokenizer, llama_config, rows={"text": ["a", "", ""], "who": ["a", "b", "b"]})
