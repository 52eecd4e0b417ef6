"""Conversations from rows: messages in one form, whatever form the data has them in."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
"""Roles that are taken as they are; others only where the chat template has a word for them."""

_SAME = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_CALL = "function_call"
_OWN = ("role", "from", "content", "value", "tool_calls")

Message = dict[str, Any]
"""A message as chat templates take it: ``role``, ``content`` (a string), and what else the row has for it."""


@dataclass(frozen=True)
class Conversation:
    """A conversation and the tools that may be called in it.

    Attributes:
        messages: Its messages, in order.
        tools: Descriptions of tools as JSON schemas; ``None`` where there are none.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class RowFault(ValueError):
    """Raised for a row that is no conversation.

    Args:
        field: Where in the column, for example ``[2].content``.
        reason: What is wrong there, and what to write instead.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field = field


def read_messages(turns: Any, roles: Collection[str] = ROLES) -> list[Message]:
    """Return a row's messages; none for a row without any.

    Messages have ``role`` and ``content``, or ``from`` and ``value`` (ShareGPT). Content is text, a list of parts of
    text, or null beside ``tool_calls`` and reasoning; arguments of calls in JSON are read. Further keys are kept, and
    null values, which stand for keys that other rows have, are taken out.

    Args:
        turns: The value of the column.
        roles: The roles that there are.

    Raises:
        RowFault: It is no list of messages.
    """
    turns = _parsed(turns)
    if turns is None:
        return []
    if not isinstance(turns, list):
        raise RowFault("", f"is {_kind(turns)}; it must be a list of messages, each with `role` and `content`.")
    return [_message(_parsed(turn), f"[{index}]", roles) for index, turn in enumerate(turns)]


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return a row's tools: a list of JSON schemas, or JSON of it; ``None`` for none.

    Raises:
        RowFault: It is something else.
    """
    tools = _parsed(tools)
    if tools is None or tools == [] or tools == "":
        return None
    if not isinstance(tools, list):
        raise RowFault("", f"is {_kind(tools)}; it must be a list of tools, each a JSON schema.")
    found = [_without_nulls(_parsed(tool)) for tool in tools]
    strange = next((index for index, tool in enumerate(found) if not isinstance(tool, dict)), None)
    if strange is not None:
        raise RowFault(f"[{strange}]", f"is {_kind(found[strange])}; it must be a JSON schema.")
    return found


def is_answer(message: Mapping[str, Any]) -> bool:
    """Whether a message is one of the assistant's and says, calls or thinks something."""
    if message["role"] != "assistant":
        return False
    return any(message.get(field) for field in ("content", "tool_calls", "reasoning_content", "reasoning", "thinking"))


def _message(turn: Any, field: str, roles: Collection[str]) -> Message:
    if not isinstance(turn, Mapping):
        raise RowFault(field, f"is {_kind(turn)}; a message has `role` and `content`.")
    role, content = _first(turn, "role", "from"), _first(turn, "content", "value")
    if not isinstance(role, str):
        raise RowFault(field, "has no `role` (or `from`).")
    if not any(key in turn for key in ("content", "value", "tool_calls")):
        raise RowFault(field, "has no `content` (or `value`).")
    rest = {key: _without_nulls(value) for key, value in turn.items() if key not in _OWN and value is not None}
    if role == _CALL:
        return {"role": "assistant", "content": "", "tool_calls": _calls([content], f"{field}.value"), **rest}
    role = role if role in roles else _SAME.get(role.lower(), role)
    if role not in roles:
        known = ", ".join(sorted(roles))
        raise RowFault(f"{field}.role", f"is {role!r}, which is none of the roles {known}.")
    calls = _parsed(turn.get("tool_calls"))
    called = {"tool_calls": _calls(calls, f"{field}.tool_calls")} if calls else {}
    return {"role": role, "content": _text(content, role, f"{field}.content"), **called, **rest}


def _text(content: Any, role: str, field: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part, f"{field}[{index}]") for index, part in enumerate(content))
    if role == "tool" and isinstance(content, Mapping):
        return json.dumps(_without_nulls(content), ensure_ascii=False)
    raise RowFault(field, f"is {_kind(content)}; it must be text or a list of parts of text.")


def _part(part: Any, field: str) -> str:
    part = _parsed(part) if not isinstance(part, str) else part
    text = part.get("text") if isinstance(part, Mapping) else part
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, Mapping) else None
    raise RowFault(field, f"is a part of type {kind!r} and not of text.")


def _calls(calls: Any, field: str) -> list[Any]:
    if not isinstance(calls, list):
        raise RowFault(field, f"is {_kind(calls)}; it must be a list of calls.")
    found = [_without_nulls(_parsed(call)) for call in calls]
    strange = next((index for index, call in enumerate(found) if not isinstance(call, dict)), None)
    if strange is not None:
        raise RowFault(f"{field}[{strange}]", f"is {_kind(found[strange])}; a call has a name and arguments.")
    return [_with_arguments(call) for call in found]


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call whose arguments are an object where they are JSON of one: templates write JSON themselves."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    arguments = _parsed(call.get("arguments"))
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _first(turn: Mapping[str, Any], *keys: str) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _parsed(value: Any) -> Any:
    """Return what a string of JSON says; other values, and strings of no object or list, as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    names = {str: "text", dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
