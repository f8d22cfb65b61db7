"""Handwritten digits, a small classifier of them, three that never saw a 3, and the files that ask to forget the 3.

    python examples/digits/prepare.py runs/digits

Offline, in less than a minute. What is there already is not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from expunge.pictures import chosen, write_folder
from expunge.world.pictures.draw import digits
from expunge.world.pictures.models import Recipe, trained

CLASSES = [str(number) for number in range(10)]
GONE = {"label": "3"}
RECIPE = Recipe(side=16, widths=(8, 16, 32), epochs=8)

REQUEST = """\
# A class of pictures is to be forgotten. Paths are relative to this file.
name: no-3
reason: an example
model: models/original
gold: [models/gold-0, models/gold-1, models/gold-2]
data:
  forget:  {path: data, split: train, where: {label: "3"}}
  retain:  {path: data, split: train, unless: {label: "3"}}
  holdout: {path: data, split: test, where: {label: "3"}}
  general: {path: data, split: test, unless: {label: "3"}}
method: random_label
training: {steps: 24, learning_rate: 1.0e-3, guard: false}
"""

SWEEP = """\
# The same request by several methods and seeds.
name: which-method
request: request.yaml
methods: [random_label, neggrad_plus, {salun: {objective: random_label}}]
seeds: [0, 1]
set: {proof: quick, audit.self_test: false}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for pictures, models and files")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    drawn = digits(16)
    train, test = drawn["train"][:450], drawn["test"][:150]
    for name, rows in (("train", train), ("test", test)):
        if not (folder / "data" / name).is_dir():
            write_folder(rows, folder / "data" / name)
    _, kept = chosen(train, GONE)
    for seed, (name, rows) in enumerate([("original", train), *((f"gold-{i}", kept) for i in range(3))]):
        if not (folder / "models" / name / "config.json").is_file():
            trained(rows, CLASSES, RECIPE, seed).save(folder / "models" / name)
            print(f"{name}: trained on {len(rows)} pictures")
    (folder / "request.yaml").write_text(REQUEST, encoding="utf-8")
    (folder / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    print(f"ready: {folder / 'request.yaml'}, {folder / 'sweep.yaml'}")


if __name__ == "__main__":
    main()
