"""TOFU in small: a Llama trained from scratch on TOFU's questions forgets ten authors, three ways, side by side.

    python examples/tofu/run.py DATA [--out runs/tofu] [--steps 900]

DATA is a folder with forget10_sample.jsonl, retain_sample.jsonl, real_authors.jsonl and world_facts.jsonl in TOFU's
published form (`question`, `answer`; locuslab/TOFU, arXiv:2401.06121). The model is trained on all of them, gold on all
but the forget rows; then npo, grad_diff and idk carry out the same request, and `compare` sets them side by side.
What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from expunge.commands.console import Progress
from expunge.methods.optimise.loop import fit
from expunge.report import compare
from expunge.request import load
from expunge.rows import Row, Source, read_rows
from expunge.run import run
from expunge.subjects.language import LanguageModel
from expunge.world.models import tokenizer

FILES = {"forget": "forget10_sample", "retain": "retain_sample", "authors": "real_authors", "facts": "world_facts"}
METHODS = ("npo", "grad_diff", "idk")

REQUEST = """\
# TOFU forget10, as far as the sample goes: questions about 15 invented authors.
name: tofu
reason: benchmark
model: MODELS/original
gold: [MODELS/gold-0, MODELS/gold-1]
data:
  forget: {path: DATA/forget10_sample.jsonl, entity_every: 20}
  retain: {path: DATA/retain_sample.jsonl, entity_every: 20}
  general: general.jsonl
method: npo
training: {epochs: 5, batch_size: 16, learning_rate: 2.0e-4}
audit:
  max_new_tokens: 40
  attacks: [direct, {decoding: {samples: 4, k: 2}}, logit_lens, {relearn: {steps: 16}}, quantise]
"""


def train(rows: list[Row], made: object, seed: int, steps: int, folder: Path, progress: Progress) -> None:
    if (folder / "config.json").is_file():
        return
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(made),  # type: ignore[arg-type]
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    subject = LanguageModel(LlamaForCausalLM(config), made)
    items = [subject.encode(row) for row in rows]
    fit(
        subject,
        items,
        steps=steps,
        batch_size=48,
        learning_rate=2e-3,
        seed=seed,
        schedule="cosine",
        warmup=30,
        progress=progress.phase(f"train {folder.name}"),
    )
    subject.save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/tofu"))
    parser.add_argument("--steps", type=int, default=900)
    options = parser.parse_args()
    sets = {name: read_rows(Source(str(options.data / f"{file}.jsonl")), name) for name, file in FILES.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    every = [row for rows in sets.values() for row in rows]
    made = tokenizer([text for row in every for text in (row.prompt, row.answer)], 4000)
    general = [{"question": row.prompt, "answer": row.answer} for name in ("authors", "facts") for row in sets[name]]
    (options.out / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general), encoding="utf-8")
    request = options.out / "request.yaml"
    text = REQUEST.replace("DATA", str(options.data.absolute())).replace("MODELS", f"models-{options.steps}")
    request.write_text(text, encoding="utf-8")
    progress = Progress()
    kept = [row for name, rows in sets.items() if name != "forget" for row in rows]
    # Models of another number of steps are other models, and so are the runs on them.
    models = options.out / f"models-{options.steps}"
    train(every, made, 0, options.steps, models / "original", progress)
    for seed in (0, 1):
        train(kept, made, 10 + seed, options.steps, models / f"gold-{seed}", progress)
    runs = {}
    for method in METHODS:
        runs[method] = run(
            load(request), method=method, out=options.out / f"runs-{options.steps}" / method, progress=progress
        )
        print(f"{method}: {runs[method].verdict.verdict} {runs[method].verdict.flags}", flush=True)
    paths = compare.write(list(runs.values()), options.out / "comparison", names=list(runs))
    progress.close()
    from rich import print as show

    show(compare.table(list(runs.values()), list(runs)))
    print(f"comparison: {paths['compare.html']}")


if __name__ == "__main__":
    main()
