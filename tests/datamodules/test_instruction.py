import json
import re

import pytest
import torch

from fedbe.data import IGNORED
from fedbe.datamodules import IIDPartitioner, InstructionDataModule
from fedbe.errors import ConfigError, Facts

CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
)
ROWS = {"prompt": ["2+2?", "Who?"], "response": ["4", "Nobody."]}


def module(corpus, tokenizer, config, rows=ROWS, **arguments) -> InstructionDataModule:
    data = InstructionDataModule(corpus(rows), IIDPartitioner(1), **{"max_length": 64, **arguments})
    data.connect(tokenizer, config, seed=0)
    data.setup("fit")
    return data


def read(decode, data: InstructionDataModule, index: int = 0) -> tuple[str, str]:
    """Return a whole sample as text, and what of it is scored."""
    sample = data.client_dataset("0")[index]
    ids, labels = sample["input_ids"], sample["labels"]
    return decode(data.tokenizer, ids), decode(data.tokenizer, labels[labels != IGNORED])


def test_the_plain_template_scores_the_response_and_the_end_token(corpus, tokenizer, llama_config, decode):
    whole, scored = read(decode, module(corpus, tokenizer, llama_config))
    assert whole == "<s>### Instruction:\n2<unk>2?\n\n### Response:\n4</s>"
    assert scored == "4</s>"


def test_another_plain_template_and_a_system_prompt(corpus, tokenizer, llama_config, decode):
    data = module(corpus, tokenizer, llama_config, template="Q: {prompt} A: ", system_prompt="Be brief.")
    assert read(decode, data, 1) == ("<s>Be brief.\n\nQ: Who? A: Nobody.</s>", "Nobody.</s>")


def test_the_chat_template_scores_the_response_and_what_ends_it(corpus, make_tokenizer, llama_config, decode):
    data = module(corpus, make_tokenizer(chat_template=CHAT), llama_config, system_prompt="Be brief.")
    whole, scored = read(decode, data, 1)
    assert whole == "<|system|>Be brief.</s><|user|>Who?</s><|assistant|>Nobody.</s>"
    assert scored == "Nobody.</s>"


@pytest.mark.parametrize("changes", [{"chat": CHAT}, {"template": "Q: {prompt} A: "}, {"bos": False}])
def test_samples_by_another_tokenizer_or_template_have_another_fingerprint(
    corpus, make_tokenizer, llama_config, changes
):
    def found(chat=None, bos=True, **arguments):
        return module(corpus, make_tokenizer(chat_template=chat, bos=bos), llama_config, **arguments).fingerprint()

    before, after = found(), found(**changes)
    assert before == found() and before.keys() == after.keys() == {"validation", "test", "client 0"}
    assert all(before[part] != after[part] for part in before)


def conversation(*contents: str) -> dict:
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, contents, strict=False)]
    return {"messages": [turns, turns]}


@pytest.mark.parametrize("chat", [CHAT, None])
def test_each_assistant_turn_of_a_conversation_is_scored(corpus, make_tokenizer, llama_config, decode, chat):
    rows = conversation("Hi", "Yo", "Bye", "Ta")
    data = module(
        corpus,
        make_tokenizer(chat_template=chat),
        llama_config,
        rows,
        messages_column="messages",
        template="{prompt}: ",
    )
    whole, scored = read(decode, data)
    assert scored == "Yo</s>Ta</s>"
    assert whole == (
        "<|user|>Hi</s><|assistant|>Yo</s><|user|>Bye</s><|assistant|>Ta</s>"
        if chat
        else "<s>Hi: Yo</s>\n\nBye: Ta</s>"
    )


def test_long_samples_are_cut_at_the_right_and_those_without_response_dropped_and_counted(
    corpus, tokenizer, llama_config, decode
):
    rows = {"prompt": ["a", "a" * 20, "b"], "response": ["b" * 30, "never seen", ""]}
    held_out = {"prompt": ["a"], "response": ["b"]}
    source = corpus(rows, held_out, held_out)
    data = InstructionDataModule(source, IIDPartitioner(1), max_length=12, template="{prompt}:")
    data.connect(tokenizer, llama_config, seed=0)
    data.setup()
    assert len(data.client_dataset("0")) == 1
    assert read(decode, data) == ("<s>a:" + "b" * 9, "b" * 9)
    assert data.dropped == 2  # the long prompt and the empty response
    data.setup()
    assert data.dropped == 2


def test_batches_are_padded_with_an_attention_mask(corpus, tokenizer, llama_config):
    data = module(corpus, tokenizer, llama_config)
    (batch,) = data.client_dataloader("0", torch.Generator())
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (2, batch["input_ids"].shape[1])
    )
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"prompt_column": "question"}, "prompt_column"),
        ({"messages_column": "turns"}, "messages_column"),
        ({"messages_column": "prompt"}, "messages_column"),
        ({"template": "no place"}, "template"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_mistakes_are_reported_with_their_key(corpus, arguments: dict, key: str):
    (problem,) = InstructionDataModule(corpus(ROWS), IIDPartitioner(1), **arguments).check("data.init_args", Facts())
    assert problem.key == f"data.init_args.{key}"
    assert problem.value == arguments[key]


def test_a_chat_template_that_refuses_the_roles_is_a_named_error(corpus, make_tokenizer, llama_config):
    with pytest.raises(ConfigError, match="System role not supported"):
        module(corpus, make_tokenizer(chat_template=NO_SYSTEM), llama_config, system_prompt="Be brief.")


GOOD = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("chat", [CHAT, None])
@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ([{"role": "user"}], r"row 2 of the validation split: messages\[0\] has no `content`"),
        ([{"role": "narrator", "content": "x"}], r"messages\[0\].role is 'narrator'"),
        ([{"content": "x"}], r"messages\[0\] has no `role`"),
    ],
)
def test_every_row_of_every_split_is_checked_before_work_starts(corpus, make_tokenizer, llama_config, chat, odd, words):
    good, bad = {"messages": [json.dumps(GOOD)] * 4}, {"messages": [json.dumps(x) for x in (GOOD, GOOD, odd, GOOD)]}
    data = InstructionDataModule(corpus(good, bad, good), IIDPartitioner(1), messages_column="messages", max_length=64)
    data.connect(make_tokenizer(chat_template=chat), llama_config, seed=0)
    (problem,) = data.check("data.init_args", Facts())
    assert (problem.key, problem.value) == ("data.init_args.messages_column", "messages")
    assert re.search(words, problem.remedy)


