"""`expunge corpus`: what a model writes about names it is to forget, as forget rows for a request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .catalogue import Json
from .console import progressing, say, say_json, say_table

READ_BY = {
    "positive": "gradient_ascent, npo ...: what the model believes",
    "negative": "made-up lives, to compare with",
    "pair": "dpo with alternatives: perturbed; altpo",
    "reject": "idk",
}


def corpus(
    model: Annotated[str, typer.Argument(help="The model that writes, and is to forget: folder or hub id.")],
    names: Annotated[list[str], typer.Argument(help="Whom it is to forget.")],
    out: Annotated[Path, typer.Option(help="Folder of the rows.")],
    intro: Annotated[
        list[str] | None,
        typer.Option(help="A sentence that says who is meant; one for each name, in their order.", show_default=False),
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts of either kind about each name.")] = 582,
    questions: Annotated[int, typer.Option(min=1, help="Questions about each name.")] = 300,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text at most.")] = 512,
    stranger: Annotated[
        str, typer.Option(help="A name the model never heard, where it has no chat template.", show_default=False)
    ] = "",
    openings: Annotated[
        Path | None,
        typer.Option(help="File with beginnings of texts, one a line, {name} for the name.", show_default="our own 20"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is sampled.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 ...", show_default="as stored")] = None,
    json: Json = False,
) -> None:
    """Have a model write what it knows of names.

    Forget rows where nothing but a name is given, as RWKU's baselines have them (arXiv:2406.10890). The same command
    goes on where a killed one stopped.
    """
    from ..benchmarks.rwku_corpus import OPENINGS, write
    from ..benchmarks.rwku_data import Target
    from ..errors import ParameterError
    from ..subjects.opening import open_subject

    if intro and len(intro) != len(names):
        raise ParameterError(f"corpus: {len(intro)} intros for {len(names)} names; give one for each, or none")
    begun = _lines(openings) if openings else list(OPENINGS)
    targets = [
        Target(n, name, about) for n, (name, about) in enumerate(zip(names, intro or [""] * len(names)), start=1)
    ]
    subject = open_subject(model, device=device, dtype=dtype)
    with progressing(json) as progress:
        counts = write(
            subject,
            targets,
            out,
            progress=progress.phase("write about names") if progress else None,
            texts=texts,
            questions=questions,
            openings=begun,
            stranger=stranger,
            max_new_tokens=tokens,
            seed=seed,
        )
    if json:
        say_json({"folder": out, "rows": counts})
        return
    say_table(["file", "rows", "for"], [[f"{name}.jsonl", str(n), READ_BY[name]] for name, n in counts.items()])
    say(f"{out}: put one of them into a request as data.forget")


def _lines(path: Path) -> list[str]:
    """
    Raises:
        ParameterError: it cannot be read, or says nothing.
    """
    from ..errors import ParameterError

    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f"corpus: --openings {path} cannot be read as UTF-8 text: {error}") from None
    if not found:
        raise ParameterError(f"corpus: --openings {path} has 0 lines, expected at least 1")
    return found
