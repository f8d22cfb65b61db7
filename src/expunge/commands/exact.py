"""`expunge exact`: ensembles whose training is laid out for deletion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .catalogue import Json, Plugins, load_plugins
from .console import assignments, duration, progressing, say, say_json, say_table

if TYPE_CHECKING:
    from ..methods.exact.ensemble import Ensemble

app = typer.Typer()
Folder = Annotated[Path, typer.Argument(metavar="ENSEMBLE", help="Folder of an ensemble.")]
Base = Annotated[str | None, typer.Option(help="The model it was trained over.", show_default="as when it was trained")]
Data = Annotated[str | None, typer.Option(help="Its rows.", show_default="as when it was trained")]
Split = Annotated[str, typer.Option(help="Split of a hub data set, or of such a folder.")]
Fields = Annotated[
    list[str] | None,
    typer.Option("--field", help="Our field name and the column's: question=q.", show_default=False),
]
Shards = Annotated[list[int] | None, typer.Option("--shard", help="Only this shard.", show_default="all")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda ...", show_default=False)]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 ...", show_default="as stored")]


@app.callback()
def group() -> None:
    """Ensembles whose training is laid out for deletion."""


@app.command()
def plan(
    shards: Annotated[int, typer.Option(min=1, help="Parts of the data with models of their own.")] = 5,
    slices: Annotated[int, typer.Option(min=1, help="Parts of a shard, each learnt in a stage of its own.")] = 6,
    budget: Annotated[
        list[int] | None, typer.Option(help="Orders per shard; SISA has one.", show_default="1 and as many as slices")
    ] = None,
    requests: Annotated[list[int] | None, typer.Option(help="Usable share after so many.", show_default="1 10")] = None,
    trials: Annotated[int, typer.Option(min=2, help="Simulated ensembles.")] = 4000,
    seed: Annotated[int, typer.Option(min=0, help="Of the simulation.")] = 0,
    json: Json = False,
) -> None:
    """Say how many deletions a layout serves.

    Theory beside a simulation of random requests, before anything is trained; and what training costs.
    """
    from ..methods.exact.capacity import compared

    found = compared(
        shards,
        slices,
        budget or sorted({1, slices}),
        requests=requests or [1, 10],
        trials=trials,
        seed=seed,
    )
    if json:
        say_json(found)
        return
    after = [key for key in found[0] if key.startswith("usable_")]
    columns = ["budget", "until one shard is out", "theory", "until all are out", "theory", "leading term"]
    columns += [f"usable after {key.removeprefix('usable_')}" for key in after]
    rows = [
        [
            str(one["budget"]),
            f"{one['one_out']:.1f} ± {one['one_out_error']:.1f}",
            f"{one['one_out_theory']:.1f}",
            f"{one['all_out']:.1f} ± {one['all_out_error']:.1f}",
            f"{one['all_out_theory']:.1f}",
            f"{one['leading_term']:.1f}",
            *(f"{one[key]:.2f}" for key in after),
            f"{one['passes']:.3g}",
        ]
        for one in found
    ]
    say_table([*columns, "passes over all rows per epoch"], rows)


@app.command()
def train(
    base: Annotated[str, typer.Argument(help="Backbone that has learnt none of the rows: folder or hub id.")],
    data: Annotated[str, typer.Option(help="The rows: file, folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the ensemble.")],
    method: Annotated[str, typer.Option(help="s3t or sisa.")] = "s3t",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A parameter of the method, e.g. shards=3.", show_default=False),
    ] = None,
    split: Split = "train",
    field: Fields = None,
    device: Device = None,
    dtype: Dtype = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Train an ensemble on rows.

    The same command goes on where a killed one stopped.
    """
    load_plugins(plugin)
    from ..errors import ParameterError
    from ..methods.exact.ensemble import ExactCase
    from ..registry import get

    part = get("methods", method)
    if "training_checkpoints" not in part.card.requires:  # type: ignore[union-attr]
        raise ParameterError(f"--method {method} lays no ensemble out; expected s3t or sisa")
    settings = part.resolve(assignments(set_ or []))
    subject, read = _opened(base, device, dtype)
    source = {"path": data, "split": split, "fields": {k: str(v) for k, v in assignments(field or []).items()}}
    rows = read(source)
    with progressing(json) as progress:
        case = ExactCase(subject, rows, out, {"base": _absolute(base), "rows": _located(source)}, progress)
        ensemble = part.function(case, **settings)
    _tell(ensemble, json)


