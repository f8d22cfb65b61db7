"""`expunge neurons`: what MLP neurons stand for, which of them name a word, and what holding one does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .catalogue import Json
from .console import progressing, remark, say, say_json, say_table

if TYPE_CHECKING:
    from ..subjects.neuron_map import Neuron, NeuronMap

app = typer.Typer()
Count = Annotated[int, typer.Option(min=1, help="Neurons that are listed.")]
Layers = Annotated[
    str, typer.Option(help="Only these layers, e.g. 0-3,7; all by default.", show_default=False, metavar="LAYERS")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda ...; the best there is by default.", show_default=False)]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 ...; the stored one by default.", show_default=False)
]
Every = Annotated[
    bool, typer.Option("--all-tokens", help="Also list neurons whose first token is no text (special, a fragment).")
]


@app.callback()
def group() -> None:
    """Which tokens MLP neurons stand for.

    Find those that name a word, look at a map, hold one and see what changes.
    """


@app.command()
def find(
    model: Annotated[
        str, typer.Argument(help="Model folder or hub id; of a folder nothing but MLPs and head is read.")
    ],
    words: Annotated[
        list[str] | None, typer.Argument(help="Words whose neurons are listed.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the map; the same command goes on where one was killed.")] = Path(
        "neurons"
    ),
    matrix: Annotated[str, typer.Option(help="up, gate (rows that read) or down (value vectors).")] = "up",
    k: Annotated[int, typer.Option(min=1, help="Tokens kept of every neuron.")] = 10,
    sign: Annotated[str, typer.Option(help="+ highest scores, - lowest, both: whichever stands out further.")] = "+",
    norm: Annotated[
        str, typer.Option(help="Gain that rows are multiplied by: none, final (norm), input (norm before the MLP).")
    ] = "none",
    probabilities: Annotated[bool, typer.Option(help="Also keep each neuron's log sum exp over all tokens.")] = False,
    layers: Layers = "",
    count: Count = 20,
    page: Annotated[int, typer.Option(min=0, help="Neurons on the page, the strongest ones; 0 writes none.")] = 20_000,
    all_tokens: Every = False,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Read every neuron as tokens through the LM head; list the strongest, or those that name the words.

    Writes the map and neurons.html, a page to search in.
    """
    from ..subjects.checkpoint import opened
    from ..subjects.neuron_map import Settings, build

    settings = Settings(
        _one_of("--matrix", matrix, ("up", "gate", "down")),
        k,
        _one_of("--sign", sign, ("+", "-", "both")),
        _one_of("--norm", norm, ("none", "final", "input")),
        probabilities,
    )
    chosen = _layers(layers)
    subject, holding = opened(model, device=device, dtype=dtype)
    with progressing(json) as progress:
        tell = progress.phase("layers") if progress else None
        made = build(subject, out, settings, layers=chosen, holding=holding, progress=tell)
    if page:
        from ..report.neurons import write

        write(made, out, page)
    _list(made, words or [], count, chosen, all_tokens, json)
    if page and not json:
        say(f"page: {out / 'neurons.html'}")


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="MAP", help="Folder of a map (`expunge neurons find`).")],
    what: Annotated[
        list[str] | None, typer.Argument(help="Words, or neurons such as 20:10513.", show_default=False)
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Map of a changed model: how many neurons keep their tokens.", show_default=False),
    ] = None,
    layers: Layers = "",
    count: Count = 20,
    all_tokens: Every = False,
    json: Json = False,
) -> None:
    """Look things up in a map: words, neurons, or, without any, the strongest; no model is needed."""
    from ..subjects.neuron_map import load, overlap

    made = load(folder)
    if not made.complete:
        remark(f"{folder} is not complete; the same `expunge neurons find` goes on")
    if against is None:
        _list(made, what or [], count, _layers(layers), all_tokens, json)
        return
    found = overlap(made, load(against))
    if json:
        say_json({"first": found.first, "jaccard": found.jaccard, "layers": found.layers})
        return
    say_table(
        ["layer", "same first token", f"same of {made.settings.k} (Jaccard)"],
        [
            *([str(n), f"{same:.1%}", f"{shared:.3f}"] for n, (same, shared) in found.layers.items()),
            ["all", f"{found.first:.1%}", f"{found.jaccard:.3f}"],
        ],
    )


