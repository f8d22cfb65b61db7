"""Where the time of one optimiser step goes: matrix products, and what comes beside them.

    python benchmarks/step_parts.py [--shape small] [--dtype fp32] [--jobs grad_diff npo rmu3] [--steps 4] [--threads 1]

The steps of `steps.py`, watched by torch's profiler after one that warms up. Every operation counts for itself alone;
what is left of the wall clock is Python, launching and the profiler itself. One thread, so that an operation's time is
the step's.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import steps as steps_benchmark
import torch
from steps import DTYPES, JOBS, SHAPES, Case

GROUPS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "mkldnn_linear", "_grouped_mm"),
    "attention": ("scaled_dot_product",),
    "AdamW and clipping": ("fused_adam", "lerp", "addcdiv", "addcmul", "linalg_vector_norm", "foreach_norm"),
    "copies, gathers, sums of rows": ("copy_", "cat", "index", "embedding", "gather", "scatter", "zero_", "fill_"),
}
REST = "element-wise work, softmax, norms"


def group(name: str) -> str:
    """Which part an operation belongs to."""
    plain = name.removeprefix("aten::").lstrip("_")
    if plain in GROUPS["matrix products"]:
        return "matrix products"
    for part, names in list(GROUPS.items())[1:]:
        if any(plain.startswith(one) for one in names):
            return part
    return REST


def watched(case: Case) -> tuple[dict[str, float], float]:
    """(seconds of a step by part, seconds of a step)"""
    from expunge.methods.optimise.unlearn import unlearn
    from expunge.registry import get

    name, settings, scope, _ = JOBS[case.job]
    subject, data, training = steps_benchmark.setting(case)
    steps_benchmark.warm(case)
    profiler: Any = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    clock = [0.0, 0.0]

    def at(_: Any, step: int) -> None:
        if step == 1:
            profiler.__enter__()
            clock[0] = time.perf_counter()
        else:
            clock[1] = time.perf_counter()
            profiler.__exit__(None, None, None)

    ends = [1, case.steps + 1]
    unlearn(
        subject,
        get("methods", name),
        settings,
        scope=scope,
        data=data,
        training=training,
        evaluate_at=ends,
        evaluate=at,
    )
    found = dict.fromkeys([*GROUPS, REST], 0.0)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            found[group(event.key)] += 1e-6 * event.self_cpu_time_total / case.steps
    return found, (clock[1] - clock[0]) / case.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=["grad_diff", "npo", "rmu3"])
    parser.add_argument("--steps", type=int, default=4, help="watched steps, after one that warms up")
    parser.add_argument("--batch", type=int, default=8, help="forget rows of a step, and as many retain rows")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    print("| step | s | " + " | ".join([*GROUPS, REST, "Python and the rest"]) + " |")
    print("|---" * (len(GROUPS) + 4) + "|")
    for shape in options.shape:
        for dtype in options.dtype:
            for job in options.jobs:
                case = Case("ours", job, shape, dtype, "cpu", options.steps, options.batch, options.threads)
                parts, whole = watched(case)
                shares = [*parts.values(), max(0.0, whole - sum(parts.values()))]
                cells = " | ".join(f"{share / whole:.0%}" for share in shares)
                print(f"| {shape}, {dtype}: {job} | {whole:.3f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