@app.command()
def delete(
    ensemble: Folder,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of rows.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option(help="A file with an id a line.", show_default=False)] = None,
    ledger: Annotated[
        Path | None,
        typer.Option("--ledger", help="Ledger file; by default EXPUNGE_LEDGER or the user's.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Delete rows and everything that has seen them.

    No model is loaded: stages are dropped, and the longest that are left answer. Entered in the ledger.
    """
    from dataclasses import asdict

    from ..errors import RowError
    from ..ledger import Ledger
    from ..methods.exact.ensemble import Ensemble
    from ..report.words import size
    from ..tables.store import content_key

    asked = list(ids or [])
    if file is not None:
        try:
            asked += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise RowError(f"{file} cannot be read: {error}") from None
    if not asked:
        raise RowError(f"{ensemble}: no row named; give ids, or --file with an id a line")
    opened, book = Ensemble.load(ensemble), Ledger(ledger)
    opened.check(asked)
    salt = book.salt
    about: dict[str, Any] = {
        "run": content_key(salt, sorted(asked)),
        "kind": "delete",
        "method": opened.design.method,
        "rows": {"forget": len(set(asked))},
    }
    book.append("request_received", **about)
    left, done = opened.delete(asked)
    book.append("finished", **about, flags=["needs_training"] if done.needs_training else [])
    if json:
        say_json({**asdict(done), "share_usable": left.share_usable})
        return
    spent = duration(done.seconds)
    say(f"{len(done.row_ids)} rows deleted, {done.stages} stages dropped ({size(done.bytes)}) in {spent}")
    for text in _remarks(done):
        say(text)
    say_table(
        ["shard", "slices hit", "stages served before", "after"],
        [
            [shard, ", ".join(str(s) for k, s in done.hit if k == shard), before, after]
            for shard, (before, after) in done.served.items()
        ],
    )
    if left.needs_training:
        say(
            f"{len(left.answering)} shards answer, fewer than min_shards = {left.design.min_shards}: it needs training."
        )


@app.command()
def retrain(
    ensemble: Folder,
    base: Base = None,
    data: Data = None,
    shard: Shards = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Train again what deletions have dropped.

    On the rows that are left, from the longest beginning that is left of each order.
    """
    from dataclasses import asdict

    from ..methods.exact.ensemble import Ensemble

    opened = Ensemble.load(ensemble)
    subject, rows = _given(opened, base, data, device, dtype)
    with progressing(json) as progress:
        left, done = opened.train(subject, rows, shards=shard, progress=progress)
    if json:
        say_json({**asdict(done), "share_usable": left.share_usable, "answering": left.answering})
        return
    say(f"{done.stages} stages trained, {done.row_passes:,} rows read, in {duration(done.seconds)}")
    _tell(left, json)


@app.command()
def show(ensemble: Folder, json: Json = False) -> None:
    """Show shards, orders, and what was deleted."""
    from ..methods.exact.ensemble import Ensemble

    _tell(Ensemble.load(ensemble), json)


@app.command()
def verify(
    ensemble: Folder,
    base: Base = None,
    data: Data = None,
    shard: Shards = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Train what answers anew without the deleted rows, and compare every bit.

    Exit status 2 where a bit differs. Costs as much as training the stages that answer.
    """
    from ..errors import EnsembleError
    from ..methods.exact.ensemble import Ensemble

    opened = Ensemble.load(ensemble)
    subject, rows = _given(opened, base, data, device, dtype)
    with progressing(json) as progress:
        found = opened.verify(subject, rows, shards=shard, progress=progress)
    different = [str(one) for one, same in found.items() if not same]
    if different:
        raise EnsembleError(
            f"{ensemble}: what shard {', '.join(different)} answers from is not what training on the rows that are "
            "left gives on this machine"
        )
    if json:
        say_json({"shards": list(found), "rows": len(opened.rows), "same": True})
    else:
        say(
            f"{len(found)} shards answer from what training on the {len(opened.rows)} rows that are left gives, "
            "bit for bit (what the backbone had seen before is not covered)"
        )


@app.command()
def predict(
    ensemble: Folder,
    data: Annotated[str, typer.Option(help="Rows to answer: file, folder or hub id.")],
    out: Annotated[Path | None, typer.Option(help="File for one JSON line a row.", show_default=False)] = None,
    split: Split = "train",
    field: Fields = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Answer rows with the mean of all shards' logits."""
    from json import dumps

    from ..files import write_text
    from ..methods.exact.answers import answers
    from ..methods.exact.ensemble import Ensemble

    opened = Ensemble.load(ensemble)
    subject, read = _opened(base or opened.about["data"]["base"], device, dtype)
    rows = read({"path": data, "split": split, "fields": {k: str(v) for k, v in assignments(field or []).items()}})
    found = answers(opened.subject(subject), rows)
    if out is not None:
        write_text(out, "".join(dumps(one, ensure_ascii=False) + "\n" for one in found))
    right = sum(one["right"] for one in found) / len(found)
    if json:
        say_json({"rows": len(found), "accuracy": right, "shards": opened.answering})
    else:
        say(f"{right:.1%} of {len(found)} rows answered right by {len(opened.answering)} shards")


@app.command()
def export(
    ensemble: Folder,
    shard: Annotated[int, typer.Option(help="The shard.")],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Write the model of one shard as an ordinary model folder, to be audited or served."""
    from ..methods.exact.ensemble import Ensemble

    opened = Ensemble.load(ensemble)
    subject, _ = _opened(base or opened.about["data"]["base"], device, dtype)
    opened.member(subject, shard).save(out)
    say(str(out))


def _tell(ensemble: Ensemble, json: bool) -> None:
    shards: list[dict[str, Any]] = [
        {
            "shard": shard,
            "rows": ensemble.sizes[shard],
            "orders": [list(order) for order in ensemble.orders(shard)],
            "alive": ensemble.alive(shard),
            "served": list(ensemble.served(shard)),
        }
        for shard in range(ensemble.design.shards)
    ]
    deleted = sum(len(event["row_ids"]) for event in ensemble.deletions)
    about = {
        "folder": str(ensemble.folder),
        "method": ensemble.design.method,
        "rows": len(ensemble.rows),
        "deleted": deleted,
        "answering": ensemble.answering,
        "share_usable": ensemble.share_usable,
        "needs_training": ensemble.needs_training,
        "settings": ensemble.design.chosen,
        "base": ensemble.about["base"],
    }
    if json:
        say_json({**about, "shards": shards, "deletions": list(ensemble.deletions)})
        return
    say(
        f"{ensemble.design.method}: {len(ensemble.rows)} rows, {deleted} deleted; {ensemble.share_usable:.0%} of all "
        f"stages answer" + ("; it needs training" if ensemble.needs_training else "")
    )
    say_table(
        ["shard", "rows by slice", "orders alive", "answers from slices"],
        [
            [
                one["shard"],
                " ".join(map(str, one["rows"])),
                f"{sum(1 for n in one['alive'] if n)} of {len(one['alive'])}",
                " ".join(map(str, one["served"])) or "none",
            ]
            for one in shards
        ],
    )


def _remarks(done: Any) -> list[str]:
    found = []
    if done.already:
        found.append(f"{len(done.already)} of the rows were deleted before")
    if done.rows_lost:
        found.append(f"{done.rows_lost} other rows of the slices that were hit are no longer answered from")
    if done.twins:
        found.append(f"rows that say the same as a deleted one stay: {', '.join(done.twins[:5])}")
    return found


def _opened(base: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """The backbone, and what reads rows of its kind."""
    from ..pictures import read_pictures
    from ..rows import Source, read_rows
    from ..subjects.opening import open_subject

    subject = open_subject(base, device=device, dtype=dtype)
    read = read_pictures if subject.modality == "image" else read_rows
    return subject, lambda source: read(Source(**source), "rows")


def _given(
    ensemble: Ensemble, base: str | None, data: str | None, device: str | None, dtype: str | None
) -> tuple[Any, Any]:
    """Backbone and rows, where the ensemble says or where the user says."""
    subject, read = _opened(base or ensemble.about["data"]["base"], device, dtype)
    return subject, read({**ensemble.about["data"]["rows"], **({"path": data} if data else {})})


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path


def _located(source: dict[str, Any]) -> dict[str, Any]:
    return {**source, "path": _absolute(source["path"])}