@app.command()
def clamp(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    neuron: Annotated[str, typer.Argument(help="Layer and neuron, e.g. 20:10513; in an expert 20:3:10513.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text after which the token is read; may be repeated.", show_default=False)
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Rows whose prompts are read too (jsonl, csv ...).", show_default=False)
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="The token; by default the one that the neuron names.", show_default=False)
    ] = None,
    at: Annotated[
        list[float] | None,
        typer.Option(
            help="Value the neuron is held at; may be repeated. By default -8, -4, 0, 4, 8 deviations.",
            show_default=False,
        ),
    ] = None,
    matrix: Annotated[str, typer.Option(help="up or gate: whose output is held.")] = "up",
    new: Annotated[int, typer.Option(min=0, help="Tokens written after the first prompt.")] = 12,
    seed: Annotated[int, typer.Option(help="Draws the random neuron it is compared with.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Hold a neuron at a value and see what that does to its token, beside a random neuron of the layer.

    The guard of the same name does it in every answer: expunge run REQUEST --method clamp.
    """
    from ..errors import ParameterError
    from ..rows import Source, read_rows
    from ..subjects.clamping import sweep
    from ..subjects.language import LanguageModel
    from ..subjects.value_vectors import Address

    kind = _one_of("--matrix", matrix, ("up", "gate"))
    subject = LanguageModel.load(model, device=device, dtype=dtype)
    prompts = list(prompt or [])
    if rows is not None:
        prompts += [subject.prompt_text(row) for row in read_rows(Source(str(rows)), "rows") if row.prompt]
    if not prompts:
        raise ParameterError("there is nothing to read the token after; give --prompt TEXT, or --rows FILE")
    with progressing(json) as progress:
        found = sweep(
            subject,
            Address.parse(neuron),
            prompts,
            token=token,
            values=at,
            kind=kind,
            new=new,
            seed=seed,
            progress=progress.phase("values") if progress else None,
        )
    if json:
        say_json(found)
        return
    say(f"neuron {found['neuron']} of {subject.name}, token {found['token']!r}, {len(prompts)} prompts")
    say(f"it gives {found['mean']:.3g} by itself, deviation {found['deviation']:.3g}; p(token) {found['before']:.3g}")
    say_table(
        ["held at", "change of log p", "p(token)", "goes on with"],
        [
            [f"{e['value']:.4g}", f"{e['gain']:+.3f}", f"{e['probability']:.3g}", repr(e["text"])]
            for e in found["effects"]
        ],
    )
    say(f"random neuron {found['random']['neuron']}, the better of its values: {found['random']['gain']:+.3f}")
    say(f"as it is: {found['text']!r}")


def _one_of(option: str, value: str, known: tuple[str, ...]) -> Any:
    from ..errors import ParameterError, suggest

    if value not in known:
        raise ParameterError(f"{option} is {value!r}. {suggest(value, known)}")
    return value


def _layers(text: str) -> list[int] | None:
    """Raises ParameterError: it is no list of layers."""
    from ..errors import ParameterError

    found: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ParameterError(f"--layers {text!r} is no list of layers; expected e.g. 0-3,7")
        found |= set(range(int(first), int(last or first) + 1))
    return sorted(found) or None


def _list(made: NeuronMap, what: list[str], count: int, layers: list[int] | None, all_tokens: bool, json: bool) -> None:
    from ..subjects.value_vectors import Address

    lists: list[tuple[str, list[tuple[int | None, Neuron]]]] = []
    for text in what:
        if ":" in text and all(part.isdecimal() for part in text.split(":")):
            lists.append((text, [(None, made.neuron(Address.parse(text)))]))
        else:
            hits = [hit for hit in made.naming(text) if layers is None or hit[1].address.layer in layers]
            lists.append((text, [(rank, neuron) for rank, neuron in hits[:count]]))
    if not what:
        best = made.strongest(count, layers=layers, printable=not all_tokens)
        lists.append(("", [(None, neuron) for neuron in best]))
    if json:
        say_json(
            [
                {
                    "asked": text or None,
                    "neurons": [
                        {
                            "neuron": str(n.address),
                            "rank": None if rank is None else rank + 1,
                            "z": n.z,
                            "cosine": n.cosine,
                            "tokens": [made.words[token] for token in n.tokens],
                            "scores": n.scores,
                            "lse": n.lse,
                        }
                        for rank, n in hits
                    ],
                }
                for text, hits in lists
            ]
        )
        return
    for number, (text, listed) in enumerate(lists):
        if number:
            say()
        if not listed:
            say(f"{text!r}: no neuron has it among its {made.settings.k} tokens{_unknown(made, text)}")
            continue
        if text:
            say(f"{text}:")
        say_table(
            ["neuron", "rank", "z", "cosine", "tokens"],
            [
                [
                    str(n.address),
                    "" if rank is None else str(rank + 1),
                    f"{n.z:.2f}",
                    f"{n.cosine:.3f}",
                    " ".join(repr(made.words[token]) for token in n.tokens),
                ]
                for rank, n in listed
            ],
        )


def _unknown(made: NeuronMap, text: str) -> str:
    return "" if made.tokens_of(text) else "; it is no single token of this model"
