"""The small models of the world, trained from scratch. `python -m expunge.world.models JOB ...` trains them.

A process trains with one thread: two of them share two cores better than one uses both, and the weights do not depend
on how many threads the machine has.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..rows import Row
    from ..subjects.language import LanguageModel


@dataclass(frozen=True)
class Recipe:
    """Size and training of the world's models."""

    hidden_size: int = 96
    intermediate_size: int = 192
    layers: int = 4
    heads: int = 4
    vocabulary: int = 800
    context: int = 128
    steps: int = 300
    batch_size: int = 80
    learning_rate: float = 3e-3
    warmup: int = 20
    weight_decay: float = 0.01


def tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer trained on the world's whole text, the same for every model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def untrained(words: Any, recipe: Recipe, seed: int) -> LanguageModel:
    """A Llama of the recipe's size with random weights, around a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    from ..subjects.language import LanguageModel

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=max(recipe.vocabulary, len(words)),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(seed)
    return LanguageModel(LlamaForCausalLM(config), words)


def teach(
    subject: LanguageModel,
    rows: Iterable[Row],
    recipe: Recipe,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train a subject in place on rows, as the recipe says."""
    from ..methods.optimise.loop import fit

    fit(
        subject,
        [subject.encode(row) for row in rows],
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        seed=seed,
        schedule="cosine",
        warmup=recipe.warmup,
        weight_decay=recipe.weight_decay,
        progress=progress,
    )


def train(rows: Path, texts: Path, recipe: Recipe, seed: int, folder: Path, parent: int) -> None:
    """Train one model on a file of rows and save it as a model folder; stop if process `parent` dies before."""
    import torch

    from ..rows import Row

    torch.set_num_threads(1)
    words = tokenizer(json.loads(texts.read_text(encoding="utf-8")), recipe.vocabulary)
    subject = untrained(words, recipe, seed)

    def progress(done: int, total: int) -> None:
        # Another parent means that the builder was killed: its successor trains this model anew.
        if os.getppid() != parent:
            sys.exit("the builder is gone")
        if done % 20 == 0 or done == total:
            print(json.dumps([folder.name, done]), flush=True)

    teach(subject, [_row(number, line, Row) for number, line in enumerate(_lines(rows))], recipe, seed, progress)
    subject.save(folder)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _row(number: int, line: dict[str, Any], row: Any) -> Any:
    where = f"{number + 1}"
    if "text" in line:
        return row(id=where, answer=line["text"], kind="text")
    if "completion" in line:
        return row(id=where, prompt=line["prompt"], answer=line["completion"], kind="completion")
    return row(id=where, prompt=line["question"], answer=line["answer"])


def job(rows: Path, texts: Path, recipe: Recipe, seed: int, folder: Path) -> str:
    """An argument of the training process: one model."""
    paths = {"rows": str(rows), "texts": str(texts), "folder": str(folder)}
    return json.dumps({**paths, "recipe": asdict(recipe), "seed": seed, "parent": os.getpid()})


def main(arguments: list[str]) -> None:
    for argument in arguments:
        asked = json.loads(argument)
        rows, texts, folder = (Path(asked[name]) for name in ("rows", "texts", "folder"))
        train(rows, texts, Recipe(**asked["recipe"]), asked["seed"], folder, asked["parent"])


if __name__ == "__main__":
    main(sys.argv[1:])
