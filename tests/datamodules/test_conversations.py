"""Messages of every form become one; what is no conversation is named with its place."""

import pytest

from fedbe.datamodules.conversations import RowFault, is_answer, read_messages, read_tools


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (None, []),
        ([], []),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], [("user", "a"), ("assistant", "b")]),
        ([{"role": "human", "content": "a"}], [("user", "a")]),
        ([{"role": "assistant", "content": None}], [("assistant", "")]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], [("user", "ab")]),
        ('[{"role": "user", "content": "a"}]', [("user", "a")]),
        ([{"role": "user", "content": "a", "from": None, "value": None}], [("user", "a")]),
        ([{"from": "observation", "value": "12"}], [("tool", "12")]),
    ],
)
def test_messages_have_a_role_and_text(turns, expected):
    assert [(message["role"], message["content"]) for message in read_messages(turns)] == expected


def test_a_call_of_sharegpt_is_one_of_a_tool():
    (message,) = read_messages([{"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}])
    assert message["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}] and is_answer(message)


def test_further_keys_are_kept_and_nulls_are_not():
    call = {"id": "1", "function": {"name": "f", "arguments": {"x": None, "y": 2}}, "index": None}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", "name": None}]
    assert read_messages(turns) == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"y": 2}}}],
            "reasoning_content": "hm",
        }
    ]


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ("hello", ""),
        (["hello"], "[0]"),
        ([{"content": "a"}], "[0]"),
        ([{"role": "user"}], "[0]"),
        ([{"role": None, "content": "a"}], "[0]"),
        ([{"role": "user", "content": "a"}, {"role": "narrator", "content": "a"}], "[1].role"),
        ([{"role": "user", "content": 7}], "[0].content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "[0].content[0]"),
        ([{"role": "assistant", "content": "", "tool_calls": "f()"}], "[0].tool_calls"),
        ([{"role": "assistant", "content": "", "tool_calls": ["f()"]}], "[0].tool_calls[0]"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_place(turns, field):
    with pytest.raises(RowFault) as caught:
        read_messages(turns)
    assert caught.value.field == field


def test_a_role_of_the_template_is_taken():
    assert read_messages([{"role": "narrator", "content": "a"}], {"narrator"})[0]["role"] == "narrator"


@pytest.mark.parametrize("tools", [None, [], ""])
def test_no_tools(tools):
    assert read_tools(tools) is None


def test_tools_are_schemas_or_their_json():
    schema = {"type": "function", "function": {"name": "f", "strict": None}}
    expected = [{"type": "function", "function": {"name": "f"}}]
    assert read_tools([schema]) == read_tools('[{"type": "function", "function": {"name": "f"}}]') == expected
    with pytest.raises(RowFault):
        read_tools("f, g")
