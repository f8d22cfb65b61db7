"""Errors are sentences for users: what was asked, what was found, what to do. docs/errors.md explains every code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class ExpungeError(Exception):
    """A mistake the user can mend. The command line prints it in one line and exits with status 2."""

    code = "E000"

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class RequestError(ExpungeError):
    """The request file is missing, malformed or contradicts itself."""

    code = "E100"


class RowError(ExpungeError):
    """A data file or one of its rows is not what the request says."""

    code = "E110"


class SubjectError(ExpungeError):
    """The model folder cannot be read or the model cannot be used."""

    code = "E200"


class MismatchError(ExpungeError):
    """Two things that must belong together do not: another tokenizer, another base, other rows."""

    code = "E210"


class ScopeError(ExpungeError):
    """The scope is malformed or matches nothing that can move."""

    code = "E300"


class UnknownNameError(ExpungeError):
    """No part (method, attack, metric, benchmark) has this name."""

    code = "E310"


class ParameterError(ExpungeError):
    """A part was given a parameter it does not have, or a value of the wrong kind."""

    code = "E320"


class CardError(ExpungeError):
    """A part describes itself inconsistently."""

    code = "E330"


class AccessError(ExpungeError):
    """An attack needs more access to the model than the subject gives."""

    code = "E340"


class AgentError(ExpungeError):
    """A language model that works for a guard or an attack cannot be reached, or answers something unusable."""

    code = "E350"


class TrainingError(ExpungeError):
    """The optimisation broke: a loss that is not finite, nothing that receives a gradient."""

    code = "E400"


class TableError(ExpungeError):
    """A table of scores or generations lacks what a metric needs."""

    code = "E410"


class DeltaError(ExpungeError):
    """A delta cannot be read, or does not fit the base it is applied to."""

    code = "E420"


class EnsembleError(ExpungeError):
    """A folder is no ensemble of kind `exact`, is damaged, or has nothing left that answers."""

    code = "E430"


class OutputError(ExpungeError):
    """The output folder cannot be written or holds another run."""

    code = "E500"


class LedgerError(ExpungeError):
    """The ledger cannot be read or written, or its chain is broken."""

    code = "E510"


class LaunchError(ExpungeError):
    """The processes of one launch do not fit together, or what they were launched for; a server cannot start."""

    code = "E530"


def nearest(name: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """The valid names that look most like `name`."""
    return difflib.get_close_matches(str(name), list(names), n=limit, cutoff=0.45)


def suggest(name: str, names: Iterable[str]) -> str:
    """A sentence that helps with a wrong name: the nearest valid ones, or all of them where none is near."""
    names = sorted(names)
    near = nearest(name, names)
    return f"Did you mean {' or '.join(near)}?" if near else f"Valid: {', '.join(names) or 'none'}."


def no_model(name: str, error: Exception) -> str:
    """A sentence on a model that is no folder, or a folder that cannot be read, with what the library said of it."""
    said = (str(error).splitlines() or [type(error).__name__])[0]
    path = Path(name)
    if path.exists():
        return f"model {name} cannot be loaded: {said}"
    beside = [str(other) for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    near = f" Did you mean {' or '.join(found)}?" if (found := nearest(name, beside)) else ""
    return f"model {name} is no folder here.{near} As a hub id it cannot be loaded either: {said}"
