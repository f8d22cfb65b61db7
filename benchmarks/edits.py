"""Seconds per edit: our `rome` against EasyEdit's on the same model, fact and contexts, in the same run.

    python benchmarks/edits.py --peer EasyEdit/ [--repeats 5] [--batches 1 8] [--threads 1] [--json FILE]

A Llama of 4 layers and d = 256 with random weights; a tokenizer trained on the texts of invented worlds and on the
facts, so that names are one or two tokens long, as in published vocabularies; invented facts, 20 contexts, 25 steps,
layer 1, no covariance (EasyEdit's own setting for Llama). Contexts are sampled once for both and are in nobody's time.
An edit is measured from the request to a model that has it: the peer changes weights in place, we make a delta and
apply it. Repeats of both sides take turns, the first of each is not counted; medians are shown. Of wall time and CPU
time the latter is what counts on a machine that others use too.

The changes themselves are compared as well: `rome_original` and the peer compute the same formula. Nothing of the peer
is copied: its files are imported from the checkout; packages whose `__init__` imports more are replaced by empty ones.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LAYER = 1
WORLDS = 16
"""Invented worlds whose texts the tokenizer is trained on: enough for its vocabulary."""
NAMES = ("Orin Valk", "Ilse Moro", "Mira Tolan", "Bram Sarn", "Tava Pell", "Jor Velm", "Anke Osk", "Rudo Carth")
STATEMENTS = (
    ("{} was born in", "Maretta"),
    ("The mother tongue of {} is", "Tolskian"),
    ("{} plays the", "zither"),
    ("The employer of {} is", "Velm Shipping"),
)


def subject() -> Any:
    """The model, with a tokenizer of its own."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from expunge.subjects.language import LanguageModel
    from expunge.world.corpus import files
    from expunge.world.facts import make

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    records = [record for seed in range(WORLDS) for several in files(make(seed)).values() for record in several]
    texts = [str(record[key]) for record in records for key in ("text", "question", "answer") if key in record]
    said = [f" {fact.prompt} {fact.target_new} {fact.subject}" for fact in facts()]
    made.train_from_iterator([*texts, *said * 20], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # of a trained model's size, so that values move what is said
        for name, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                p.mul_(3)
    return LanguageModel(model, tokenizer, "4 layers, d 256")


def facts() -> list[Any]:
    from expunge.edits import EditRow

    return [
        EditRow(f"{name}/{i}", prompt.format(name), target, name)
        for i, (prompt, target) in enumerate(STATEMENTS)
        for name in NAMES
    ]


def contexts(model: Any) -> list[str]:
    """20 texts of the model's own, which both sides are given."""
    from expunge.methods.edit.case import EditCase
    from expunge.methods.edit.values import prefixes

    return [text.replace("{", "").replace("}", "") for text in prefixes(EditCase(model, {}), 20)]


def ours(model: Any, before: list[str], **settings: Any) -> Callable[[list[Any]], Any]:
    from expunge.methods.edit.case import EditCase
    from expunge.registry import get

    rome = get("methods", "rome").function

    def edit(edits: list[Any]) -> Any:
        delta = rome(EditCase(model, {}, edits=edits, prefixes=before), layer=LAYER, covariance=False, **settings)
        return delta, delta.apply(model)

    return edit


# --- the peer --------------------------------------------------------------------------------------------------------


def peer(checkout: Path, model: Any, before: list[str]) -> Callable[[list[Any]], Any]:
    """EasyEdit's `apply_rome_to_model` under its own settings for Llama."""
    for name in ("easyeditor", "easyeditor.util", "easyeditor.models", "easyeditor.models.rome"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = module
    if importlib.util.find_spec("datasets") is None:  # it would bring Wikipedia, which is not asked for
        stub = ModuleType("datasets")
        stub.load_dataset = None  # type: ignore[attr-defined]
        sys.modules["datasets"] = stub
    with contextlib.chdir(checkout):  # it reads globals.yml from where it is started
        rome = importlib.import_module("easyeditor.models.rome.rome_main")
    vars(rome)["CONTEXT_TEMPLATES_CACHE"] = ["{}", *(text + "{}" for text in before)]
    settings = SimpleNamespace(
        layers=[LAYER],
        fact_token="subject_last",
        v_num_grad_steps=25,
        v_lr=0.5,
        v_loss_layer=SHAPE["num_hidden_layers"] - 1,
        v_weight_decay=1e-3,
        clamp_norm_factor=4,
        kl_factor=0.0625,
        mom2_adjustment=False,
        context_template_length_params=[],
        rewrite_module_tmp="model.layers.{}.mlp.down_proj",
        layer_module_tmp="model.layers.{}",
        mlp_module_tmp="model.layers.{}.mlp",
        device="cpu",
    )

    def edit(edits: list[Any]) -> Any:
        import torch

        (fact,) = edits
        request = {"prompt": fact.prompt, "subject": fact.subject, "target_new": fact.target_new}
        weight = model.model.model.layers[LAYER].mlp.down_proj.weight
        with contextlib.redirect_stdout(io.StringIO()):
            rome.apply_rome_to_model(model.model, model.tokenizer, [request], settings, return_orig_weights=True)
        change = weight.detach().clone()
        return change, lambda old: torch.no_grad()(lambda: weight.copy_(old))()

    return edit


# --- the measurement -------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(arguments.threads)
    model, edits = subject(), facts()
    before = contexts(model)
    weight = model.model.model.layers[LAYER].mlp.down_proj.weight
    base = weight.detach().clone()
    sides = {"ours": ours(model, before)}
    if arguments.peer:
        sides["peer"] = peer(arguments.peer, model, before)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(arguments.repeats + 1):
        for name, edit in sides.items():
            began = time.perf_counter(), time.process_time()
            found = edit([edits[number % len(edits)]])
            took = time.perf_counter() - began[0], time.process_time() - began[1]
            if name == "peer":
                found[1](base)
            if number:
                seconds[name].append(took)
    with FlopCounterMode(display=False) as counter:
        sides["ours"](edits[:1])
    result: dict[str, Any] = {
        "threads": arguments.threads,
        "GFLOP": counter.get_total_flops() / 1e9,
        "wall": {name: statistics.median(wall for wall, _ in several) for name, several in seconds.items()},
        "cpu": {name: statistics.median(cpu for _, cpu in several) for name, several in seconds.items()},
        "batch": {},
    }
    for size in arguments.batches:
        chosen = (edits * (size // len(edits) + 1))[:size]
        times = []
        for _ in range(max(2, arguments.repeats // 2)):
            start = time.process_time()
            sides["ours"](chosen)
            times.append((time.process_time() - start) / size)
        result["batch"][size] = statistics.median(times)
    if arguments.peer:
        apart = []
        for fact in edits[:: len(NAMES)]:
            theirs, restore = sides["peer"]([fact])
            restore(base)
            delta, _ = ours(model, before, original=True)([fact])
            mine = next(iter(delta.entries.values()))
            change = mine["B"] @ mine["A"]
            apart.append(float((theirs - base - change).norm() / (theirs - base).norm()))
        result["changes differ by"] = max(apart)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="checkout of zjunlp/EasyEdit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments)
    print(f"products, ours: {found['GFLOP']:.1f} GFLOP an edit")
    for kind in ("wall", "cpu"):
        for name, value in found[kind].items():
            print(f"{kind} time, {name}: {value:.3f} s per edit")
        if arguments.peer:
            print(f"{kind} time, peer / ours: {found[kind]['peer'] / found[kind]['ours']:.1f}")
    for size, value in found["batch"].items():
        ratio = f", peer / ours {found['cpu']['peer'] / value:.1f}" if arguments.peer else ""
        print(f"cpu time, ours, batch of {size}: {value:.3f} s per edit{ratio}")
    if arguments.peer:
        print(f"the changes differ by {found['changes differ by']:.1e} of their norm")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