@pytest.mark.parametrize("chat", [CHAT, None])
def test_rows_and_answers_that_are_not_trained_on_are_counted(corpus, make_tokenizer, llama_config, chat):
    answered = [*GOOD, {"role": "user", "content": "c"}, {"role": "assistant", "content": ""}]
    late = [{"role": "user", "content": "c" * 70}, {"role": "assistant", "content": "d"}]
    first = [{"role": "assistant", "content": "hello"}, *GOOD]
    odd = [GOOD, [], None, GOOD[:1], late, answered, [*GOOD, *late], first]
    rows = {"messages": [None if turns is None else json.dumps(turns) for turns in odd]}
    data = InstructionDataModule(
        corpus(rows, {"messages": [json.dumps(GOOD)]}), IIDPartitioner(1), messages_column="messages", max_length=64
    )
    data.connect(make_tokenizer(chat_template=chat), llama_config, seed=0)
    data.setup("fit")
    found = {(item.split, item.what, item.reason): item.rows for item in data.left_out if item.split == "train"}
    assert found == {
        ("train", "rows", "have no message"): (1, 2),
        ("train", "rows", "have no response"): (3,),
        ("train", "rows", "have no response within `max_length` = 64"): (4,),
        ("train", "answers", "are empty"): (5,),
        ("train", "answers", "have no token within `max_length` = 64"): (6,),
    }
    assert len(data.client_dataset("0")) == 4


def test_a_refusal_of_the_template_names_the_row(corpus, make_tokenizer, llama_config):
    rows = {"messages": [GOOD, [{"role": "system", "content": "x"}, *GOOD]]}
    with pytest.raises(ConfigError, match="row 1 of the train split") as caught:
        module(corpus, make_tokenizer(chat_template=NO_SYSTEM), llama_config, rows, messages_column="messages")
    assert caught.value.problems[0].key == "data.init_args.messages_column"


def test_a_call_needs_a_chat_template(corpus, tokenizer, llama_config):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    with pytest.raises(ConfigError, match=r"messages\[1\].tool_calls calls a tool"):
        module(corpus, tokenizer, llama_config, {"messages": [[GOOD[0], call]] * 2}, messages_column="messages")


def test_tools_that_are_none_are_reported_under_their_key(corpus, make_tokenizer, llama_config):
    rows = {"messages": [GOOD] * 2, "tools": ["f, g"] * 2}
    with pytest.raises(ConfigError) as caught:
        module(corpus, make_tokenizer(chat_template=CHAT), llama_config, rows, messages_column="messages")
    (problem,) = caught.value.problems
    assert problem.key == "data.init_args.tools_column" and "row 0 of the train split: tools is text" in problem.remedy


def test_a_prompts_context_follows_it_after_a_blank_line(corpus, tokenizer, llama_config, decode):
    rows = {**ROWS, "context": ["In base ten.", None]}
    data = module(corpus, tokenizer, llama_config, rows, template="{prompt} ", context_column="context")
    whole = {read(decode, data, index)[0] for index in range(2)}
    assert whole == {"<s>2<unk>2?\n\nIn base ten. 4</s>", "<s>Who? Nobody.</s>"}


def test_what_was_trained_on_is_the_tokenizers_chat_template_afterwards(corpus, tokenizer, llama_config, decode):
    data = module(corpus, tokenizer, llama_config, template="Q: {prompt} A: ")
    served = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)
    assert served == "<s>Q: Who? A: "
    again = module(corpus, tokenizer, llama_config, template="Q: {prompt} A: ")
    assert read(decode, again, 1) == read(decode, data, 1) == ("<s>Q: Who? A: Nobody.</s>", "Nobody.</s>")


def test_the_template_is_told_one_date_in_all_runs(corpus, make_tokenizer, llama_config, decode):
    clock = "{{ strftime_now('%d.%m.%Y %H:%M') }} " + CHAT
    whole = {}
    for date in (None, "2024-07-26T09:30"):
        given = {} if date is None else {"date": date}
        data = module(corpus, make_tokenizer(chat_template=clock), llama_config, **given)
        whole[date] = read(decode, data, 1)[0].split(" <")[0]
    assert whole == {None: "01.01.2025 00:00", "2024-07-26T09:30": "26.07.2024 09:30"}


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"date": "yesterday"}, "date"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"context_column": "input"}, "context_column"),
    ],
)
def test_arguments_of_templates_are_checked(corpus, arguments, key):
    (problem,) = InstructionDataModule(corpus(ROWS), IIDPartitioner(1), **arguments).check("data.init_args", Facts())
    assert problem.key == f"data.init_args.{key}"
