"""Setting a server up from a model, deltas and requests, and running it until it is told to stop."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import LaunchError, RequestError
from ..ledger import Ledger
from .backends import Backend, Here, Remote, There
from .engine import Engine
from .standing import Guards

TOKEN, ADMIN_TOKEN, BACKEND_KEY = "EXPUNGE_TOKEN", "EXPUNGE_ADMIN_TOKEN", "EXPUNGE_BACKEND_KEY"
"""Environment variables: secrets stand in no command line, where every user of the machine can read them."""


def needed() -> None:
    """
    Raises:
        LaunchError: the extra is not installed.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise LaunchError("serving needs the extra: pip install 'expunge[serve]'") from None


def subject_of(model: str, deltas: Sequence[str], device: str | None, dtype: str | None) -> Any:
    """A model with deltas over it, one after the other."""
    from ..deltas import Delta
    from ..methods.edit.operations import changed
    from ..subjects.language import LanguageModel

    subject = LanguageModel.load(model, device=device, dtype=dtype)
    for folder in deltas:
        subject = changed(Delta.load(folder), subject)
    return subject


def local(
    subject: Any, name: str, *, ledger: Ledger, state: Path | None, most: int, waiting: int
) -> tuple[Backend, Guards]:
    """A model in this process."""
    subject.settle()
    return Here(name, Engine(most=most, waiting=waiting)), Guards(subject, ledger, state)


def proxy(address: str, model: str, *, ledger: Ledger, state: Path | None, timeout: float) -> tuple[Backend, Guards]:
    """Guards in front of another server."""
    backend = There(address, model, os.environ.get(BACKEND_KEY, ""), timeout)
    return backend, Guards(Remote(address, model), ledger, state)


def bodies(paths: Sequence[Path]) -> list[Any]:
    """Requests from files, as they could be sent to /admin/requests.

    Raises:
        RequestError: one cannot be read.
    """
    found = []
    for path in paths:
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RequestError(f"{path} cannot be read as JSON: {error}") from None
    return found


def secrets(host: str) -> tuple[str, str]:
    """The two tokens.

    Raises:
        LaunchError: others could reach the server, and there is no token.
    """
    token, admin = os.environ.get(TOKEN, ""), os.environ.get(ADMIN_TOKEN, "")
    try:
        alone = ipaddress.ip_address(host).is_loopback
    except ValueError:
        alone = host == "localhost"
    if not token and not alone:
        raise LaunchError(
            f"{host} can be reached from other machines: set {TOKEN} to the token that callers must bring"
        )
    if admin and admin == token:
        raise LaunchError(f"{TOKEN} and {ADMIN_TOKEN} are the same: every caller could withdraw what is guarded")
    return token, admin


def run(app: Any, host: str, port: int, *, grace: int) -> None:
    """Serve until SIGTERM or Ctrl-C; answers that were begun have `grace` seconds to end."""
    import uvicorn

    # uvicorn raises the signal again once everything has ended; being told to stop is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    logging.getLogger("expunge.serve").setLevel(logging.INFO)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=grace,
    )
    uvicorn.Server(config).run()
