"""What a live reference copy costs in an NPO step: our step, the same step with a live copy, the usual trainer's step.

Every variant runs in a process of its own, in turn, several times; ratios of medians are printed. The usual trainer's
step pads rows, takes logits of all positions, and runs a deep copy of the model as the reference.

    python benchmarks/npo_reference.py [--shape small|bigvocab] [--scope all|layers|lora] [--steps 6] [--repeats 3]
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time

SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 4096},
    "bigvocab": {"hidden_size": 512, "intermediate_size": 1376, "vocab_size": 128256},
}
VARIANTS = ("ours", "live", "usual")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(shape: str, scope: str, variant: str, steps: int, retain: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from expunge.methods.optimise.loop import Drawn, Recipe, Turn, references
    from expunge.registry import get
    from expunge.subjects.language import LanguageModel
    from expunge.subjects.packed import Encoded

    baseline = peak()
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape],
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    subject = LanguageModel(LlamaForCausalLM(config), tokenizer=None, name=shape)
    generator = torch.Generator().manual_seed(1)

    def rows(count: int) -> list[Encoded]:
        found = []
        for _ in range(count):
            prompt, answer = (int(torch.randint(a, b, (1,), generator=generator)) for a, b in ((50, 68), (20, 38)))
            ids = torch.randint(0, config.vocab_size, (prompt + answer,), generator=generator).tolist()
            found.append(Encoded(tuple(ids), prompt, 1, ""))
        return found

    drawn = Drawn({"forget": rows(8), "retain": rows(8)}, [{"forget": list(range(8))}] * (steps + 1))
    if retain != "none":
        drawn.steps = [{"forget": list(range(8)), "retain": list(range(8))}] * (steps + 1)
    npo = get("methods", "npo").function
    model = subject.model
    reference = copy.deepcopy(model) if variant != "ours" else None
    model.requires_grad_(scope == "all")
    if scope == "layers":
        for block in model.model.layers[-2:]:
            block.requires_grad_(True)
    if scope == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]), model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    live = subject.with_model(reference) if reference is not None else None
    if variant == "ours":
        drawn.constants["forget"] = references(subject, drawn.rows["forget"], hidden=False)

    def ours(index: int) -> None:
        if live is not None:
            drawn.constants["forget"] = references(live, drawn.rows["forget"], hidden=False)
        recipe = Recipe(lambda step: npo(step, retain=retain), ("forget", "retain"))
        Turn(subject, trained, drawn, recipe, index, {}, subject.head, micro_tokens=1 << 20).backward()

    def sums(net: torch.nn.Module, side: list[Encoded]) -> torch.Tensor:
        width = max(len(row.ids) for row in side)
        ids = torch.zeros(len(side), width, dtype=torch.long)
        labels = torch.full((len(side), width), -100)
        mask = torch.zeros(len(side), width, dtype=torch.long)
        for i, row in enumerate(side):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
            labels[i, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
            mask[i, : len(row.ids)] = 1
        logits = net(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
        )
        return -losses.sum(-1)

    def usual(_: int) -> None:
        assert reference is not None
        policy = sums(model, drawn.rows["forget"])
        with torch.no_grad():
            start = sums(reference, drawn.rows["forget"])
        loss = -20 * torch.nn.functional.logsigmoid(-0.1 * (policy - start)).mean()
        if retain != "none":
            count = sum(row.scored for row in drawn.rows["retain"])
            loss = loss - sums(model, drawn.rows["retain"]).sum() / count
        loss.backward()

    times = []
    for index in range(steps + 1):
        began = time.perf_counter()
        (usual if variant == "usual" else ours)(index)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    print(json.dumps({"seconds": statistics.median(times[1:]), "memory": peak() - baseline}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--scope", choices=("all", "layers", "lora"), default="all")
    parser.add_argument("--retain", choices=("none", "nll"), default="nll")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.shape, options.scope, options.child, options.steps, options.retain)
        return
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.repeats):
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--child", variant, "--shape", options.shape]
            command += ["--scope", options.scope, "--steps", str(options.steps), "--retain", options.retain]
            found[variant].append(
                json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
            )
    print(f"NPO step, {options.shape} shape, scope {options.scope}, retain {options.retain}, 8+8 rows, fp32")
    print(f"{'variant':8} {'s/step':>8} {'MB':>7} {'our time /':>11} {'our memory /':>13}")
    middle = {
        variant: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "memory")}
        for variant, runs in found.items()
    }
    for variant, values in middle.items():
        time_ratio, memory_ratio = (middle["ours"][key] / values[key] for key in ("seconds", "memory"))
        figures = f"{values['seconds']:8.3f} {values['memory'] / 1e6:7.0f} {time_ratio:11.2f} {memory_ratio:13.2f}"
        print(f"{variant:8} {figures}")


if __name__ == "__main__":
    main()
