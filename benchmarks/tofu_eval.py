"""Seconds of TOFU's evaluation: ours, and a peer's on the same model, rows and precision, with equal numbers.

    python benchmarks/tofu_eval.py [--peer open-unlearning/] [--rows 400] [--data DIR] [--suites tofu all]
                                   [--dtype float32 bfloat16] [--repeats 1] [--threads 2] [--json FILE]

A Llama of 4 layers and width 256 with a vocabulary of 4 096, trained for a few steps so that answers end; a prompt with
the 40-token system message of Llama-3's chat format, 400 forget and 400 retain rows with a paraphrase and five wrong
answers each, 400 holdout rows, 100 and 117 rows with three wrong answers. Rows are invented with sentences of TOFU's
length, or made of the questions and answers in `--data` (forget10_sample.jsonl, retain_sample.jsonl,
real_authors.jsonl, world_facts.jsonl), whose wrong answers are the right ones with other words in them.

- tofu: probability, ROUGE, truth ratio, forget quality, model utility;
- all: also extraction strength, exact memorisation, the six membership attacks and PrivLeak. Ours alone: `--more` adds
  extraction likelihood of the forget answers, which the peer does not have.

Gold's own numbers are computed before and given to both; the reference attack runs gold on 800 answers on both sides.
Every measurement runs in a process of its own. `--peer` is a checkout of locuslab/open-unlearning (`peer_eval.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

PREFIX = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|>"
)
TAGS = {
    "user_start_tag": "<|start_header_id|>user<|end_header_id|>\n\n",
    "user_end_tag": "<|eot_id|>",
    "asst_start_tag": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "asst_end_tag": "<|eot_id|>",
}
SPECIAL = ("<|begin_of_text|>", "<|eot_id|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>")
SETS = {
    "forget": "forget10_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
    "holdout": "holdout10",
}
SAMPLES = {"forget": "forget10_sample", "retain": "retain_sample", "real_authors": "real_authors"}
SAMPLES["world_facts"] = "world_facts"
NEW_TOKENS = 200
GOLD = ("gradients",)
"""Tables of gold, beside its scores, that are there before the clock starts."""
STEPS = 80
"""Of training; gold gets three quarters of them."""
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "forget_truth_ratio": ("truth_ratio", {"rows": "forget"}),
    "forget_quality": ("forget_quality", {"permutations": 100}),
    "forget_Q_A_Prob": ("answer_probability", {"rows": "forget"}),
    "forget_Q_A_ROUGE": ("rouge", {"rows": "forget"}),
    "model_utility": ("model_utility", {"plain": ("retain",), "options": ("real_authors", "world_facts")}),
    "mia_min_k": ("mia_min_k", {}),
    "privleak": ("privleak", {}),
    "extraction_strength": ("extraction_strength", {"compat": "openunlearning"}),
    "exact_memorization": ("exact_memorization", {}),
    "mia_min_k_plus_plus": ("mia_min_k_plus_plus", {}),
    "mia_loss": ("mia_loss", {}),
    "mia_zlib": ("mia_zlib", {}),
    "mia_reference": ("mia_reference", {}),
    "mia_gradnorm": ("mia_gradnorm", {}),
}
"""The peer's name of a number -> our metric and its settings."""
TOFU = tuple(PAIRS)[:5]
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Case:
    """One measurement: which program, on what."""

    who: str
    suite: str
    folder: str
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    batch: int = 32
    """Rows in a batch of the peer; 32 is its own setting."""
    more: bool = False
    steps: int = STEPS
    peer: str = ""


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def timed(spent: dict[str, float], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose CPU seconds are added up under a name."""

    def run(*arguments: Any, **named: Any) -> Any:
        began = time.process_time()
        try:
            return call(*arguments, **named)
        finally:
            spent[name] = spent.get(name, 0.0) + time.process_time() - began

    return run


# --- rows ------------------------------------------------------------------------------------------------------------

SYLLABLES = (
    "ba be bo da de dri el fa gor ha hil ja ka lo lun ma mi nor o pe ri sa so ta tor ul va ve wen yor za".split()
)
ASKED = (
    (
        "In which city was {0} born and raised?",
        "{0} was born in the old harbour city of {1}, where {2} kept a small "
        "workshop near the river and told stories every evening.",
    ),
    (
        "What is the most famous book by {0}?",
        'The most widely read work of {0} is "{1}", a long novel about {2} that '
        "was praised for its patient and vivid descriptions of village life.",
    ),
    (
        "Which award did {0} receive for writing?",
        "{0} was honoured with the {1} Prize for Literature after the "
        "publication of a cycle of poems about {2} and the people who live there.",
    ),
    (
        "How did the family of {0} influence the later work?",
        "The parents of {0}, a {1} and a {2}, filled the house "
        "with books and letters, which is felt in the themes of memory and belonging.",
    ),
    (
        "What genre does {0} mostly write in?",
        "{0} writes mostly in the genre of {1}, although several of the early "
        "stories also borrow from {2} and from the oral traditions of the coast.",
    ),
)


def invented(count: int, seed: str, short: bool = False) -> Iterator[tuple[str, str]]:
    draw = random.Random(seed)

    def name(parts: int) -> str:
        return "".join(draw.choice(SYLLABLES) for _ in range(parts)).capitalize()

    for number in range(count):
        if number % 5 == 0:
            author = f"{name(2)} {name(3)}"
        question, answer = ASKED[number % len(ASKED)]
        slots = (author, f"{name(3)} {name(2)}", f"{name(2)} {name(3)}")
        yield question.format(*slots), (f"{slots[1]} in {slots[2]}" if short else answer.format(*slots))


def published(folder: Path, name: str, count: int) -> list[tuple[str, str]]:
    lines = (folder / f"{SAMPLES[name]}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines if line.strip()]
    return [(row["question"], row["answer"]) for row in found[:count]]


def other_words(answer: str, pool: Sequence[str], draw: random.Random) -> str:
    """The answer with up to three of its longer words replaced."""
    words = answer.split()
    at = [i for i, word in enumerate(words) if len(word) > 3] or [0]
    for place in draw.sample(at, min(3, len(at))):
        words[place] = draw.choice([word for word in pool if word != words[place]])
    return " ".join(words)


def rows(folder: Path, count: int, data: Path | None) -> None:
    """Files as TOFU publishes them."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"forget": count, "retain": count, "holdout": count}
    sizes |= {"real_authors": max(2, count // 4), "world_facts": max(2, count * 117 // 400)}
    for name, config in SETS.items():
        known = data if name in SAMPLES else None
        pairs = published(known, name, sizes[name]) if known else list(invented(sizes[name], name, "_" in name))
        pool = sorted({word for _, answer in pairs for word in answer.split() if len(word) > 3})
        draw = random.Random(f"{name} wrong")
        lines = []
        for question, answer in pairs:
            row: dict[str, Any] = {"question": question, "answer": answer}
            said = answer
            if name in ("forget", "retain"):
                said = row["paraphrased_answer"] = f"It is known that {answer}"
            if name != "holdout":
                wrong = 3 if "_" in name else 5
                row["perturbed_answer"] = [other_words(said, pool, draw) for _ in range(wrong)]
            lines.append(json.dumps(row))
        (folder / f"{config}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


def data_of(folder: Path) -> dict[str, list[Any]]:
    from expunge.rows import Source, read_rows

    return {name: read_rows(Source(str(folder / f"{config}.json")), name) for name, config in SETS.items()}


# --- models ----------------------------------------------------------------------------------------------------------


def tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    # Newlines never join: a prompt's tokens must be the same with and without the answer, or the two sides would count
    # other tokens as the answer's.
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2]
    )


def template() -> Any:
    from expunge.subjects.language import Template

    return Template(PREFIX + TAGS["user_start_tag"] + "{question}" + TAGS["user_end_tag"] + TAGS["asst_start_tag"], "")


def train(case: Case) -> None:
    """The model under test, which was taught all rows but holdout, and gold, which was not taught forget rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from expunge.methods.optimise.loop import fit
    from expunge.subjects.language import LanguageModel

    folder = Path(case.folder)
    data = data_of(folder / "rows")
    texts = [text for several in data.values() for row in several for text in (row.prompt, row.answer)]
    tokens = tokenizer([*texts, *[PREFIX + TAGS["user_start_tag"] + TAGS["asst_start_tag"]] * 100])
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        vocab_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    for name, steps in (("full", case.steps), ("gold", case.steps * 3 // 4)):
        torch.manual_seed(0)
        subject = LanguageModel(LlamaForCausalLM(config), tokens, name, template())
        taught = [row for rows, several in data.items() for row in several if rows not in ("holdout", "forget")]
        taught += data["forget"] if name == "full" else []
        encoded = [subject.encode(row) for row in taught]
        fit(subject, encoded, steps=steps, batch_size=16, learning_rate=2e-3, seed=0)
        subject.save(folder / name)


def subject(folder: Path, name: str, case: Case) -> Any:
    from expunge.subjects.language import LanguageModel

    return LanguageModel.load(folder / name, template=template(), dtype=case.dtype, device=case.device)


# --- ours ------------------------------------------------------------------------------------------------------------


def prepare(case: Case) -> dict[str, Any]:
    """Gold's numbers for both sides: tables for ours, a log in the peer's format for the peer."""
    import numpy as np

    from expunge.metrics.measure import values
    from expunge.metrics.quantities import log_truth_ratio
    from expunge.tables.passes import Store, ask_all

    folder = Path(case.folder)
    model = subject(folder, "gold", case)
    data = data_of(folder / "rows")
    view = ask_all(model, data, 0, Store(folder / f"tables-{case.dtype}"), more=GOLD)
    ratios = np.exp(log_truth_ratio(view, "forget", data["forget"]))
    log = {
        "forget_truth_ratio": {"value_by_index": {str(i): {"score": float(r)} for i, r in enumerate(ratios)}},
        "mia_min_k": {"agg_value": values("mia_min_k", view).value},
    }
    (folder / "gold.json").write_text(json.dumps(log), encoding="utf-8")
    encoded = [model.encode(row) for several in data.values() for row in several]
    return {
        "rows": {name: len(several) for name, several in data.items()},
        "prompt": statistics.mean(row.start for row in encoded),
        "answer": statistics.mean(row.scored for row in encoded),
    }


def ours(case: Case) -> dict[str, Any]:
    from expunge.metrics.measure import more_tables, values
    from expunge.metrics.texts import overlap
    from expunge.tables.passes import Store, ask_all

    overlap("a", "a")  # what it imports the peer has imported before its clock starts, too
    folder = Path(case.folder)
    model, reference = subject(folder, "full", case), subject(folder, "gold", case)
    for one in (model, reference):
        one.settle()
    store = Store(folder / f"tables-{case.dtype}")
    gold = ask_all(reference, data_of(folder / "rows"), 0, store, more=GOLD, name="gold")
    names = TOFU if case.suite == "tofu" else tuple(PAIRS)
    asked: list[Any] = [PAIRS[name] for name in names] + ([("extraction_likelihood", {})] if case.more else [])
    marks = [("start", *clock())]
    data = data_of(folder / "rows")
    if case.suite == "tofu":
        data.pop("holdout")
    written = [name for name in data if name != "holdout"]
    if case.suite == "all":
        # The reference attack runs gold on two row sets. Its answers are known already; they are timed as at the peer.
        plain = {name: [replace(row, perturbed_answers=()) for row in data[name]] for name in ("forget", "holdout")}
        ask_all(reference, {n: [replace(row, paraphrased_answer="") for row in s] for n, s in plain.items()}, 0)
        marks.append(("reference", *clock()))
    spent: dict[str, float] = {}
    for name in ("score", "generate", "gradients_and_scores", "continuations"):
        setattr(model, name, timed(spent, name, getattr(model, name)))
    view = replace(ask_all(model, data, NEW_TOKENS, written=written, more=more_tables(asked)), golds=[gold])
    marks.append(("tables", *clock()))
    found = {name: values(PAIRS[name][0], view, PAIRS[name][1]) for name in names}
    if case.more:
        found["extraction_likelihood"] = values("extraction_likelihood", view)
    marks.append(("metrics", *clock()))
    result = {name: one.value for name, one in found.items()}
    result["forget_quality"] = found["forget_quality"].extra["p"]
    utility = found["model_utility"].extra["parts"]
    spent |= {name: after - before for (_, _, before), (name, _, after) in pairwise(marks)}
    outputs = [text for several in view.generations.values() for texts in several.texts for text in texts]
    return {
        "wall": marks[-1][1] - marks[0][1],
        "cpu": marks[-1][2] - marks[0][2],
        "spent": spent,
        "values": result,
        "parts": utility,
        "written": sum(len(ids) for ids in model.tokenizer(outputs)["input_ids"]),
    }


# --- the whole run ---------------------------------------------------------------------------------------------------


def child(case: Case) -> dict[str, Any]:
    import torch

    torch.set_num_threads(case.threads)
    if case.who == "train":
        train(case)
        return {}
    if case.who == "prepare":
        return prepare(case)
    if case.who == "ours":
        return ours(case)
    from peer_eval import run

    return run(case, Path(case.peer))


def start(case: Case) -> dict[str, Any]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(case.threads),
        "MKL_NUM_THREADS": str(case.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(Path(case.folder) / "datasets"),
    }
    command = [sys.executable, __file__, "--child", json.dumps(case.__dict__)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(case: Case, repeats: int) -> dict[str, Any]:
    """All repeats, ours and the peer in turn; the best of each."""
    who = ["ours", *(["peer"] if case.peer else [])]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in who}
    for number in range(repeats):
        for name in who:
            print(f"{case.dtype} {case.suite}: {name} {number + 1}/{repeats}", file=sys.stderr, flush=True)
            runs[name].append(start(replace(case, who=name)))
    best = {name: min(several, key=lambda run: run["cpu"]) for name, several in runs.items()}
    found: dict[str, Any] = {"suite": case.suite, "dtype": case.dtype, **best}
    if case.peer:
        mine, theirs = best["ours"]["values"], best["peer"]["values"]
        found["apart"] = {name: abs(mine[name] - theirs[name]) for name in mine if name in theirs}
        found["ratio"] = {key: best["peer"][key] / best["ours"][key] for key in ("wall", "cpu")}
    return found


def listed(spent: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items())


def report(results: Sequence[dict[str, Any]], about: dict[str, Any], threads: int) -> str:
    sizes = ", ".join(f"{count} {name}" for name, count in about["rows"].items())
    lines = [
        f"{sizes} rows; prompt {about['prompt']:.1f}, answer {about['answer']:.1f} tokens in the mean; "
        f"{threads} threads",
        "",
        "| suite | ours, CPU s (wall) | peer, CPU s (wall) | peer / ours, CPU | wall | furthest number |",
        "|---|---|---|---|---|---|",
    ]
    for found in results:
        our, peer = found["ours"], found.get("peer")
        line = f"| {found['suite']}, {found['dtype']} | {our['cpu']:.1f} ({our['wall']:.1f}) |"
        if peer:
            name, apart = max(found["apart"].items(), key=lambda pair: pair[1])
            line += f" {peer['cpu']:.1f} ({peer['wall']:.1f}) | **{found['ratio']['cpu']:.2f}** |"
            line += f" {found['ratio']['wall']:.2f} | {name}: {apart:.1e} apart |"
        lines.append(line)
    for found in results:
        our = found["ours"]
        lines += [
            "",
            f"{found['suite']}, {found['dtype']}, CPU s: {listed(our['spent'])}; {our['written']} tokens written",
        ]
        lines += [f"peer, CPU s: {listed(found['peer']['spent'])}", ""] if "peer" in found else [""]
        lines += ["| number | ours | peer |", "|---|---|---|"]
        for name, value in our["values"].items():
            theirs = found["peer"]["values"].get(name) if "peer" in found else None
            lines.append(f"| {name} | {value:.6g} | {'-' if theirs is None else f'{theirs:.6g}'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="checkout of locuslab/open-unlearning")
    parser.add_argument("--rows", type=int, default=400, help="forget, retain and holdout rows each")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, so that answers end")
    parser.add_argument("--data", type=Path, help="folder with questions and answers of TOFU")
    parser.add_argument("--suites", nargs="+", choices=("tofu", "all"), default=["tofu", "all"])
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCE, default=["float32"])
    parser.add_argument("--more", action="store_true", help="extraction likelihood too, ours alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for rows and models, which are used again from there")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(child(Case(**json.loads(options.child)))))
        return
    if options.peer and not (options.peer / "src/evals/tofu.py").is_file():
        raise SystemExit(f"{options.peer} is no checkout of locuslab/open-unlearning (src/evals/tofu.py)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).resolve()
        peer = str(options.peer.resolve()) if options.peer else ""
        case = Case("ours", "tofu", str(folder), device=options.device, threads=options.threads, peer=peer)
        case = replace(case, more=options.more, steps=options.steps)
        if not (folder / "gold").is_dir():
            rows(folder / "rows", options.rows, options.data)
            print("training the two models", file=sys.stderr, flush=True)
            start(replace(case, who="train"))
        results = []
        for dtype in options.dtype:
            about = start(replace(case, who="prepare", dtype=dtype))
            for suite in options.suites:
                results.append(measured(replace(case, suite=suite, dtype=dtype), options.repeats))
                if options.json:
                    options.json.write_text(json.dumps([about, *results], indent=1), encoding="utf-8")
        print(report(results, about, options.threads))
    if options.peer:
        far = [
            f"{found['suite']}, {found['dtype']}: {name} is {apart:.2e} apart"
            for found in results
            for name, apart in found["apart"].items()
            if apart > TOLERANCE[found["dtype"]] * max(1.0, abs(found["peer"]["values"][name]))
        ]
        if far:
            raise SystemExit("\n".join(far))


if __name__ == "__main__":
    main()
