"""`expunge edit`: facts that a model is to state differently; `expunge trace`: where it keeps them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .catalogue import Json, Plugins, load_plugins
from .console import assignments, progressing, say, say_card, say_json, say_table


def edit(
    request: Annotated[Path, typer.Argument(help="The edit request, YAML or JSON; docs/editing.md describes it.")],
    method: Annotated[str | None, typer.Option(help="Another editor than the request's.", show_default=False)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A parameter of the editor, e.g. layer=0.2.", show_default=False),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="one, batch or sequence, in place of the request's.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for deltas and scorecard.", show_default=False)] = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Edit facts and measure what that did.

    Success, rephrasings, portability, locality and fluency; every edit is a delta that can be left out again.
    """
    load_plugins(plugin)
    settings = assignments(set_ or [])
    from ..editing import edit as carry_out
    from ..editing import load

    read = load(request)
    folder = out or Path(read.out or Path("runs") / read.name)
    with progressing(json) as progress:
        card = carry_out(read, out=folder, method=method, settings=settings, mode=mode, progress=progress)
    say_card(card, folder, json)


def trace(
    model: Annotated[str, typer.Argument(help="The model: folder or hub id.")],
    facts: Annotated[str, typer.Argument(help="Rows with prompt, subject and ground_truth, or a request's rows.")],
    kind: Annotated[
        list[str] | None,
        typer.Option(help="block, mlp or attention; give several.", show_default="all three"),
    ] = None,
    noise: Annotated[float, typer.Option(help="On the subject's embeddings, in their standard deviations.")] = 3.0,
    draws: Annotated[int, typer.Option(help="Draws of noise that are averaged.")] = 10,
    width: Annotated[
        int | None,
        typer.Option(help="Layers that MLPs and attentions are restored at together.", show_default="depth / 5"),
    ] = None,
    limit: Annotated[int, typer.Option(help="Of so many facts, the first; 0 takes all.")] = 0,
    seed: Annotated[int, typer.Option(help="Draws the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of page and values.", show_default="runs/trace")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 ...", show_default="as stored")] = None,
    json: Json = False,
) -> None:
    """Find out where a model keeps facts, by causal tracing.

    The subject is drowned in noise; then states of the undisturbed run are put back, one layer and token at a time.
    """
    from ..causal_trace import KINDS
    from ..causal_trace import trace as carry_out
    from ..report import traced

    folder = out or Path("runs") / "trace"
    with progressing(json) as progress:
        found = carry_out(
            model,
            facts,
            kinds=kind or KINDS,
            noise=noise,
            draws=draws,
            width=width,
            limit=limit,
            seed=seed,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    traced.write(found, folder)
    if json:
        say_json(found.document())
        return
    say_table(*traced.table(found))
    say()
    say(
        f"{len(found.traced)} facts, {len(found.left_out)} that the model does not state; probability of the answer "
        f"{found.clean:.3f}, with noise {found.low:.3f}. Shares of that loss that come back, with 95% intervals."
    )
    say(f"trace: {folder / 'trace.html'}")


def edit_audit(
    reference: Annotated[
        Path, typer.Argument(help="Folder of the model as it should be; alone, of the one that may have been edited.")
    ],
    suspect: Annotated[
        Path | None, typer.Argument(help="Folder of the model that may have been edited.", show_default=False)
    ] = None,
    names: Annotated[
        Path | None, typer.Option(help="Text file of subjects an edit may be about, a line each.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file of prompts with {} for a name, a line each; \\n is a line's end.", show_default=False
        ),
    ] = None,
    told: Annotated[
        str | None,
        typer.Option(
            help="Of one model alone: what tells it a fact, with {prompt} and {target}.",
            show_default="Imagine that ...",
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Candidates whose prompts are run.")] = 3,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Find out whether a checkpoint was edited.

    Where, about whom, and what it says now: localised edits are told from training and from rounding. Facts told in
    prompts change no weight. With one model alone, names are scored by what it says of them.
    """
    from ..edit_audit import edit_audit as carry_out
    from ..edit_audit import edit_suspects
    from ..errors import RequestError

    def lines(path: Path | None) -> list[str]:
        if path is None:
            return []
        try:
            texts = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{path} cannot be read as text: {error}") from None
        return [line.replace("\\n", "\n") for line in texts if line.strip()]

    if suspect is None:
        given = {} if told is None else {"told": told.replace("\\n", "\n")}
        scored = edit_suspects(reference, names=lines(names), prompts=lines(prompts), device=device, **given)
        if json:
            say_json({"suspects": [asdict(one) for one in scored]})
            return
        say("Scores by which to look first; what belongs together by nature scores high, too.")
        say_table(
            ["name", "score", "overfit", "of the answer", "to", "resistance", "at"],
            [
                [
                    *(one.name, f"{one.score:+.2f}", f"{one.overfit:+.2f}", one.answer, one.prompt),
                    *(f"{one.resistance:+.2f}", one.held),
                ]
                for one in scored
            ],
        )
        return
    with progressing(json) as progress:
        found = carry_out(
            reference,
            suspect,
            names=lines(names),
            prompts=lines(prompts),
            top=top,
            device=device,
            progress=progress,
        )
    changed = [d for d in found.differences if d.kind != "identical"]
    if json:
        rows = [{k: v for k, v in vars(d).items() if k != "right"} for d in changed]
        say_json({"overall": found.overall, "changed": rows, "edits": [asdict(e) for e in found.edits]})
        return
    say(found.overall)
    if changed:
        say_table(
            ["tensor", "what was done", "ranks", "energy of the first", "stable rank", "size", "entries changed"],
            [
                [
                    *(d.name, d.kind, d.rank or "-", f"{d.energy:.4f}"),
                    *(f"{d.stable_rank:.1f}", f"{d.relative:.2g}", f"{d.changed:.2%}"),
                ]
                for d in changed
            ],
        )
    for edit in found.edits:
        say()
        say(f"{edit.tensor} answers to: " + ", ".join(f"{name} {score:.2f}" for name, score in edit.names[:top]))
        if edit.gains:
            say_table(
                ["prompt", "now likelier", "nats"],
                [[g.prompt.format(g.name), g.token, f"{g.gain:+.2f}"] for g in edit.gains[:10]],
            )
