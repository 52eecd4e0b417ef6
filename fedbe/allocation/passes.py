"""Real passes through the parts of a model, which count FLOPs and see what autograd saves."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from fedbe.modeling.base_model import forward_options
from fedbe.modeling.freezing import freeze, set_training_modes
from fedbe.modeling.passes import Pass, replaced


@dataclass
class Call:
    """The arguments of a block in a real forward pass.

    Attributes:
        args: By position, the hidden states first; or none.
        kwargs: By name, the hidden states as ``hidden_states`` where they are not in `args`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states, [batch, sequence, hidden]."""
        hidden: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block on other hidden states and return the hidden states that it gives."""
        if self.args:
            return _first(block(hidden, *self.args[1:], **self.kwargs))
        return _first(block(**{**self.kwargs, "hidden_states": hidden}))


@dataclass
class Graph:
    """A part after its forward pass.

    Attributes:
        outputs: Where its backward pass begins.
        hidden: Its input, if a gradient may reach it.
        saved_bytes: Activations that autograd saved, each storage once, parameters left out.
    """

    outputs: list[Tensor]
    hidden: Tensor | None
    saved_bytes: int


@dataclass
class BlockRun:
    """Runs one block by itself, on the inputs that it gets in the model.

    Attributes:
        block: The block.
        call: Its arguments.
        parameters: Those that train where its weights train.
        ignored: Addresses of storages that are not its activations.
    """

    block: nn.Module
    call: Call
    parameters: Sequence[nn.Parameter]
    ignored: set[int]

    def __call__(self, input_gradient: bool, train: bool) -> Graph:
        """Run it; its input needs a gradient or not, its weights train or not."""
        for parameter in self.parameters:
            parameter.requires_grad_(train)
        self.block.train(train)
        hidden = self.call.hidden.detach().requires_grad_(input_gradient)
        saved = Saved(self.ignored)
        with torch.enable_grad(), saved.noted():
            output = self.call.run(self.block, hidden)
        return Graph([output], hidden if input_gradient else None, saved.total)


@dataclass
class OutsideRun:
    """Runs a whole model, its graph cut at both ends of the stack, for what lies below or above the blocks.

    Attributes:
        model: The model.
        blocks: Its blocks.
        inputs: A batch.
        names: The parameters outside of the blocks that train where weights train.
        ignored: Addresses of storages that are not activations.
        above: Whether to return what lies above the blocks, or below.
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module]
    inputs: Mapping[str, Tensor]
    names: Sequence[str]
    ignored: set[int]
    above: bool

    def __call__(self, input_gradient: bool, train: bool) -> Graph:
        """Run it; no gradient goes further down than to the weights below the blocks."""
        names = self.names if train else ()
        freeze(self.model, names)
        set_training_modes(self.model, names)
        below, above = Graph([], None, 0), Graph([], None, 0)
        saved = Saved(self.ignored)

        def enter(own: Pass, *args: Any, **kwargs: Any) -> Any:
            below.outputs, below.saved_bytes = Call(args, kwargs).tensors, saved.total
            args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            return own(*args, **kwargs)

        def leave(own: Pass, *args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            hidden = _first(output).detach().requires_grad_(input_gradient)
            above.hidden = hidden if input_gradient else None
            saved.bytes.clear()
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        first = replaced(self.blocks[0], enter, with_hooks=True)
        last = replaced(self.blocks[-1], leave, with_hooks=True)
        with torch.enable_grad(), saved.noted(), first, last:
            above.outputs = [_outcome(self.model, self.inputs)]
        above.saved_bytes = saved.total
        return above if self.above else below


@dataclass
class Saved:
    """Notes the storages that autograd saves.

    Attributes:
        ignored: Addresses to pass over.
        bytes: Sizes by address.
    """

    ignored: set[int]
    bytes: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes noted so far."""
        return sum(self.bytes.values())

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is saved inside the block."""
        with saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield

    def _note(self, tensor: Tensor) -> Tensor:
        self.bytes |= {key: size for key, size in storages([tensor]).items() if key not in self.ignored}
        return tensor


def observe(
    model: PreTrainedModel, blocks: Sequence[nn.Module], inputs: Mapping[str, Tensor]
) -> tuple[list[Call], list[int]]:
    """Return each block's arguments in a forward pass, and the FLOPs below, of each block, and above."""
    calls: list[Call] = []
    marks = [0]
    counter = flop_counter()

    def watch(own: Pass, *args: Any, **kwargs: Any) -> Any:
        if not calls:
            marks.append(counter.get_total_flops())
        calls.append(Call(args, dict(kwargs)))
        output = own(*args, **kwargs)
        marks.append(counter.get_total_flops())
        return output

    with ExitStack() as watched:
        for block in blocks:
            watched.enter_context(replaced(block, watch, with_hooks=True))
        with torch.no_grad(), counter:
            _outcome(model, inputs)
    marks.append(counter.get_total_flops())
    return calls, [after - before for before, after in pairwise(marks)]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the storages of tensors, each once: bytes by address."""
    held = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def flop_counter() -> FlopCounterMode:
    """Return PyTorch's counter, with formulas for attention on a CPU and for products grouped by expert."""
    aten = torch.ops.aten
    more = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        aten._grouped_mm: _grouped_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=more)


_Shape = Sequence[int]


def _attention_flops(query: _Shape, key: _Shape, value: _Shape, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward_flops(
    gradient: _Shape, query: _Shape, key: _Shape, value: _Shape, *_: object, **__: object
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


def _grouped_flops(a: _Shape, b: _Shape, *_: object, **__: object) -> int:
    """Return 2mkn of a product [m, k] by [k, n] whose rows, columns or inner terms are dealt to groups."""
    groups = a[0] if len(a) == len(b) == 3 else 1
    return 2 * groups * a[-2] * a[-1] * b[-1]


def _outcome(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the loss, or the first output of a model that is given no labels."""
    outcome: Tensor = model(**inputs, **forward_options(model))[0]
    return outcome


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
