"""What image papers report of a class, a sub-class or single rows that were to be forgotten.

Published tables have two families of columns: accuracies on unseen rows with an entropy-based membership attack (SSD,
arXiv:2308.07707), and SalUn's four with their mean distance to retraining (arXiv:2310.12508). Every column is best
where the retrained model stands, not at an end: give that one as `--gold`.

The data is a folder with the pictures `forget`, `retain` (both as trained on), `test_forget` (unseen, of what is
forgotten; for single rows there is none, and their own accuracy takes its place) and `test_retain` (unseen, the rest).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import RowError
from ..evidence import Measured, Scorecard, Table
from ..metrics.membership import auc_of
from ..pictures import Picture, chosen, read_pictures, write_folder
from ..registry import benchmark
from ..rows import Source
from ..subjects.fresh import buildable, fresh
from ..tables.distances import Distances
from ..tables.passes import Apart, Score
from ..tables.scores import Scores
from ..world.facts import World
from .case import Bench

SETS = ("forget", "retain", "test_forget", "test_retain")
SCORES = {
    "forget_accuracy": ("closest_to_gold", "How often unseen pictures of what was forgotten still get their class."),
    "retain_accuracy": ("higher", "How often unseen pictures of everything else get their class."),
    "training_forget_accuracy": ("closest_to_gold", "How often the forgotten pictures themselves get their class."),
    "training_retain_accuracy": ("higher", "How often kept training pictures get their class."),
    "membership": ("closest_to_gold", "How many forgotten pictures an attack on entropy still takes for trained on."),
    "membership_confidence": ("closest_to_gold", "The same of an attack on the confidence in the true class."),
    "zrf": ("closest_to_gold", "How nearly pictures of what was forgotten are answered as by an untrained network."),
}


def mini(_: World, folder: Path) -> None:
    """Written digits without the 3."""
    from ..world.pictures.draw import digits

    split(digits(), {"label": "3"}, folder)


def split(rows: dict[str, list[Picture]], where: dict[str, str], folder: str | Path) -> None:
    """Write the data of a request for a class (`{"label": "3"}`) or sub-class (`{"group": "2-3"}`)."""
    for name, kind in (("", "train"), ("test_", "test")):
        gone, kept = chosen(rows[kind], where)
        write_folder(gone, Path(folder) / f"{name}forget")
        write_folder(kept, Path(folder) / f"{name}retain")


@benchmark(paper="arXiv:2308.07707", data="a folder with forget, retain, test_forget, test_retain", modality=("image",))
def image_forgetting(bench: Bench) -> Scorecard:
    """Accuracy on what was forgotten and what was kept, membership attacks, and the mean distance to retraining.

    `membership` is a logistic regression on the entropy of the answer (kept training rows against unseen ones,
    balanced); `membership_confidence` a support vector machine on the confidence in the true class (C = 3, rbf), as
    SalUn's. The first is direction-blind: an unlearned class of very low entropy looks like a member, so read the area
    under the curve of the loss beside it. `zrf` is 1 - JS(model || untrained network) in bits (arXiv:2205.08096).
    """
    rows = read(Path(bench.source(mini)))
    asked = rows["test_forget"] or rows["forget"]
    untrained = fresh(bench.subject, 0) if buildable(bench.subject) else None
    tables = {role: ask(bench, role, rows) for role in bench.models}
    found = {role: measure(table, rows) for role, table in tables.items()}
    if untrained is not None:
        for role in bench.models:
            (table,) = bench.ask(role, [Apart(tuple(asked), untrained)])  # type: ignore[arg-type]
            found[role]["zrf"] = zrf(table)
    scores: list[Measured] = []
    about = {
        "forget_accuracy": asked,
        "retain_accuracy": rows["test_retain"],
        "training_forget_accuracy": rows["forget"],
        "training_retain_accuracy": rows["retain"],
        "membership": rows["forget"],
        "membership_confidence": rows["forget"],
        "zrf": asked,
    }
    for name, (direction, sentence) in SCORES.items():
        each = {role: values[name] for role, values in found.items() if name in values}
        if not each:
            continue
        scores.append(
            bench.score(name, name, each, about[name], direction=direction, ideal="gold's value", sentence=sentence)
        )
    tables_ = [_gaps(found)] if bench.golds else []
    areas = {role: area(table, rows) for role, table in tables.items()}
    notes = [
        "Area under the curve of the loss, forgotten pictures against unseen ones: "
        + ", ".join(f"{role} {value:.3f}" for role, value in areas.items())
        + "."
    ]
    if untrained is None:
        notes.append("No zrf: the model has neither a configuration nor a factory to build an untrained one by.")
    return bench.scorecard(
        scores,
        headline=["forget_accuracy", "retain_accuracy", "membership"],
        tables=tables_,
        notes=notes,
        rows={name: len(some) for name, some in rows.items()},
    )


def read(folder: Path) -> dict[str, list[Picture]]:
    """
    Raises:
        RowError: a set is missing; only `test_forget` may be.
    """
    found: dict[str, list[Picture]] = {}
    for name in SETS:
        if not (folder / name).is_dir():
            if name != "test_forget":
                raise RowError(f"{folder} has no folder {name!r}; expected {', '.join(SETS)}")
            found[name] = []
            continue
        found[name] = read_pictures(Source(str(folder / name)), name)
    return found


def ask(bench: Bench, role: str, rows: dict[str, list[Picture]]) -> dict[str, Scores]:
    """Scores of every set, in one pass over all of them."""
    items = [Score(tuple(((row.id, "answer"), row, None, None) for row in rows[name])) for name in SETS]  # type: ignore[misc]
    return dict(zip(SETS, bench.ask(role, items)))


def measure(tables: dict[str, Scores], rows: dict[str, list[Picture]]) -> dict[str, np.ndarray]:
    """Per-row values of every score."""
    hit = {name: np.asarray(table.hit, dtype=np.float64) for name, table in tables.items()}
    entropy = {name: -np.asarray(table.mean, dtype=np.float64) for name, table in tables.items()}
    confidence = {name: np.exp(np.asarray(table.logprob, dtype=np.float64)) for name, table in tables.items()}
    return {
        "forget_accuracy": hit["test_forget"] if rows["test_forget"] else hit["forget"],
        "retain_accuracy": hit["test_retain"],
        "training_forget_accuracy": hit["forget"],
        "training_retain_accuracy": hit["retain"],
        "membership": members(entropy["retain"], entropy["test_retain"], entropy["forget"], "logistic"),
        "membership_confidence": members(
            confidence["retain"], confidence["test_retain"], confidence["forget"], "machine"
        ),
    }


def zrf(table: Distances) -> np.ndarray:
    """(rows,) the metric `zrf` of single rows."""
    return 1 - table.jensen_shannon.astype(np.float64)


def members(seen: np.ndarray, unseen: np.ndarray, asked: np.ndarray, kind: str) -> np.ndarray:
    """(asked,) 1 where a classifier of one feature, fitted on seen against unseen rows, says seen."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    made = (
        LogisticRegression(class_weight="balanced")
        if kind == "logistic"
        else SVC(C=3, kernel="rbf", gamma="auto", class_weight="balanced")
    )
    features = np.concatenate([seen, unseen])[:, None]
    made.fit(features, np.repeat([1, 0], [len(seen), len(unseen)]))
    return np.asarray(made.predict(asked[:, None]), dtype=np.float64)


