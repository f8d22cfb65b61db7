"""Clamping: one neuron's output held at a constant while the model runs (arXiv:2501.02688).

What the up matrix gives for neuron i is replaced by c at every token, so that the MLP adds  act(g_i . x) c v_i:
whatever the row reads, the neuron says what it says, as loudly as c. The sign of the gate is not known beforehand, so
effects are measured for values of both signs. A neuron at 0 is silent. Weights stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParameterError, SubjectError
from .input_vectors import Kind, neuron_matrices
from .language import LanguageModel
from .projection import Readout, project
from .protocol import Progress
from .value_vectors import Address, ValueMatrix, find, vectors
from .watch import watch

MULTIPLES = (-8.0, -4.0, 0.0, 4.0, 8.0)
"""Of the standard deviation of what a neuron gives by itself."""
Hook = Callable[..., Tensor]


def _hooks(subject: LanguageModel, values: Mapping[Address, float], kind: Kind) -> Iterator[tuple[str, Hook]]:
    """(module, hook) that hold these neurons at these values.

    Raises:
        SubjectError: no such neuron, or its expert stands in a fused stack, which shows no outputs.
        ParameterError: value vectors give nothing that could be held.
    """
    if kind == "down":
        raise ParameterError("a neuron is held at what its up or gate row gives; matrix is down, expected up or gate")
    matrices = neuron_matrices(subject.model, kind)
    by_module: dict[str, list[tuple[int, float]]] = {}
    for address, value in values.items():
        matrix = find(subject.model, address, matrices)
        by_module.setdefault(_module(subject, matrix), []).append((matrix.place(address.dim), value))
    for path, held in by_module.items():
        yield path, _holding(held)


def _module(subject: LanguageModel, matrix: ValueMatrix) -> str:
    if matrix.owner is None:
        raise SubjectError(
            f"layer {matrix.layer} of {subject.name} keeps its experts in fused stacks, whose neurons show no output "
            "that could be held; needle(mode=zero) silences one for good"
        )
    return matrix.owner


def _holding(held: Sequence[tuple[int, float]]) -> Hook:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for place, value in held:
            output[..., place] = value
        return output

    return hook


@contextmanager
def clamping(subject: LanguageModel, values: Mapping[Address, float], kind: Kind = "up") -> Iterator[None]:
    """Within the block these neurons give these values, whatever they read; errors as `clamped`."""
    handles = []
    try:
        for path, hook in _hooks(subject, values, kind):
            handles.append(subject.model.get_submodule(path).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def clamped(subject: LanguageModel, values: Mapping[Address, float], kind: Kind = "up") -> LanguageModel:
    """The subject with these neurons held at these values; it shares every weight with the subject.

    Raises:
        SubjectError: no such neuron, or one of a fused expert.
        ParameterError: kind is down.
    """
    shared = {id(tensor): tensor for tensor in (*subject.model.parameters(), *subject.model.buffers())}
    made = subject.with_model(copy.deepcopy(subject.model, shared))
    for path, hook in _hooks(made, values, kind):
        made.model.get_submodule(path).register_forward_hook(hook)
    return made


def deviations(subject: LanguageModel, texts: Sequence[str], matrix: ValueMatrix) -> Tensor:
    """(f,) standard deviation of what every neuron of a matrix gives by itself; errors as `given`."""
    return given(subject, texts, matrix).std(0)


@torch.no_grad()
def given(subject: LanguageModel, texts: Sequence[str], matrix: ValueMatrix) -> Tensor:
    """(tokens, f) what every neuron of a matrix gives by itself, at all tokens of the texts.

    Raises:
        SubjectError: its experts are fused.
        ParameterError: there are fewer than two tokens.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        seen.append(output.reshape(-1, output.shape[-1]).float().cpu())

    handle = subject.model.get_submodule(_module(subject, matrix)).register_forward_hook(keep)
    try:
        for number, text in enumerate(texts):
            ids = torch.tensor([subject.prompt_ids(text, (str(number), "text"))], device=subject.device)
            subject.decoder(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    found = torch.cat(seen) if seen else torch.zeros(0, matrix.count)
    if len(found) < 2:
        raise ParameterError(f"the spread of a neuron needs at least 2 tokens of text, found {len(found)}")
    return found[:, matrix.part[0] :: matrix.part[1]][:, : matrix.count] if matrix.part else found


@dataclass(frozen=True)
class Effect:
    """What holding a neuron at a value does to a token."""

    value: float
    gain: float
    """Mean over prompts of log p(token | held) - log p(token), nats."""
    probability: float
    """Mean over prompts of p(token | held)."""


def next_logprobs(subject: LanguageModel, prompts: Sequence[str]) -> Tensor:
    """(n, V) log-probabilities of the token after each prompt."""
    (states,) = watch(subject, prompts, [(subject.blocks[-1].name, "out")])
    return subject.lens(states).log_softmax(-1).cpu()


def effects(
    subject: LanguageModel,
    address: Address,
    token: int,
    prompts: Sequence[str],
    values: Sequence[float],
    *,
    kind: Kind = "up",
) -> list[Effect]:
    """What holding a neuron at each of the values does to the probability of a token after the prompts.

    Raises:
        ParameterError: there are no prompts, or no such token.
        SubjectError: as `clamped`.
    """
    if not prompts:
        raise ParameterError("the effect of a neuron needs at least 1 prompt, found 0")
    if not 0 <= token < len(subject.tokenizer):
        raise ParameterError(f"there is no token {token}; {subject.name} has 0-{len(subject.tokenizer) - 1}")
    before = next_logprobs(subject, prompts)[:, token]
    found = []
    for value in values:
        with clamping(subject, {address: value}, kind):
            after = next_logprobs(subject, prompts)[:, token]
        found.append(Effect(float(value), float((after - before).mean()), float(after.exp().mean())))
    return found


def strongest(found: Sequence[Effect]) -> Effect:
    """The value that raises the token most."""
    return max(found, key=lambda one: one.gain)


def sweep(
    subject: LanguageModel,
    address: Address,
    prompts: Sequence[str],
    *,
    token: str | None = None,
    values: Sequence[float] | None = None,
    kind: Kind = "up",
    new: int = 12,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A neuron held at several values, beside a random one of its layer: plain values for a page or a command.

    Args:
        token: text of a token; by default the one whose head row the neuron's own row is nearest to by product.
        values: by default `MULTIPLES` of the neuron's own deviation, and of the random neuron's.
        new: tokens written after the first prompt.

    Raises:
        ParameterError: the text is no single token.
        SubjectError: as `clamped`.
    """
    matrix = find(subject.model, address, neuron_matrices(subject.model, kind))
    named = _token(subject, matrix, address, token)
    own = given(subject, prompts, matrix)
    size = own.std(0)
    other = torch.randint(matrix.count, (1,), generator=torch.Generator().manual_seed(seed)).item()
    other = (address.dim + 1) % matrix.count if other == address.dim else int(other)
    wanted = list(values) if values else [multiple * float(size[address.dim]) for multiple in MULTIPLES]
    blind = list(values) if values else [multiple * float(size[other]) for multiple in MULTIPLES]
    total, found = len(wanted) + 1, []
    for number, value in enumerate(wanted, start=1):
        (effect,) = effects(subject, address, named, prompts, [value], kind=kind)
        text = _writes(clamped(subject, {address: value}, kind), prompts[0], new)
        found.append({**asdict(effect), "text": text})
        if progress:
            progress(number, total)
    control = matrix.address(other)
    best = strongest(effects(subject, control, named, prompts, blind, kind=kind))
    if progress:
        progress(total, total)
    return {
        "neuron": str(address),
        "token": subject.tokenizer.decode([named]),
        "before": float(next_logprobs(subject, prompts)[:, named].exp().mean()),
        "mean": float(own[:, address.dim].mean()),
        "deviation": float(size[address.dim]),
        "effects": found,
        "random": {"neuron": str(control), **asdict(best)},
        "text": _writes(subject, prompts[0], new),
    }


def _token(subject: LanguageModel, matrix: ValueMatrix, address: Address, text: str | None) -> int:
    if text is None:
        row = vectors(subject.model, matrix)[address.dim : address.dim + 1]
        return int(project(Readout.of(subject), row, 1).tokens)
    # A word inside a sentence has its space before it.
    for spelt in (text, f" {text}"):
        ids = subject.tokenizer(spelt, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return int(ids[0])
    pieces = subject.tokenizer.convert_ids_to_tokens(subject.tokenizer(text, add_special_tokens=False)["input_ids"])
    raise ParameterError(f"{text!r} is no single token of {subject.name}, but {pieces}; name one of them")


def _writes(subject: LanguageModel, prompt: str, new: int) -> str:
    return subject.generate([(("0", "prompt"), prompt)], max_new_tokens=new).texts[0][0] if new else ""
