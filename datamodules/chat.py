"""Conversations as tokens: through a tokenizer's chat template or a plain one, and which tokens are answers."""

import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fedbe.datamodules.conversations import ROLES, Conversation, Message, is_answer, read_messages, read_tools

PLAIN_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
"""What a prompt becomes where the tokenizer has no chat template."""

RESERVED = frozenset(
    {"conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "return_assistant_tokens_mask"}
)
"""Names that a template's further arguments cannot have."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        ids: The token ids.
        scored: Whether each token is of an answer, or ends one.
        turns: For each of the assistant's messages that says anything, its tokens among `ids`; empty where the template
            leaves it out.
    """

    ids: list[int]
    scored: list[bool]
    turns: list[range]


@dataclass(frozen=True)
class Span:
    """Where an answer stands in a text.

    Attributes:
        start: Its first character.
        own_end: The end of what the message itself says.
        end: The end of what closes it.
    """

    start: int
    own_end: int
    end: int


class ChatTemplate:
    """A tokenizer's chat template at a fixed date, and where the answers are in what it writes.

    Answers stand where the template says so by ``{% generation %}``. Elsewhere each is looked for by a marker: the
    conversation is rendered again with a word in the answer's place, all other messages as they are, so that what a
    template does with the last message or the last question is the same in both. An answer begins where the marker
    does, or, where the template opens the message in another way than one of content alone (reasoning), behind the
    prompt for an answer. It ends with what the template puts behind a last answer, as far as it stands there.

    Control tokens that a message's text holds are text: they do not begin or end a turn.

    Args:
        tokenizer: The tokenizer; it must tell where in the text its tokens are.
        date: The date and time that a template asks for.
        arguments: Further arguments of the template, for example ``{"enable_thinking": False}``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: datetime, arguments: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.date = date
        self.arguments = arguments
        self._control: dict[str, list[str]] = {}

    @cached_property
    def roles(self) -> frozenset[str]:
        """The roles that there are: the usual ones, and words in quotation marks of the template."""
        return ROLES | set(re.findall(r"""['"](\w+)['"]""", self._source(None)))

    def encode(self, conversation: Conversation) -> Encoded:
        """Return a conversation as tokens.

        Raises:
            jinja2.TemplateError: The template refuses it.
        """
        cut, messages, tools = self._cut(conversation)
        source = self._source(tools)
        if _GENERATION.search(source):
            text, found = self._render(messages, tools, spans=True)
            spans: list[Span | None] = [Span(start, end, end) for start, end in found]
            answers = [is_answer(message) for message in messages if message["role"] == "assistant"]
            spans += [None] * (len(answers) - len(spans))
            if len(spans) == len(answers):
                spans = [span for span, says in zip(spans, answers, strict=True) if says]
        else:
            text, _ = self._render(messages, tools)
            spans = self._marked(text, messages, tools)
        return tokens_of(self.tokenizer, text, cut, spans)

    def _cut(self, conversation: Conversation) -> tuple[str, list[Message], Any]:
        """Return a character that nothing holds, and the conversation with it inside each control token of a text."""
        everything = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, default=str)
        cut = next(chr(code) for code in _PRIVATE if chr(code) not in everything)
        control, special = self._control_tokens(self._source(conversation.tools)), self._control_tokens("")
        messages: list[Message] = [
            {**cut_apart(rest, special if role == "assistant" else control, cut), "role": role}
            for role, rest in ((message["role"], message) for message in conversation.messages)
        ]
        return cut, messages, cut_apart(conversation.tools, control, cut)

    def _control_tokens(self, source: str) -> list[str]:
        if source not in self._control:
            self._control[source] = control_tokens(self.tokenizer, source)
        return self._control[source]

    def _source(self, tools: Any) -> str:
        return dated(self.tokenizer.get_chat_template(None, tools), self.date)

    def _render(
        self, messages: Sequence[Message], tools: Any = None, prompt: bool = False, spans: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        rendered: Any = render_jinja_template(  # annotated as a string; it returns two lists
            conversations=[list(messages)],
            tools=tools,
            chat_template=self._source(tools),
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            **{**self.tokenizer.special_tokens_map, **self.arguments},
        )
        texts, found = rendered
        return texts[0], found[0] if spans else []

    def _marked(self, text: str, messages: Sequence[Message], tools: Any) -> list[Span | None]:
        spans: list[Span | None] = []
        floor = 0
        for index, message in enumerate(messages):
            if is_answer(message):
                span = self._span(text, messages, index, tools, floor)
                floor = span.end if span is not None else floor
                spans.append(span)
        return spans

    def _span(self, text: str, messages: Sequence[Message], index: int, tools: Any, floor: int) -> Span | None:
        """Return where an answer stands in a text; ``None`` if the template leaves it out."""
        marker = unused("Answer", text)
        marked, whole = self._with_marker(messages, index, tools, marker)
        opening, found, rest = marked.partition(marker)
        if not found:
            return None
        agreed = shared(text, opening)
        place = text.rfind(self._prompt, floor, agreed) if self._prompt and agreed < len(opening) else -1
        start = max(floor, agreed if place < 0 else place + len(self._prompt))
        own_end = len(text) - shared(text[::-1], rest[::-1]) if whole else text.find(rest, start)
        if own_end <= start:
            return None
        behind, eos = text[own_end:], str(self.tokenizer.eos_token or "")
        closing = shared(behind, self._closing if index + 1 < len(messages) else behind)
        return Span(start, own_end, own_end + max(closing, len(eos) if behind.startswith(eos) else 0))

    def _with_marker(self, messages: Sequence[Message], index: int, tools: Any, marker: str) -> tuple[str, bool]:
        """Return the conversation with a marker as an answer, and whether all that follows is in it.

        The marker stands alone. A template may refuse that, because the results of the answer's calls follow; then it
        stands beside the calls, and where that shows nothing of it the conversation ends with it.
        """
        before, message, after = messages[:index], messages[index], messages[index + 1 :]
        bare: Message = {"role": message["role"], "content": marker}
        try:
            return self._render([*before, bare, *after], tools)[0], True
        except TemplateError:
            beside, _ = self._render([*before, {**message, "content": marker}, *after], tools)
            return (beside, True) if marker in beside else (self._render([*before, bare], tools)[0], False)

    @cached_property
    def _closing(self) -> str:
        """What the template puts behind an answer that is the last message."""
        messages: list[Message] = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Reply"}]
        return self._probe(lambda: self._render(messages)[0].rpartition("Reply")[2])

    @cached_property
    def _prompt(self) -> str:
        """What the template puts behind a question to ask for the answer."""
        messages: list[Message] = [{"role": "user", "content": "Question"}]

        def prompt() -> str:
            alone, asking = self._render(messages)[0], self._render(messages, prompt=True)[0]
            return asking[len(alone) :] if asking.startswith(alone) else ""

        return self._probe(prompt)

    @staticmethod
    def _probe(made: Callable[[], str]) -> str:
        try:
            return made()
        except TemplateError:
            return ""


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Any = None,
    date: str = "2025-01-01",
    **arguments: Any,
) -> tuple[list[int], list[bool]]:
    """Return a conversation in the tokenizer's chat template, and which tokens belong to the assistant's turns.

    Args:
        tokenizer: The tokenizer.
        messages: The conversation, as `fedbe.datamodules.conversations.read_messages` reads it.
        tools: Descriptions of tools as JSON schemas.
        date: The date that the template is told.
        arguments: Further arguments of the template.
    """
    chat = ChatTemplate(tokenizer, datetime.fromisoformat(date), arguments)
    encoded = chat.encode(Conversation(read_messages(list(messages), chat.roles), read_tools(tools)))
    return encoded.ids, encoded.scored


