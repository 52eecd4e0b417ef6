"""Instruction tuning: the loss is on the responses only."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedbe.corpora import Corpus
from fedbe.data import Batch, pad_samples, pad_token_id
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

_log = logging.getLogger(__name__)

Message = Mapping[str, str]
"""A turn of a conversation: ``role`` (``system``, ``user`` or ``assistant``) and ``content``."""

PLAIN_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
"""What a prompt becomes where the tokenizer has no chat template."""


class InstructionDataModule(CorpusDataModule):
    """Prompts and responses, or whole conversations, for next-token prediction of the responses.

    The tokenizer's chat template is used where it has one; each assistant turn is scored, with what the template puts
    after it. Otherwise a conversation is the begin token, the system prompt and a blank line, each prompt in
    ``template`` and each response followed by the end token and a line break before the next prompt. Conversations
    are cut at the right to ``max_length`` tokens; those without a scored token left are dropped and counted in
    `dropped`. Batches hold ``input_ids``, ``labels`` and ``attention_mask``, each ``[samples, tokens]``.

    Args:
        corpus: Source of the three splits.
        partitioner: Rule that gives each client its rows.
        prompt_column: Column of the prompt.
        response_column: Column of the response.
        messages_column: Column of whole conversations, lists of ``role`` and ``content``; replaces the two above.
        system_prompt: Put before each conversation that does not begin with a system message.
        max_length: Most tokens of a sample.
        batch_size: Samples in a client's local step.
        eval_batch_size: Samples in a validation or test batch; ``None`` for four times `batch_size`.
        template: What a prompt becomes where there is no chat template; holds ``{prompt}`` once.
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
    ) -> None:
        super().__init__(corpus, partitioner, batch_size, eval_batch_size)
        self.prompt_column = prompt_column
        self.response_column = response_column
        self.messages_column = messages_column
        self.system_prompt = system_prompt
        self.max_length = max_length
        self.template = template
        self.dropped = 0

    def setup(self, stage: str | None = None) -> None:
        """Load, divide and tokenise; a second call does nothing."""
        done = bool(self.client_ids)
        super().setup(stage)
        if self.dropped and not done:
            _log.warning("%d samples have no response within `max_length` = %d.", self.dropped, self.max_length)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """Join samples, padded at the right to the longest, with an attention mask."""
        return pad_samples(samples, pad_token_id(self.tokenizer), attention_mask=True)

    def _columns(self) -> Mapping[str, str]:
        if self.messages_column is not None:
            return {"messages_column": self.messages_column}
        return {"prompt_column": self.prompt_column, "response_column": self.response_column}

    def _text_columns(self) -> Mapping[str, str]:
        return self._columns() if self.messages_column is None else {}

    def _argument_problems(self, key: str) -> list[Problem]:
        problems = length_problem(f"{key}.max_length", self.max_length, 2)
        if self.template.count("{prompt}") != 1:
            problems.append(Problem(f"{key}.template", self.template, "must hold {prompt} exactly once."))
        return problems

    def _model_problems(self, key: str) -> list[Problem]:
        return tokenizer_problems(f"{key}.max_length", self.max_length, self.tokenizer, self.model_config)

    def _row_problems(self, key: str) -> list[Problem]:
        if self.messages_column is None:
            return []
        turns = self._split("train")[0][self.messages_column]
        if isinstance(turns, list) and all({"role", "content"} <= set(turn) for turn in turns):
            return []
        remedy = "must hold lists of messages, each with `role` and `content`."
        return [Problem(f"{key}.messages_column", self.messages_column, remedy)]

    def _encode(self, rows: Dataset, split: str) -> TokenSamples:
        if self.tokenizer is None:
            raise RuntimeError("`setup` needs a tokenizer; call `connect` first.")
        scored: list[torch.Tensor] = []
        sequences = Ragged.of(self._sequences(rows, self.tokenizer, scored))
        self.dropped += len(rows) - len(sequences)
        raise_problems(vocabulary_problems(sequences.tokens, self.model_config))
        return TokenSamples(sequences, torch.cat(scored) if scored else torch.zeros(0, dtype=torch.bool))

    def _sequences(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, masks: list[torch.Tensor]
    ) -> Iterator[list[int]]:
        for row in rows:
            if tokenizer.chat_template:
                ids, scored = self._chat_tokens(tokenizer, self._messages(row))
            else:
                ids, scored = plain_tokens(tokenizer, self._messages(row), self.template)
            ids, mask = ids[: self.max_length], torch.tensor(scored[: self.max_length], dtype=torch.bool)
            if mask[1:].any():  # nothing comes before the first token to predict it from
                masks.append(mask)
                yield ids

    def _chat_tokens(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
    ) -> tuple[list[int], list[bool]]:
        try:
            return chat_tokens(tokenizer, messages)
        except TemplateError as error:
            roles = " ".join(message["role"] for message in messages)
            remedy = f"the tokenizer's chat template refuses a conversation of these roles: {error}"
            raise ConfigError(Problem(self.key, roles, remedy)) from error

    def _messages(self, row: Mapping[str, Any]) -> list[Message]:
        messages: list[Message]
        if self.messages_column is not None:
            messages = [{"role": turn["role"], "content": turn["content"]} for turn in row[self.messages_column] or []]
        else:
            prompt, response = row[self.prompt_column] or "", row[self.response_column] or ""
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            messages = messages if response else messages[:1]
        has_system = bool(messages) and messages[0]["role"] == "system"
        if self.system_prompt is not None and not has_system:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Return a conversation in the tokenizer's chat template, and which tokens belong to the assistant's turns.

    A turn's tokens are those that the conversation up to and with the turn has over the one before it with the prompt
    for an answer. Templates that write earlier turns differently once later ones follow are compared as far as equal.
    """
    full = _templated(tokenizer, messages)
    scored = [False] * len(full)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _agreement(full, _templated(tokenizer, messages[:turn], add_generation_prompt=True))
            end = _agreement(full, _templated(tokenizer, messages[: turn + 1]))
            scored[start:end] = [True] * max(end - start, 0)
    return full, scored


def plain_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str = PLAIN_TEMPLATE
) -> tuple[list[int], list[bool]]:
    """Return a conversation in the plain template, and which tokens are responses or end one."""
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    scored = [False] * len(ids)
    answered = False
    for message in messages:
        answer = message["role"] == "assistant"
        if answer:
            text = message["content"]
        elif message["role"] == "system":
            text = message["content"] + "\n\n"
        else:
            text = ("\n\n" if answered else "") + template.replace("{prompt}", message["content"])
        # Tokenised turn by turn, so that no token spans the border between a prompt and its response.
        turn = [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *(end if answer else [])]
        ids += turn
        scored += [answer] * len(turn)
        answered = answered or answer
    return ids, scored


def _templated(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> list[int]:
    ids: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=add_generation_prompt, return_dict=False
    )
    return list(ids)


def _agreement(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
