"""The layer lens: what a model's own code makes of an inner layer's state after its last layer.

Nothing is known here of norms, projections, soft caps or logit scales. The model's forward pass is
run with its layers taken out and the state in their place, so that whatever it does behind them is
done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mithridate.errors import InputError
from mithridate.weights.maps import blocks_of, innermost


class Lens:
    """Reads hidden states as the model reads that of its last layer.

    Parameters
    ----------
    model
        A causal language model.

    Attributes
    ----------
    depth
        Layers of the model.
    weights
        The trained weights outside the layers; a reading uses some of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = innermost(model)
        self._blocks = blocks_of(model)
        self.depth = len(self._blocks)
        self._beside: tuple[Any, ...] | None = None
        inside = {id(weight) for weight in self._blocks.parameters()}
        self.weights = [
            weight
            for weight in self._model.parameters()
            if weight.requires_grad and id(weight) not in inside
        ]

    @contextmanager
    def watching(self, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Run the body, which runs the model, and take its layers' states from it.

        Parameters
        ----------
        layers
            0 for what the first layer is given, n for what layer n gives.

        Yields
        ------
        dict
            Filled with the states, of shape (rows, tokens, hidden size).
        """
        seen: dict[int, torch.Tensor] = {}

        def first(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            seen[0] = args[0] if args else next(iter(given.values()))

        def note(block: nn.Module, _: Any, output: Any) -> None:
            plain = isinstance(output, torch.Tensor)
            seen[numbers[block]] = output if plain else output[0]
            if block is self._blocks[-1]:
                self._beside = None if plain else tuple(output[1:])

        wanted = {number for number in layers if number > 0} | {self.depth}
        numbers = {self._blocks[number - 1]: number for number in wanted}
        hooks = [block.register_forward_hook(note) for block in numbers]
        hooks.append(self._blocks[0].register_forward_pre_hook(first, with_kwargs=True))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits of states, shape (states, hidden size), as (states, vocabulary)."""
        state = states[:, None]
        given = state if self._beside is None else (state, *self._beside)
        blocks = list(self._blocks)
        for index, block in enumerate(blocks):
            self._blocks[index] = _Given(block, given)
        try:
            # Each is a text of one token: models know no more places than they were made with.
            ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            for index, block in enumerate(blocks):
                self._blocks[index] = block
        return logits.flatten(0, 1)


class _Given(nn.Module):
    """Stands for a layer, and gives a state whatever it is given."""

    def __init__(self, layer: nn.Module, given: Any) -> None:
        super().__init__()
        # As no part of this one: nobody is to move or train it by this way.
        self.__dict__["layer"] = layer
        self.__dict__["given"] = given

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return the given state."""
        return self.__dict__["given"]


def check_lens(model: nn.Module, *, final: bool = False) -> None:
    """Refuse a model whose inner layers cannot be read as it reads its last one.

    Parameters
    ----------
    final
        The state behind the last layer, its final norm taken, is to be read once more.

    Raises
    ------
    InputError
        Its layers are not found, they have not one state for each token, or its logits are not
        those of its last layer's state read by `Lens`.
    """
    inner = innermost(model)
    lens = Lens(model)
    depth = lens.depth
    ids = torch.arange(4, device=next(inner.parameters()).device)[None]
    shape = (1, 4, inner.config.get_text_config().hidden_size)
    with torch.no_grad():
        with lens.watching(range(depth + 1)) as seen:
            output = inner(input_ids=ids, use_cache=False, output_hidden_states=final)
        states = [seen.get(number) for number in range(depth + 1)]
        if final:
            states.append((output.hidden_states or (None,))[-1])
        faithful = all(state is not None and state.shape == shape for state in states)
        if faithful:
            rounding = 1e-3 if output.logits.dtype in (torch.float32, torch.float64) else 5e-2
            found = lens.read(seen[depth][0])
            faithful = torch.allclose(found, output.logits[0], rtol=rounding, atol=rounding)
    if not faithful:
        raise InputError(
            f"inner layers of {type(inner).__name__} cannot be read as its last one is",
            mend="choose a term that reads no inner layers, for example unlearning: log",
        )
