"""The gate itself: a logistic unit on what the lowest blocks make of a token, and the hooks that apply it."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from fedbe.errors import ExpansionError
from fedbe.expansion.running_mean import earlier_in, mean_so_far
from fedbe.modeling.passes import stop_at

Mode = Literal["open", "shut", "soft", "hard"]
# An Adam step moves each parameter by about the learning rate η: with this the logit moves by up to about 4000·η in a
# model of any width, so that the gate keeps up with the blocks at their η. Measured: 30 to 100 steps at 1e-3.
_PACE = 4096.0


class TokenGate(nn.Module):
    """One logistic unit, g in [0, 1] per token, shared by all expanded blocks: x + g·(Block(x) - x).

    Its logit is (4096/2h)·(w·z + √(2h)·b), z being the standardised features: factors that let Adam train it at the
    blocks' learning rate in a model of any width, and the bias as fast as all weights together.

    It sees the output of a base block below all expanded ones, so that nothing it sees is ever trained, and the mean
    of that output over the positions so far; in a bidirectional encoder, over the whole sequence. In training mode it
    is open, whatever its mode.

    Attributes:
        weight: On the standardised features, shape [2h]: the token's own, then the mean.
        bias: A scalar. Weight and bias are zero at first: g is ½ in mode soft, 0 in mode hard.
        mean: Of the features, shape [2h]; see `standardise`.
        scale: What the features are divided by, shape [2h].
        block: The base block (from 0) whose output it sees.
        causal: Whether the mean ends at the token itself; `install_gate` finds out.
        opening: g of the last pass in mode soft or hard, shape [batch, sequence], otherwise None.

    Args:
        hidden_size: h, the width of the model.
        block: The base block (from 0) whose output it sees.
        mode: See `mode`.

    Source: ours.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, hidden_size: int, block: int = 0, mode: Mode = "soft") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2 * hidden_size))
        self.register_buffer("scale", torch.ones(2 * hidden_size))
        self.block = block
        self.mode = mode
        self.causal = True
        self.opening: Tensor | None = None
        self._depth = 0
        self._hidden: Tensor | None = None
        self._padding: object = None
        self._seen: tuple[nn.Module, ...] = ()  # in a tuple: not a submodule of the gate
        self._arguments: tuple[str, ...] = ()
        self._handles: list[RemovableHandle] = []

    @property
    def mode(self) -> Mode:
        """Between blocks and stream: `open` (g = 1: the expanded model), `shut` (g = 0: the base), `soft`, `hard`.

        The first two are exact to the bit; `soft` is the logistic function, `hard` 1 where its argument is above 0.
        """
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise ExpansionError(f"`mode` = {mode!r}: a gate is one of {', '.join(get_args(Mode))}.")
        self._mode = mode

    @property
    def hidden(self) -> Tensor | None:
        """What it saw in the last pass, [batch, sequence, h], with padding; ``None`` before the first."""
        return self._hidden

    def look_at(self, hidden: Tensor | None, padding: Tensor | None) -> None:
        """See this, a part of the last pass, in place of all of it.

        Args:
            hidden: As in `hidden`.
            padding: Its attention mask, [batch, sequence].
        """
        self._hidden, self._padding = hidden, padding

    @property
    def features(self) -> Tensor:
        """The features of the last pass, which began with an empty cache: [tokens, 2h], float32, without padding."""
        if self._hidden is None:
            raise ExpansionError("The gate has seen no tokens yet: run the model first.")
        hidden, mask = self._hidden.float(), self._mask(self._hidden)
        return torch.cat([hidden, mean_so_far(hidden, mask, self.causal)], dim=-1)[mask]

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of g, shape [tokens], for features of shape [tokens, 2h]."""
        weight, bias = self._effective()
        return (features.float() - self.mean) @ weight + bias

    def standardise(self, features: Tensor) -> None:
        """Take mean and scale from features [tokens, 2h] of text that every party can draw: the base model's own."""
        deviation = features.float().std(dim=0, unbiased=False)
        # A unit that hardly moves here may move a lot elsewhere.
        scale = deviation.clamp(min=0.01 * deviation.median().item())
        self.mean.copy_(features.float().mean(dim=0))
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))

    def to_dict(self) -> dict[str, object]:
        """Return the arguments that build this gate, for JSON."""
        return {"hidden_size": len(self.weight) // 2, "block": self.block, "mode": self.mode}

    def attach(self, base: nn.Module, seen: nn.Module, gated: Iterable[nn.Module], depth: int) -> None:
        """Hook into a model; `install_gate` calls this.

        Args:
            base: The module that receives the attention mask.
            seen: The block whose output is seen.
            gated: The blocks that are gated.
            depth: The number of blocks.
        """
        self._depth, self._seen = depth, (seen,)
        self._arguments = tuple(inspect.signature(base.forward).parameters)
        self._handles.append(base.register_forward_pre_hook(self._note_padding, with_kwargs=True))
        self._handles.append(seen.register_forward_hook(self._see, with_kwargs=True))
        for block in gated:
            # First among the hooks, so that those recording hidden states see the gated output.
            self._handles.append(block.register_forward_hook(self._gate_block, prepend=True, with_kwargs=True))

    def attach_adapter(self, layer: LoraLayer) -> None:
        """Gate one adapted layer; `gate_adapters` calls this."""
        # Behind B the adapter's product stands alone, so that what the layer itself computes stays untouched.
        for factor in layer.lora_B.values():
            self._handles.append(factor.register_forward_hook(self._gate_adapter))

    def detach(self) -> None:
        """Take all hooks out, and forget the last pass."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen = ()
        self._hidden = self.opening = self._padding = None

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """End the forward pass inside the block, and the block with it, as soon as the features are there."""
        (seen,) = self._seen
        with stop_at(seen) as stopped:
            yield
        if stopped.reached:
            self._note(stopped.output)

    def _note_padding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        self._padding = given.get("attention_mask")

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = self._note(output)
        if not self.training and self.mode in ("soft", "hard"):
            cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
            self.opening = self._open(hidden, cache)

    def _note(self, output: Any) -> Tensor:
        """Keep and return what the seen block gives, without history, so that a model that holds it can be copied."""
        self._hidden, self.opening = first_output(output).detach(), None
        return self._hidden

    @torch.no_grad()
    def _open(self, hidden: Tensor, cache: Cache | None) -> Tensor:
        # The logit is linear: of all earlier tokens it needs one number each, not their h features.
        weight, bias = self._effective()
        of_token, of_mean = (
            (hidden.float() - mean) @ w for mean, w in zip(self.mean.chunk(2), weight.chunk(2), strict=True)
        )
        earlier = earlier_in(cache, self._depth, self.block)
        context = mean_so_far(of_mean[..., None], self._mask(hidden), self.causal, earlier)
        logits = of_token + context[..., 0] + bias
        return logits.sigmoid() if self.mode == "soft" else (logits > 0).float()

    def _effective(self) -> tuple[Tensor, Tensor]:
        """Return the weight [2h] on the features without their mean, and the bias []."""
        size = len(self.weight)
        return _PACE / size * self.weight.float() / self.scale, _PACE * size**-0.5 * self.bias.float()

    def _mask(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        mask = self._padding
        if mask is None:
            return torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < length:
            raise ExpansionError(
                "The gate needs `attention_mask` as [batch, sequence], to leave out padding. A static cache makes "
                "another one: generate with the default cache."
            )
        return mask[:, -length:].to(hidden.device).bool()

    def _gate_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.training or self.mode == "open":
            return output
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if self.mode == "shut":
            gated = hidden
        else:
            # Exact at both ends, which x + g·(Block(x) - x) is not at g = 1.
            gated = torch.lerp(hidden, first_output(output), self._weights(hidden, type(module).__name__))
        return type(output)((gated, *output[1:])) if isinstance(output, (tuple, list)) else gated

    def _gate_adapter(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.training or self.mode == "open":
            return output
        if self.mode == "shut":
            return torch.zeros_like(output)
        return output * self._weights(output, "an adapted layer")

    def _weights(self, like: Tensor, where: str) -> Tensor:
        if self.opening is None or self.opening.numel() != like.shape[:-1].numel():
            raise ExpansionError(f"The tokens in {where} are not those that the gate has seen: it cannot be gated.")
        return self.opening.reshape(*like.shape[:-1], 1).to(like)


def first_output(output: Any) -> Tensor:
    """Return the hidden states among what a block gives."""
    first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return first