def area(tables: dict[str, Scores], rows: dict[str, list[Picture]]) -> float:
    """Chance that a forgotten picture has a lower loss than an unseen one; 0.5 tells nothing."""
    unseen = tables["test_forget"] if rows["test_forget"] else tables["test_retain"]
    losses = [-np.asarray(table.logprob, dtype=np.float64) for table in (tables["forget"], unseen)]
    return float(auc_of(*losses)(np.ones((1, sum(map(len, losses)))))[0])


def _gaps(found: dict[str, dict[str, np.ndarray]]) -> Table:
    """SalUn's four and their mean distance to gold: forgotten and kept training rows, unseen rows, membership."""
    columns = ("training_forget_accuracy", "training_retain_accuracy", "retain_accuracy", "membership_confidence")
    golds: Sequence[str] = [role for role in found if role.startswith("gold/")]
    gold = {name: float(np.mean([found[role][name].mean() for role in golds])) for name in columns}
    lines = []
    for role, values in found.items():
        means = [float(values[name].mean()) for name in columns]
        gap = float(np.mean([abs(mean - gold[name]) for mean, name in zip(means, columns)]))
        lines.append([role, *(f"{mean:.3f}" for mean in means), f"{gap:.3f}"])
    return Table(
        "Distance to retraining", ["model", *columns, "average gap"], lines, "Each column is best where gold stands."
    )
