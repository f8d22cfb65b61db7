"""Passes side by side: on a CPU every thread takes groups of rows of its own.

Threads that share out one operator after another wait for each other, busily, at the end of each, the longer the more
else the machine has to do. A thread that runs whole passes waits for nobody. Each has modules of its own around the
same tensors, so that hooks, configurations and what modules remember of a pass stay apart. A model with somebody's
hooks in it, which may remember something too, runs one pass after another.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .. import processes
from .fused import touched

if TYPE_CHECKING:
    from .language import LanguageModel
    from .protocol import Progress

R = TypeVar("R")
T = TypeVar("T")
Group = Sequence[int]

MOST = 4
"""Passes at once, as each holds its activations; where there are more threads, several work on each."""


def side_by_side(
    subject: LanguageModel,
    groups: Sequence[Group],
    do: Callable[[LanguageModel, Group], R],
    *,
    of: Any,
    fewest: int = 2,
    progress: Progress | None = None,
) -> list[R]:
    """What `do` gives for the subject and each group of rows, in their order: as `subject.share`, which shares groups
    out over processes.

    Args:
        do: uses no model but the one it gets, and changes nothing that two passes have in common.
        of: the rows, for processes to compare.
        fewest: groups that are worth a thread.
    """
    mine = len(groups) // processes.count()
    many = min(at_once(subject), mine // fewest)
    if many < 2:
        return subject.share(groups, lambda group: do(subject, group), of=of, progress=progress)
    with Twins(subject, many) as twins:
        run = twins.each(do)
        return processes.shared(groups, run, of=of, device=subject.device, progress=progress, through=twins.pool.map)


class Twins:
    """Subjects with modules of their own around one subject's tensors, and a thread for each."""

    def __init__(self, subject: LanguageModel, count: int) -> None:
        threads, all_there = torch.get_num_threads(), threading.Barrier(count)
        _ = subject.mode, subject.plain  # tried once, and not by each of them
        self._free: SimpleQueue[LanguageModel] = SimpleQueue()
        for _ in range(count):
            self._free.put(_twin(subject))

        def begin() -> None:
            torch.set_num_threads(threads // count)
            torch.get_num_threads()  # a thread's first look takes over what was set last, by whomever
            torch.set_flush_denormal(True)
            all_there.wait()

        self.pool = ThreadPoolExecutor(count, initializer=begin)
        list(self.pool.map(lambda _: None, range(count)))
        torch.set_num_threads(threads)  # what threads to come begin with

    def each(self, do: Callable[[LanguageModel, T], R]) -> Callable[[T], R]:
        """`do` with a subject of its own, to be called by threads of the pool; gradients flow if they do here."""
        gradients = torch.is_grad_enabled()

        def run(group: T) -> R:
            twin = self._free.get()
            try:
                with torch.set_grad_enabled(gradients):
                    return do(twin, group)
            finally:
                self._free.put(twin)

        return run

    def __enter__(self) -> Twins:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()


@contextmanager
def alone() -> Iterator[None]:
    """Within the block operators run on one thread: a few tokens, of a trial, keep others busy with waiting only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def at_once(subject: LanguageModel) -> int:
    """How many passes can run at once."""
    return min(torch.get_num_threads(), MOST) if _can_part(subject) else 1


def _can_part(subject: LanguageModel) -> bool:
    from .language import LanguageModel

    if type(subject) is not LanguageModel or subject.sharded or subject.device.type != "cpu":
        return False
    return not touched(subject.model)


def _twin(subject: LanguageModel) -> LanguageModel:
    """The subject with modules of its own around the same tensors."""
    tensors: dict[int, Any] = {id(t): t for t in (*subject.model.parameters(), *subject.model.buffers())}
    return subject.with_model(copy.deepcopy(subject.model, tensors))
