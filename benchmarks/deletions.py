"""How long a deletion takes as an ensemble's ledger grows: 1,000, 10,000 and 100,000 rows.

A folder of five shards, six slices and six orders, as `expunge exact train` lays it out, with stages of a hundred
thousand numbers each; nothing is trained, as a deletion loads no model. One random row is deleted at a time. Deciding
is the choice of what goes; the whole reads the folder, removes files and rewrites the ledger. CPU time, and time by the
clock, which waits for the disk.

    python benchmarks/deletions.py [--rows 1000 10000 100000] [--deletions 5]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expunge.files import save_tensors
from expunge.methods.exact.ensemble import Design, Ensemble, write
from expunge.methods.exact.layout import cells
from expunge.methods.exact.orders import cyclic, prefixes
from expunge.methods.exact.stage import Settings

SHARDS, SLICES = 5, 6


def made(rows: int, folder: Path) -> Ensemble:
    """An ensemble of so many rows with every stage in its place."""
    stage = Settings(
        slices=SLICES,
        layer_wise=True,
        adapters=True,
        rank=16,
        alpha=16.0,
        rslora=True,
        modules="all",
        epochs=1.0,
        batch_size=64,
        learning_rate=1e-4,
        weight_decay=0.0,
        max_grad_norm=1.0,
        classes=(),
        seed=0,
    )
    design = Design("s3t", SHARDS, [cyclic(SLICES, SLICES)] * SHARDS, True, 1, stage, {})
    where = cells(rows, SHARDS, SLICES, seed=0)
    known = {f"row-{i:07d}": (cell, f"{i:064x}") for i, cell in enumerate(where)}
    write(folder, design, {"base": {"fingerprint": "0" * 64}}, known)
    for shard in range(SHARDS):
        for prefix in prefixes(design.orders[shard]):
            place = folder / "stages" / str(shard) / "-".join(map(str, prefix))
            place.mkdir(parents=True)
            save_tensors({"x": torch.zeros(100_000)}, place / "tensors.safetensors")
            (place / "stage.json").write_text('{"deletions": 0}', encoding="utf-8")
    return Ensemble.load(folder)


def measured(rows: int, deletions: int) -> dict[str, Any]:
    """Seconds, means over deletions."""
    found: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory(prefix="expunge-deletions-") as folder:
        left = made(rows, Path(folder) / "ensemble")
        for place in np.random.default_rng(1).permutation(rows)[:deletions]:
            cpu, clock = time.process_time(), time.perf_counter()
            left, done = left.delete([f"row-{place:07d}"])
            found.append((done.ledger_seconds, time.process_time() - cpu, time.perf_counter() - clock))
    decided, cpu_, clock_ = np.mean(found, axis=0)
    return {"rows": rows, "deciding": decided, "cpu": cpu_, "clock": clock_}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--deletions", type=int, default=5)
    arguments = parser.parse_args()
    print("rows     deciding, ms  CPU, s  clock, s")
    for rows in arguments.rows:
        one = measured(rows, arguments.deletions)
        print(f"{rows:<8} {1000 * one['deciding']:<13.3g} {one['cpu']:<7.3g} {one['clock']:.3g}", flush=True)


if __name__ == "__main__":
    main()
