"""Cost of EL_10 on texts of 200 tokens: python benchmarks/extraction_likelihood.py [SECONDS OF TRAINING ...]

A two-layer model learns 8 texts for so long (default 0, 4, 16); then all three ways give the same numbers:

- separate: T - 1 generations of all texts, prefix by prefix, nothing reused (as the paper's code does);
- by length: only misses, those of one length together, each prefix read anew;
- ours: only misses, of all lengths together, from cut keys and values.
"""

from __future__ import annotations

import random
import sys
import time
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from expunge.rows import Row
from expunge.subjects import greedy
from expunge.subjects.language import LanguageModel

TOKENS = 200
TEXTS = 8


def build() -> LanguageModel:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *alphabet])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(alphabet) + 1, max_position_embeddings=256, eos_token_id=0, **shape)
    return LanguageModel(LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"))


def sentences() -> list[Row]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(400)]
    return [Row(id=str(i), answer=" ".join(draw.choices(words, k=99))[:TOKENS], kind="text") for i in range(TEXTS)]


def train(subject: LanguageModel, texts: list[tuple[int, ...]], seconds: float) -> None:
    batch = torch.tensor(texts)
    optimiser = torch.optim.AdamW(subject.model.parameters(), lr=1e-3)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        subject.model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@torch.no_grad()
def separate(subject: LanguageModel, texts: list[tuple[int, ...]]) -> list[list[np.ndarray]]:
    batch = torch.tensor(texts)
    found = []
    for t in range(1, TOKENS):
        written: list[torch.Tensor] = []
        cache, tokens = DynamicCache(), batch[:, :t]
        while len(written) < TOKENS - t:
            logits = subject.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
            written.append(tokens)
        found.append(torch.cat(written, dim=1).numpy())
    return [[whole[i] for whole in found] for i in range(len(texts))]


def main(rounds: list[float]) -> None:
    print("| trained, s | MA | tokens written: separate | ours | s: separate | by length | ours | times faster |")
    print("|---|---|---|---|---|---|---|---|")
    subject = build()
    texts = [subject.encode(row).ids for row in sentences()]
    spent = 0.0
    for seconds in rounds:
        train(subject, texts, seconds - spent)
        spent = seconds
        clock = [time.monotonic()]
        plain = separate(subject, texts)
        clock.append(time.monotonic())
        with patch.object(greedy, "can_cut", lambda *_: False):
            alike = greedy.paths(subject, texts)
        clock.append(time.monotonic())
        ours = greedy.paths(subject, texts)
        clock.append(time.monotonic())
        for paths in (alike, ours):
            same = [
                np.array_equal(path.after(t), plain[i][t - 1]) for i, path in enumerate(paths) for t in range(1, TOKENS)
            ]
            if not all(same):
                print(f"({same.count(False)} of {len(same)} continuations differ)")
        accuracy = np.mean([path.hit[1:].mean() for path in ours])
        written = sum(len(tokens) for path in ours for tokens in path.written.values())
        first, second, third = np.diff(clock)
        print(
            f"| {seconds:g} | {accuracy:.3f} | {TEXTS * TOKENS * (TOKENS - 1) // 2} | {written} "
            f"| {first:.1f} | {second:.1f} | {third:.1f} | {first / third:.1f} |"
        )


if __name__ == "__main__":
    main([float(argument) for argument in sys.argv[1:]] or [0, 4, 16])
