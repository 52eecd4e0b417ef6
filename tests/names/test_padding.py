"""What a text is classified as does not depend on what else is in its batch, here and in the exported model."""

import pytest
import torch
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

from fedbe.modeling.base_model import BaseModel
from names.classifiers import WORDS, answers, bert, llama, text_data, trained, words

ALL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = {
    "another id in the configuration": (ALL, {"pad_token_id": 3}),
    "none in the configuration": (ALL, {"pad_token_id": None}),
    "an id of no token in the configuration": (ALL, {"pad_token_id": -1}),
    "none in the tokenizer": ({**ALL, "pad_token": None}, {"pad_token_id": 0}),
    "the end token": ({**ALL, "pad_token": "</s>"}, {"pad_token_id": 0}),
    "neither, but an end token": ({"eos_token": "</s>"}, {"pad_token_id": None}),
    "none at all": ({}, {"pad_token_id": None}),
    "padding at the left": ({**ALL, "padding_side": "left"}, {"pad_token_id": 3}),
}


@pytest.mark.parametrize("special", SPECIAL)
def test_logits_of_a_decoder_do_not_depend_on_the_batch(tmp_path, special):
    tokens, settings = SPECIAL[special]
    base = BaseModel(str(llama(tmp_path / "base", words(**tokens), **settings)), "sequence-classification")
    data = text_data(tmp_path / "rows", {"good": "yes", "bad": "no"})
    data.connect(base.processor, base.config, 0)
    data.setup()
    model = base.load(data.class_names, getattr(base.processor, "pad_token_id", None))
    samples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(0)} for ids in ([4, 7], [5], [6, 7, 8, 9])]
    with torch.no_grad():
        together = model(**data.collate(samples)).logits
        alone = torch.cat([model(**data.collate([sample])).logits for sample in samples])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    "special", ["another id in the configuration", "neither, but an end token", "padding at the left"]
)
def test_the_exported_decoder_answers_alike_in_any_batch(tmp_path, special):
    tokens, settings = SPECIAL[special]
    base = llama(tmp_path / "base", words(**tokens), **settings)
    result = trained(base, text_data(tmp_path / "rows", {"good": "yes", "bad": "no"}), tmp_path / "run")
    texts = ["a good b", "a bad", "bad", "c good b a c a"]
    alone = answers(result.path / "model", texts)
    assert alone[:2] == ["yes", "no"]
    assert answers(result.path / "model", texts, batch_size=4) == alone


def test_positions_that_are_counted_from_the_padding_id_stay_where_they_are(tmp_path):
    config = RobertaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=1,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    words(pad_token="<pad>").save_pretrained(tmp_path)  # id 0
    base = BaseModel(str(tmp_path), "sequence-classification")
    assert base.processor.pad_token_id == 1
    assert base.load(["a", "b"], 0).config.pad_token_id == 1


def test_an_encoders_padding_is_the_tokenizers(tmp_path):
    result = trained(bert(tmp_path / "base"), text_data(tmp_path / "rows", {"good": 1, "bad": 0}), tmp_path / "run")
    assert AutoTokenizer.from_pretrained(result.path / "model").pad_token_id == 0