def dated(template: str, date: datetime) -> str:
    """Return a chat template whose ``strftime_now`` writes a fixed date."""
    if "strftime_now" not in template:
        return template
    codes = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters]
    steps = "".join(f"|replace({json.dumps(code)}, {json.dumps(date.strftime(code))})" for code in codes)
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n{template}"


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """Return the special tokens, and the added tokens that a template writes; longer ones first."""
    added = tokenizer.added_tokens_decoder.values()
    found = {t.content for t in added if t.special or (t.content in template and not t.content.isspace())}
    return sorted(found, key=lambda token: (-len(token), token))


def cut_apart(value: Any, control: Sequence[str], cut: str) -> Any:
    """Return a value with a character put behind the first one of each control token in its strings."""
    if isinstance(value, str):
        for token in control:
            value = value.replace(token, token[0] + cut + token[1:])
        return value
    if isinstance(value, Mapping):
        return {key: cut_apart(item, control, cut) for key, item in value.items()}
    return [cut_apart(item, control, cut) for item in value] if isinstance(value, list) else value


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, cut: str, spans: Sequence[Span | None]) -> Encoded:
    """Return a text as tokens of which none reaches across a cut, and which of them are in spans.

    Args:
        tokenizer: What turns text into tokens.
        text: The text.
        cut: The character that cuts it, and is no part of it.
        spans: Where answers stand in the text; ``None`` for one that does not.
    """
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    start = 0
    for piece in text.split(cut):
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids += encoded["input_ids"]
        places += [(start + left, start + right) for left, right in encoded["offset_mapping"]]
        start += len(piece) + len(cut)
    turns = [_tokens_in(span, places) for span in spans]
    scored = [False] * len(ids)
    for turn in turns:
        scored[turn.start : turn.stop] = [True] * len(turn)
    return Encoded(ids, scored, turns)


