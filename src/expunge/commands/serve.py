"""`expunge serve`: an OpenAI-compatible endpoint with guards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ParameterError
from .console import remark


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Model folder or hub id; leave it out with --backend.", show_default=False)
    ] = None,
    delta: Annotated[
        list[str] | None, typer.Option("--delta", help="Delta folder to apply, in this order.", show_default=False)
    ] = None,
    request: Annotated[
        list[Path] | None,
        typer.Option("--request", help="JSON file with a request to stand from the start.", show_default=False),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="Stand in front of this OpenAI-compatible address: https://host/v1#model.", show_default=False
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model.", show_default=False)] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    state: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps requests over restarts; they hold forgotten rows.", show_default=False),
    ] = None,
    max_body: Annotated[int, typer.Option(help="Bytes of a body.")] = 1 << 20,
    rate: Annotated[int, typer.Option(help="Requests a minute of one caller; 0 is no limit.")] = 600,
    batch: Annotated[int, typer.Option(help="Answers written at once.")] = 64,
    queue: Annotated[int, typer.Option(help="Answers that may wait for their turn.")] = 256,
    stall: Annotated[float, typer.Option(help="Seconds a client may take nothing.")] = 30.0,
    grace: Annotated[int, typer.Option(help="Seconds that answers have to end in when the server is stopped.")] = 30,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 ...", show_default=False)] = None,
) -> None:
    """Answer OpenAI clients with a model, its deltas and guards.

    Callers bring the token in EXPUNGE_TOKEN; who brings the one in EXPUNGE_ADMIN_TOKEN may add and withdraw requests
    while it runs.
    """
    if (model is None) == (backend is None):
        raise ParameterError("serve: give a model to serve, or --backend to stand in front of")
    from ..serve import run as serving

    serving.needed()
    from ..ledger import Ledger
    from ..serve.app import Limits, Server

    token, admin = serving.secrets(host)
    if backend is not None:
        if delta:
            raise ParameterError("serve: a delta changes weights, and those are behind the other server")
        address, _, behind = backend.partition("#")
        if not behind:
            raise ParameterError(f"serve: {backend!r} names no model; expected ADDRESS#MODEL")
        made, guards = serving.proxy(address, behind, ledger=Ledger(), state=state, timeout=120.0)
    else:
        assert model is not None
        subject = serving.subject_of(model, delta or (), device, dtype)
        named = name or Path(model).name
        made, guards = serving.local(subject, named, ledger=Ledger(), state=state, most=batch, waiting=queue)
    for path, body in zip(request or (), serving.bodies(request or ())):
        guards.add(body, str(path))
    limits = Limits(body=max_body, per_minute=rate, stall_seconds=stall)
    server = Server(made, guards, token=token, admin_token=admin, limits=limits)
    remark(f"{made.name} at http://{host}:{port}/v1, {len(guards.list())} requests stand; Ctrl-C stops")
    serving.run(server.app(), host, port, grace=grace)
