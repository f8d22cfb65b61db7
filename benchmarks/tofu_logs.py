"""Figures from TOFU's published evaluation logs: python benchmarks/tofu_logs.py DIR [GOLD]

DIR holds `*.eval_log_aggregated.json`; GOLD is the file whose model counts as gold (by default the one with retain90 in
its name). Printed are our metrics on the logged values, and how far they are from what the logs state.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

from expunge.benchmarks import tofu_logs
from expunge.errors import ExpungeError
from expunge.metrics import measure


def main(folder: Path, gold: str = "") -> None:
    paths = sorted(folder.glob("*.eval_log_aggregated.json"))
    chosen = folder / gold if gold else next((path for path in paths if "retain90" in path.name), None)
    if chosen is None:
        raise SystemExit(f"{folder} has no *retain90*.eval_log_aggregated.json; name the gold log as second argument")
    print(f"Against {chosen.name}, on the forget rows that both logs have:\n")
    print(tofu_logs.table(paths, chosen))
    print("\nEvery pair on the forget rows they share:\n\n| pair | n | D | log10 p | paired p |\n|---|---|---|---|---|")
    views = [tofu_logs.read(path) for path in paths]
    for first, second in combinations(views, 2):
        try:
            made = measure.values("forget_quality", tofu_logs.shared(first, second))
        except ExpungeError:
            print(f"| {first.name}, {second.name} | 0 | - | - | - |")
            continue
        n, distance, paired = (made.extra[key] for key in ("n", "D", "paired_p"))
        log10_p = round(made.value, 2) + 0.0
        print(f"| {first.name}, {second.name} | {n} | {distance:.3f} | {log10_p:.2f} | {paired:.4f} |")
    print("\nLargest difference from what the logs state:\n")
    for path in paths:
        told = ", ".join(f"{name} {value:.1e}" for name, value in tofu_logs.differences(path).items())
        print(f"- {path.name}: {told}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), *sys.argv[2:])