def _tokens_in(span: Span | None, places: Sequence[tuple[int, int]]) -> range:
    """Return the tokens that hold a character of what the message says, or lie wholly in what closes it."""
    if span is None:
        return range(0)
    inside = [
        token
        for token, (left, right) in enumerate(places)
        if right > span.start and (left < span.own_end or right <= span.end) and left < span.end
    ]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def plain_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str) -> Encoded:
    """Return a conversation in the plain template: each response is followed by the end token.

    It is tokenised turn by turn, so that no token spans the border between a prompt and its response. Control tokens
    in the messages are text.
    """
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    control = control_tokens(tokenizer, "")
    turns: list[range] = []
    answered = False
    for message in messages:
        before, content, after = _plain_turn(message, template, answered)
        answer = message["role"] == "assistant"
        cut = unused("\ue000", before + content + after)
        pieces = (before + cut_apart(content, control, cut) + after).split(cut)
        turn = [token for piece in pieces for token in _ids(tokenizer, piece)] + (end if answer else [])
        if is_answer(message):
            turns.append(range(len(ids), len(ids) + len(turn)))
        ids += turn
        answered = answered or answer
    scored = [False] * len(ids)
    for span in turns:
        scored[span.start : span.stop] = [True] * len(span)
    return Encoded(ids, scored, turns)


def plain_chat_template(template: str) -> str:
    """Return the plain template as a chat template, for the tokenizer of a model that was trained on it."""
    before, _, after = template.partition("{prompt}")
    question = f"{json.dumps(before)} + message['content'] + {json.dumps(after)}"
    return (
        "{{ bos_token }}{% set turn = namespace(answered=false) %}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}"
        "{% endgeneration %}{% set turn.answered = true %}"
        "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% else %}{% if turn.answered %}{{ '\\n\\n' }}{% endif %}{{ " + question + " }}{% endif %}{% endfor %}"
    )


def shared(left: str, right: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


def unused(word: str, text: str) -> str:
    """Return a word, made longer until the text does not hold it."""
    while word in text:
        word += word[-1]
    return word


def _plain_turn(message: Message, template: str, answered: bool) -> tuple[str, str, str]:
    if message["role"] == "assistant":
        return "", message["content"], ""
    if message["role"] == "system":
        return "", message["content"], "\n\n"
    before, _, after = template.partition("{prompt}")
    return ("\n\n" if answered else "") + before, message["content"], after


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found
