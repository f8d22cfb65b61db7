"""What a subject must offer, whatever its modality, for methods, deltas and tables to work on it.

A subject turns rows into `Encoded` rows (tokens fed, tokens answered), and a pass over a `Pack` of them into states
from which a head makes logits over its vocabulary. A language model has text tokens and an LM head. An image classifier
has one token for a picture, which its tower embeds, one for the class, and classes as its vocabulary.

Most subjects also say what they answer (`generate`): a language model in words, a classifier the name of a class.
Hidden states of prompts and packing are no part of it: attacks that ask in words need a language model, and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .packed import Encoded, Pack

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Taps:
    """What a pass hands out: final hidden states, the residual stream after blocks, router logits of blocks."""

    final: bool = True
    """Final hidden states at answer positions; without them the pass stops after the highest tapped block."""
    layers: tuple[int, ...] = ()
    routers: tuple[int, ...] = ()
    chosen: tuple[int, ...] = ()
    """Blocks whose chosen experts are read, with their weights."""
    positions: Literal["all", "answer"] = "all"
    """Where all but the final states are read: every fed token of every row, or those that predict the answer."""

    @property
    def last(self) -> int | None:
        """The block that a pass ends after; None where it runs through all of them."""
        return None if self.final else max((*self.layers, *self.routers, *self.chosen))

    def everywhere(self, block: int) -> bool:
        """Whether what a block gives out is read at tokens that predict no answer too."""
        return block in self.layers and self.positions == "all"


def innermost(subject: Any) -> Any:
    """The model inside all guards: a guard has no states of its own."""
    while (inner := getattr(subject, "inner", None)) is not None:
        subject = inner
    return subject


def asked(subject: Any, row: Any, question: str | None) -> Any:
    """What a subject's `generate` takes for a row: the prompt's text, or where texts do not hold what is asked
    (pictures) whatever the subject makes of the row with its `asked`."""
    make = getattr(subject, "asked", None)
    return subject.prompt_text(row, question) if make is None else make(row)


@runtime_checkable
class Subject(Protocol):
    """A model with what prepares its rows. No operation changes its weights."""

    modality: str
    model: Any
    """An `nn.Module` in evaluation mode."""
    name: str
    base: Any
    """The subject that a delta was applied to, where this one was made so."""
    sharded: bool
    """Weights lie in parts over the processes of a launch."""

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides what the subject says."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def vocabulary(self) -> int:
        """V, the number of logits."""

    @property
    def can_enter(self) -> bool:
        """Whether passes may start at a block above the first (subjects/entering.py)."""

    def can_enter_inside(self, layer: int) -> bool:
        """Whether passes may start at the matrix that a block's MLP gives out through."""

    @property
    def linear_head(self) -> nn.Linear | None:
        """The head where logits are nothing but its product with states."""

    @property
    def embedding(self) -> nn.Embedding | None:
        """The plain look-up that makes inputs of tokens, if there is one."""

    def with_model(self, model: nn.Module, name: str | None = None) -> Any:
        """The same subject around other weights."""

    def copy(self) -> Any: ...

    def save(self, folder: Any) -> None: ...

    def encode(self, row: Any, *, answer: str | None = None, prompt: str | None = None) -> Encoded:
        """A row as tokens. Rows with the same tokens before the answer are one thing asked, and run once."""

    def prompt_text(self, row: Any, prompt: str | None = None) -> str:
        """What is asked, as a text that is different for different prompts."""

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (n, V) of states (n, d)."""

    def hidden_states(self, pack_: Pack) -> Tensor:
        """States (answer tokens, d) that predict the pack's answer tokens; gradients flow where enabled."""

    def states(self, pack_: Pack, taps: Any, entry: Any = None) -> dict[str, Tensor]:
        """What one pass hands out: "final", and "layer.7" ... as tapped."""

    def score(self, items: Sequence[tuple[tuple[str, str], Any]], *, progress: Any = None) -> Any:
        """`Scores` of encoded rows."""

    def share(
        self, groups: Sequence[Sequence[int]], do: Callable[[Sequence[int]], Any], *, of: Any, progress: Any
    ) -> list[Any]:
        """What `do` gives for each group of rows, shared out over the processes of a launch."""

    def settle(self) -> None:
        """Try out now what is otherwise tried when a pass first needs it."""
