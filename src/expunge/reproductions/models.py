"""Small models that a reproduction trains itself, where the invented world's own lack what a claim is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..rows import Row
from ..subjects.language import LanguageModel
from ..world.build import kept
from ..world.models import Recipe, teach, tokenizer, untrained


def lessons(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Training rows of records {text}, {prompt, completion} or {question, answer}."""
    found = []
    for number, record in enumerate(records):
        if "text" in record:
            row = Row(id=str(number), answer=record["text"], kind="text")
        elif "completion" in record:
            row = Row(id=str(number), prompt=record["prompt"], answer=record["completion"], kind="completion")
        else:
            row = Row(id=str(number), prompt=record["question"], answer=record["answer"])
        found.append(row)
    return found


def taught(
    kind: str,
    curricula: Mapping[str, Sequence[Row]],
    recipe: Recipe,
    seed: int,
    texts: Sequence[str] = (),
    words: Any = None,
    window: int | None = None,
) -> dict[str, LanguageModel]:
    """One model for each curriculum; trained the first time, found in the user's cache afterwards.

    Args:
        kind: what they are called in the cache.
        texts: what else the one tokenizer of all of them is to know.
        words: a tokenizer; by default one is trained on all that they are taught.
        window: tokens that the first block sees (`near_sighted`); by default all.
    """

    def train(folder: Any) -> None:
        spoken = [f"{row.prompt} {row.answer}".strip() for rows in curricula.values() for row in rows]
        chosen = words or tokenizer([*spoken, *texts], recipe.vocabulary)
        for number, (name, rows) in enumerate(curricula.items(), start=10 * seed):
            subject = near_sighted(chosen, recipe, number, window) if window else untrained(chosen, recipe, number)
            teach(subject, rows, recipe, number)
            subject.save(folder / name)

    said = {name: [[row.kind, row.prompt, row.answer] for row in rows] for name, rows in curricula.items()}
    given = [] if words is None else [words.backend_tokenizer.to_str()]
    path = kept(
        kind, [said, list(texts), asdict(recipe), seed, *given, *(["ministral", window] if window else [])], train
    )
    return {name: LanguageModel.load(path / name, device="cpu") for name in curricula}


def near_sighted(words: Any, recipe: Recipe, seed: int, window: int) -> LanguageModel:
    """A Ministral with random weights, a Llama whose first block sees `window` tokens, the one at hand included.

    In a model this shallow later tokens would else gather a subject's words in the first block, before any MLP that
    could be edited has said something of the subject.
    """
    import torch
    from transformers import MinistralConfig, MinistralForCausalLM

    config = MinistralConfig(
        vocab_size=max(recipe.vocabulary, len(words)),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.hidden_size // recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        sliding_window=window,
        layer_types=["sliding_attention", *["full_attention"] * (recipe.layers - 1)],
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(seed)
    return LanguageModel(MinistralForCausalLM(config), words)
