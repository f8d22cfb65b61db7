"""Where the time of an optimiser step goes: the machine's own operators, by what they are for.

    python benchmarks/step_profile.py [--shape small bigvocab] [--dtype fp32 bf16] [--jobs npo rmu3] [--steps 5]
                                      [--operators 0]

The same steps as in steps.py (`unlearn` as users run it), under torch's profiler. An operator's own time counts where
it stands: within the head's function, within attention, in the optimiser; else by its kind. *Python* is the rest of the
wall clock: what lies between operators. The profiler itself adds a few microseconds to each operator, which the column
of calls puts in proportion. On one thread: with more of them a step runs in two halves side by side, whose times do not
add up to the wall clock.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from steps import DTYPES, JOBS, SHAPES, Case, setting, warm
from torch.profiler import ProfilerActivity, profile

from expunge.methods.optimise.unlearn import unlearn
from expunge.registry import get

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation"}
WITHIN = {
    "_LinearLogprob": "head: statistics of logits",
    "_LinearLogprobBackward": "head: statistics of logits",
    "aten::scaled_dot_product_attention": "attention",
    "ScaledDotProductFlashAttentionForCpuBackward0": "attention",
    "aten::_fused_adamw_": "AdamW",
    "aten::linalg_vector_norm": "gradient norm",
    "aten::_foreach_norm": "gradient norm",
}
MOVES = ("cat", "copy_", "clone", "index_select", "index_add_", "split", "zero_", "fill_", "_to_copy", "index", "stack")


def kind(event: Any) -> str:
    """What an operator is for."""
    if event.name in PRODUCTS:
        above = set(_above(event))
        return "products: head" if {"_LinearLogprob", "_LinearLogprobBackward"} & above else "products: blocks"
    for name in (event.name, *_above(event)):
        if name in WITHIN:
            return WITHIN[name]
    return "copies" if event.name.removeprefix("aten::") in MOVES else "element-wise and reductions"


def _above(event: Any) -> Iterator[str]:
    while (event := event.cpu_parent) is not None:
        yield event.name


def measured(case: Case) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]], float]:
    """({kind: (ms, calls) of a step}, the same by kind and operator, ms of a step's wall clock)"""
    name, settings, scope, _ = JOBS[case.job]
    subject, data, training = setting(case)
    warm(case)
    profiler = profile(activities=[ProfilerActivity.CPU])
    marks: list[float] = []

    def mark(_: Any, step: int) -> None:
        if step == 1:
            profiler.start()
        marks.append(time.perf_counter())
        if step == case.steps + 1:
            profiler.stop()

    unlearn(
        subject,
        get("methods", name),
        settings,
        scope=scope,
        data=data,
        training=training,
        evaluate_at=range(1, case.steps + 2),
        evaluate=mark,
    )
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events():
        for table, key in ((kinds, kind(event)), (operators, f"{kind(event)} | {event.name}")):
            table[key][0] += event.self_cpu_time_total * 1e-3 / case.steps
            table[key][1] += 1 / case.steps
    wall = (marks[-1] - marks[0]) * 1e3 / case.steps
    return ({k: (v[0], v[1]) for k, v in kinds.items()}, {k: (v[0], v[1]) for k, v in operators.items()}, wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=["npo", "rmu3"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--operators", type=int, default=0, help="name so many single operators as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for shape in options.shape:
        for dtype in options.dtype:
            for job in options.jobs:
                case = Case("ours", job, shape, dtype, "cpu", options.steps, 8, 1)
                kinds, operators, wall = measured(case)
                python = wall - sum(ms for ms, _ in kinds.values())
                print(
                    f"\n## {job}, {shape}, {dtype}: {wall:.1f} ms a step\n\n| | ms | share | calls |\n|---|---|---|---|"
                )
                for name, (ms, calls) in sorted(kinds.items(), key=lambda item: -item[1][0]):
                    print(f"| {name} | {ms:.1f} | {ms / wall:.0%} | {calls:.0f} |")
                print(f"| Python | {python:.1f} | {python / wall:.0%} | |", flush=True)
                chosen = sorted(operators.items(), key=lambda item: -item[1][0])[: options.operators]
                for name, (ms, calls) in chosen:
                    print(f"    {name}: {ms:.2f} ms, {calls:.0f} calls")


if __name__ == "__main__":
    main()
