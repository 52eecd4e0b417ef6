"""Instruction tuning: the loss is on the responses only."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedbe.corpora import SPLITS, Corpus
from fedbe.data import Batch, pad_samples, pad_token_id
from fedbe.datamodules.chat import (
    PLAIN_TEMPLATE,
    RESERVED,
    ChatTemplate,
    Encoded,
    chat_tokens,
    plain_chat_template,
    plain_tokens,
)
from fedbe.datamodules.conversations import (
    ROLES,
    Conversation,
    Message,
    RowFault,
    is_answer,
    read_messages,
    read_tools,
)
from fedbe.datamodules.corpus import (
    CorpusDataModule,
    length_problem,
    tokenizer_problems,
    vocabulary_problems,
)
from fedbe.datamodules.flower import FlowerPartitioner
from fedbe.datamodules.partition import Partitioner, raise_problems
from fedbe.datamodules.tokens import TokenSamples
from fedbe.errors import ConfigError, Problem
from fedbe.text.ragged import Ragged

__all__ = ["PLAIN_TEMPLATE", "InstructionDataModule", "chat_tokens"]

EMPTY = "are empty"
UNSCORED = "have no token"
_MOST_FAULTS = 5


class ColumnFault(ValueError):
    """Raised for a row that cannot be read.

    Args:
        argument: The argument that names the column.
        reason: Where in the row, and what is wrong there.
    """

    def __init__(self, argument: str, reason: str) -> None:
        super().__init__(reason)
        self.argument = argument


@contextmanager
def faults_of(argument: str, column: str) -> Iterator[None]:
    """Report the faults of a row that are found inside as those of a column, named by an argument."""
    try:
        yield
    except RowFault as fault:
        raise ColumnFault(argument, f"{column}{fault}") from fault


class InstructionDataModule(CorpusDataModule):
    """Prompts and responses, or whole conversations, for next-token prediction of the responses.

    The tokenizer's chat template is used where it has one (see `fedbe.datamodules.chat.ChatTemplate`); each assistant
    turn is scored, with what the template puts after it. Otherwise a conversation is the begin token, the system prompt
    and a blank line, each prompt in ``template`` and each response followed by the end token and a line break before
    the next prompt; the tokenizer then gets this as its chat template, so that the trained model is served with it.
    Control tokens in the text of messages are text.

    Conversations are cut at the right to ``max_length`` tokens; those without a scored token left are left out. These,
    and answers without a scored token, are counted in `left_out`. Batches hold ``input_ids``, ``labels`` and
    ``attention_mask``, each ``[samples, tokens]``.

    Args:
        corpus: Source of the three splits.
        partitioner: Rule that gives each client its rows.
        prompt_column: Column of the prompt.
        response_column: Column of the response.
        messages_column: Column of whole conversations, lists of messages with ``role`` and ``content`` (or ``from`` and
            ``value``), and ``tool_calls`` where a tool is called; replaces the two above.
        system_prompt: Put before each conversation that does not begin with a system message.
        max_length: Most tokens of a sample.
        batch_size: Samples in a client's local step.
        eval_batch_size: Samples in a validation or test batch; ``None`` for four times `batch_size`.
        template: What a prompt becomes where there is no chat template; holds ``{prompt}`` once.
        context_column: Column of what a prompt is about (Alpaca's ``input``, Dolly's ``context``), put after it and a
            blank line; ``None`` for none.
        tools_column: Column of the tools of a conversation, lists of JSON schemas or JSON of them; read if it is there.
        chat_template_kwargs: Further arguments of the chat template, for example ``{"enable_thinking": false}``.
        date: Date, or date and time, that a chat template is told which asks for today's: the same in all runs.
    """

    def __init__(
        self,
        corpus: Corpus,
        partitioner: Partitioner | FlowerPartitioner,
        prompt_column: str = "prompt",
        response_column: str = "response",
        messages_column: str | None = None,
        system_prompt: str | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        template: str = PLAIN_TEMPLATE,
        context_column: str | None = None,
        tools_column: str = "tools",
        chat_template_kwargs: dict[str, Any] | None = None,
        date: str = "2025-01-01",
    ) -> None:
        super().__init__(corpus, partitioner, batch_size, eval_batch_size)
        self.prompt_column = prompt_column
        self.response_column = response_column
        self.messages_column = messages_column
        self.system_prompt = system_prompt
        self.max_length = max_length
        self.template = template
        self.context_column = context_column
        self.tools_column = tools_column
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.date = date

    @property
    def dropped(self) -> int:
        """Number of rows, of all splits, that make no sample."""
        unowned = [item for item in self.left_out if item.split == "train" and item.holder is None]
        return sum(len(item.rows) for item in self.left_out if item.what == "rows" and item not in unowned)

    def setup(self, stage: str | None = None) -> None:
        """Load, divide and tokenise; a second call does nothing."""
        super().setup(stage)
        if self.tokenizer is not None and self._is_plain(self.tokenizer):
            self.tokenizer.chat_template = plain_chat_template(self.template)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """Join samples, padded at the right to the longest, with an attention mask."""
        return pad_samples(samples, pad_token_id(self.tokenizer), attention_mask=True)

    def _columns(self) -> Mapping[str, str]:
        if self.messages_column is not None:
            return {"messages_column": self.messages_column}
        context = {} if self.context_column is None else {"context_column": self.context_column}
        return {"prompt_column": self.prompt_column, "response_column": self.response_column, **context}

    def _text_columns(self) -> Mapping[str, str]:
        return self._columns() if self.messages_column is None else {}

    def _argument_problems(self, key: str) -> list[Problem]:
        problems = length_problem(f"{key}.max_length", self.max_length, 2)
        if self.template.count("{prompt}") != 1:
            problems.append(Problem(f"{key}.template", self.template, "must hold {prompt} exactly once."))
        try:
            datetime.fromisoformat(self.date)
        except ValueError:
            problems.append(Problem(f"{key}.date", self.date, 'is no date; write one such as "2025-01-31".'))
        for name in sorted(RESERVED & self.chat_template_kwargs.keys()):
            remedy = "is given to every chat template anyway; leave it out."
            problems.append(Problem(f"{key}.chat_template_kwargs.{name}", self.chat_template_kwargs[name], remedy))
        return problems

    def _model_problems(self, key: str) -> list[Problem]:
        problems = tokenizer_problems(f"{key}.max_length", self.max_length, self.tokenizer, self.model_config)
        if self.tokenizer is not None and not self._is_plain(self.tokenizer) and not self.tokenizer.is_fast:
            remedy = "has a tokenizer that does not say where in a text its tokens are, and answers are found by that."
            problems.append(Problem("model.name", type(self.tokenizer).__name__, remedy))
        return problems

    def _row_problems(self, key: str) -> list[Problem]:
        if self.messages_column is None:
            return []
        faults: dict[str, list[str]] = {}
        for split in SPLITS:
            rows = self._split(split)
            for number, row in enumerate(rows.select_columns(self._read_columns(rows))):
                try:
                    self._conversation(row)
                except ColumnFault as fault:
                    faults.setdefault(fault.argument, []).append(f"row {number} of the {split} split: {fault}")
        return [Problem(f"{key}.{name}", getattr(self, name), _listed(found)) for name, found in faults.items()]

    def _read_columns(self, rows: Dataset) -> list[str]:
        """Return the columns that are read of some rows; the tools' are optional."""
        has_tools = self.messages_column is not None and self.tools_column in rows.column_names
        return [*dict.fromkeys([*self._columns().values(), *[self.tools_column] * has_tools])]

    def _encode(self, rows: Dataset, split: str) -> TokenSamples:
        if self.tokenizer is None:
            raise RuntimeError("`setup` needs a tokenizer; call `connect` first.")
        scored: list[torch.Tensor] = []
        sequences = Ragged.of(self._sequences(rows, self.tokenizer, scored))
        raise_problems(vocabulary_problems(sequences.tokens, self.model_config))
        return TokenSamples(sequences, torch.cat(scored) if scored else torch.zeros(0, dtype=torch.bool))

    def _sequences(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, masks: list[torch.Tensor]
    ) -> Iterator[list[int]]:
        """Yield the tokens of each row that makes a sample, keep its mask, and count what is left out."""
        rows_out: dict[str, list[int]] = {}
        answers_out: dict[str, list[int]] = {}
        for number, row in enumerate(rows.select_columns(self._read_columns(rows))):
            conversation = self._conversation(row)
            encoded = self._tokens(tokenizer, conversation, number)
            mask = torch.tensor(encoded.scored[: self.max_length], dtype=torch.bool)
            reasons = unscored_answers(conversation, encoded, self.max_length)
            if mask[1:].any():  # nothing comes before the first token to predict it from
                masks.append(mask)
                yield encoded.ids[: self.max_length]
                for reason in reasons:
                    answers_out.setdefault(reason, []).append(number)
            else:
                why = "have no message" if not conversation.messages else "have no response"
                said = [reason for reason in reasons if reason != EMPTY]
                rows_out.setdefault(f"{why}{said[0].removeprefix(UNSCORED) if said else ''}", []).append(number)
        for what, found in (("rows", rows_out), ("answers", answers_out)):
            for reason, numbers in found.items():
                self._leave_out(reason, numbers, what)

    def _is_plain(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        return tokenizer.chat_template in (None, "", plain_chat_template(self.template))

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, number: int) -> Encoded:
        split, _, numbers = self._at
        if not conversation.messages:
            return Encoded([], [], [])
        try:
            if self._is_plain(tokenizer):
                return plain_tokens(tokenizer, conversation.messages, self.template)
            return self._chat(tokenizer).encode(conversation)
        except TemplateError as error:
            roles = " ".join(message["role"] for message in conversation.messages)
            where = f"row {numbers[number]} of the {split} split, a conversation of these roles"
            remedy = f"the tokenizer's chat template refuses {where}: {error}"
            column = "messages_column" if self.messages_column is not None else "prompt_column"
            raise ConfigError(Problem(f"{self.key}.{column}", roles, remedy)) from error

    def _chat(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        kept: ChatTemplate | None = getattr(self, "_chat_template", None)
        if kept is None or kept.tokenizer is not tokenizer:
            kept = ChatTemplate(tokenizer, datetime.fromisoformat(self.date), self.chat_template_kwargs)
            self._chat_template = kept
        return kept

    def _conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Return a row's conversation.

        Raises:
            ColumnFault: It is none, or a tool is called and there is no chat template to write that.
        """
        if self.messages_column is None:
            return Conversation(self._with_system_prompt(self._prompted(row)))
        plain = self.tokenizer is not None and self._is_plain(self.tokenizer)
        chat = self.tokenizer is not None and not plain
        roles = self._chat(self.tokenizer).roles if chat and self.tokenizer is not None else ROLES
        with faults_of("tools_column", self.tools_column):
            tools = read_tools(row.get(self.tools_column))
        with faults_of("messages_column", self.messages_column):
            messages = read_messages(row[self.messages_column], roles)
            called = next((index for index, message in enumerate(messages) if message.get("tool_calls")), None)
            if plain and called is not None:
                remedy = "calls a tool, which only a chat template can write: name a model whose tokenizer has one."
                raise RowFault(f"[{called}].tool_calls", remedy)
        return Conversation(self._with_system_prompt(messages), tools)

    def _prompted(self, row: Mapping[str, Any]) -> list[Message]:
        prompt, response = row[self.prompt_column] or "", row[self.response_column] or ""
        context = (row[self.context_column] or "") if self.context_column is not None else ""
        question = f"{prompt}\n\n{context}" if context.strip() else prompt
        return [{"role": "user", "content": question}, {"role": "assistant", "content": response}]

    def _with_system_prompt(self, messages: list[Message]) -> list[Message]:
        if self.system_prompt is None or not messages or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]


def unscored_answers(conversation: Conversation, encoded: Encoded, max_length: int) -> list[str]:
    """Return why answers of a conversation are not trained on: a reason for each that is not."""
    answers = [message for message in conversation.messages if message["role"] == "assistant"]
    empty = len(answers) - sum(map(is_answer, answers))
    written = [turn for turn in encoded.turns if turn]
    late = sum(turn.start >= max_length for turn in written)
    return [
        *[EMPTY] * empty,
        *[f"{UNSCORED} that the chat template writes"] * (len(encoded.turns) - len(written)),
        *[f"{UNSCORED} within `max_length` = {max_length}"] * late,
    ]


def _listed(faults: Sequence[str]) -> str:
    more = len(faults) - _MOST_FAULTS
    return "; ".join([*faults[:_MOST_FAULTS], *[f"and {more} more rows."] * (more > 0)])
