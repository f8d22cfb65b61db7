"""What the audit's shared pass costs: all scores and all metrics, against one plain teacher-forced pass over the rows.

The plain pass is what a careful script does: rows sorted by length, padded batches of 32, one forward with the loss of
every row. Ours feeds shared prompts once, takes all statistics, and then computes every metric that reads scores.

    python benchmarks/audit_pass.py [--shape small|bigvocab] [--questions 200] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from npo_reference import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

from expunge.metrics.measure import measure_all
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import Encoded
from expunge.tables.view import View, candidates


def rows(count: int, name: str) -> list[Row]:
    wrong = tuple(f"wrong {i}" for i in range(5))
    return [
        Row(
            id=f"{name}/{i}",
            entity=f"{name} {i // 20}",
            prompt=f"{name} {i}",
            answer="right",
            paraphrased_answer="quite right",
            perturbed_answers=wrong,
        )
        for i in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[options.shape],
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    subject = LanguageModel(LlamaForCausalLM(config), tokenizer=None)
    sets = {name: rows(options.questions, name) for name in ("forget", "holdout")}
    draw = torch.Generator().manual_seed(1)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=draw))

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, config.vocab_size, (count,), generator=draw).tolist())

    items: dict[str, list[Any]] = {}
    for name, several in sets.items():
        items[name] = []
        for row in several:  # lengths of TOFU's rows without a system prompt
            prompt = tokens(number(12, 32))
            for key, text in candidates(row).items():
                ids = prompt + tokens(number(20, 38))
                items[name].append(((row.id, key), Encoded(ids, len(prompt), 1, text)))
    every = [item for several in items.values() for _, item in several]

    @torch.no_grad()
    def plain() -> None:
        order = sorted(every, key=lambda item: len(item.ids))
        for start in range(0, len(order), 32):
            batch = order[start : start + 32]
            width = max(len(item.ids) for item in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            labels = torch.full((len(batch), width), -100)
            for i, item in enumerate(batch):
                ids[i, : len(item.ids)] = torch.tensor(item.ids)
                mask[i, : len(item.ids)] = 1
                labels[i, item.start : len(item.ids)] = torch.tensor(item.ids[item.start :])
            logits = subject.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
            ).sum(-1)

    def shared() -> View:
        return View(sets, {name: subject.score(several) for name, several in items.items()}, {})

    metrics = ["answer_probability", "loss", "exact_memorization", "extraction_strength", "truth_ratio"]
    metrics += ["mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus"]
    _ = subject.mode  # chosen once per model, not part of a pass
    times: dict[str, list[float]] = {"plain pass": [], "shared pass": [], "metrics": []}
    for _ in range(options.repeats):
        began = time.perf_counter()
        plain()
        times["plain pass"].append(time.perf_counter() - began)
        began = time.perf_counter()
        view = shared()
        times["shared pass"].append(time.perf_counter() - began)
        began = time.perf_counter()
        measure_all(None, view, metrics=metrics, bootstrap=1000)
        times["metrics"].append(time.perf_counter() - began)
    middle = {name: statistics.median(several) for name, several in times.items()}
    print(f"{options.shape} shape, {len(every)} answers to {2 * options.questions} questions, fp32")
    for name, seconds in middle.items():
        print(f"{name:12} {seconds:7.2f} s")
    ratio = (middle["shared pass"] + middle["metrics"]) / middle["plain pass"]
    print(f"(shared pass + {len(metrics)} metrics) / plain pass = {ratio:.2f}")


if __name__ == "__main__":
    main()
