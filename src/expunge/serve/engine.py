"""Writing for many clients at once: prompts join the batch while others are written, and leave when they are done.

One thread owns the model. Everything else talks to it through `Engine.submit` and the pieces that it hands back.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LOG = logging.getLogger("expunge.serve")
BROKEN = "\ufffd"
BEFORE = 4
"""Tokens of the prompt that the first ones of an answer are decoded behind: some tokenizers drop spaces otherwise."""


@dataclass
class Job:
    """One answer to be written."""

    subject: Any
    """The LanguageModel or guard that answers; it stays the same to the end of the answer."""
    ids: Sequence[int]
    limit: int
    emit: Callable[[str, str], None]
    """Gets every piece of text and, with the last one, why it ended (stop, length, error); called in the engine's
    thread."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    cancelled: bool = False
    """Set by whoever no longer wants the answer."""
    written: list[int] = field(default_factory=list)
    _shown: int = 0
    _read: int = 0
    _generator: torch.Generator | None = None

    def choose(self, logits: Tensor) -> int:
        """The next token of (V,) logits."""
        if self._generator is None:
            self._generator = torch.Generator()
            self._generator.manual_seed(self.seed) if self.seed is not None else self._generator.seed()
        probabilities = (logits.float().cpu() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            probabilities[index[ordered.cumsum(-1) - ordered >= self.top_p]] = 0.0
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def text(self, last: bool = False) -> str:
        """What the tokens since the last call add; nothing while a character is not complete."""
        ids = [*self.ids[-BEFORE:], *self.written]
        first = min(BEFORE, len(self.ids))
        shown, read = self._shown, max(self._read, first)
        before, now = self.subject.tokenizer.batch_decode([ids[shown:read], ids[shown:]], skip_special_tokens=True)
        if (now.endswith(BROKEN) and not last) or len(now) <= len(before):
            return ""
        self._shown, self._read = read, len(ids)
        return str(now[len(before) :])


class Engine:
    """The thread that owns the model."""

    def __init__(self, *, most: int = 64, waiting: int = 256) -> None:
        """
        Args:
            most: answers written at once.
            waiting: answers that may wait for their turn.
        """
        self.most = most
        self.waiting: queue.Queue[Job] = queue.Queue(waiting)
        self.running = 0
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._groups: list[tuple[Any, Tensor, list[Job]]] = []
        self._awake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="expunge-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> bool:
        """Whether there was room for it."""
        if self._closing:
            return False
        try:
            self.waiting.put_nowait(job)
        except queue.Full:
            return False
        self._awake.set()
        return True

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run something that uses the model between two steps, in the engine's thread."""
        found: Future[Any] = Future()
        self._calls.put((function, found))
        self._awake.set()
        return found

    def close(self, timeout: float = 30.0) -> None:
        """Write what was begun to its end, then stop."""
        self._closing = True
        self._awake.set()
        self._thread.join(timeout)

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            while not self._calls.empty():
                function, found = self._calls.get()
                try:
                    found.set_result(function())
                except BaseException as error:
                    found.set_exception(error)
            self._admit()
            if not self._groups:
                if self._closing and self.waiting.empty():
                    return
                self._awake.wait()
                self._awake.clear()
                continue
            self._groups = [left for group in self._groups if (left := self._guarded_step(*group)) is not None]
            self.running = sum(len(jobs) for _, _, jobs in self._groups)

    def _admit(self) -> None:
        """Read the prompts of jobs that wait, those of one subject together."""
        room = self.most - sum(len(jobs) for _, _, jobs in self._groups)
        new: dict[int, list[Job]] = {}
        while room > 0:
            try:
                job = self.waiting.get_nowait()
            except queue.Empty:
                break
            if not job.cancelled:
                # Models whose keys and values cannot be cut read prompts of one length together only.
                new.setdefault(id(job.subject), []).append(job)
                room -= 1
        for jobs in new.values():
            for several in self._readable(jobs):
                self._begin(several)
        self.running = sum(len(jobs) for _, _, jobs in self._groups)

    @staticmethod
    def _readable(jobs: list[Job]) -> list[list[Job]]:
        from ..subjects.contexts import can_cut
        from ..subjects.protocol import innermost

        subject = innermost(jobs[0].subject)
        if can_cut(subject, max(len(job.ids) + job.limit for job in jobs)):
            return [jobs]
        by_length: dict[int, list[Job]] = {}
        for job in jobs:
            by_length.setdefault(len(job.ids), []).append(job)
        return list(by_length.values())

    def _begin(self, jobs: list[Job]) -> None:
        try:
            started = jobs[0].subject.start([job.ids for job in jobs], max(job.limit for job in jobs))
        except Exception as error:
            _fail(jobs, error)
            return
        logits = started.logits
        for i, (other, others, running) in enumerate(self._groups):
            if other.join(started):
                self._groups[i] = (other, torch.cat([others, logits]), [*running, *jobs])
                return
        self._groups.append((started, logits, jobs))

    def _guarded_step(self, started: Any, logits: Tensor, jobs: list[Job]) -> tuple[Any, Tensor, list[Job]] | None:
        try:
            return self._step(started, logits, jobs)
        except Exception as error:  # one group's trouble must not end the others
            _fail(jobs, error)
            return None

    def _step(self, started: Any, logits: Tensor, jobs: list[Job]) -> tuple[Any, Tensor, list[Job]] | None:
        """Write one token of every answer; what is left of the group."""
        best = logits.argmax(-1).tolist()
        tokens = [job.choose(row) if job.temperature > 0 else token for job, row, token in zip(jobs, logits, best)]
        going = []
        for place, (job, token) in enumerate(zip(jobs, tokens)):
            if job.cancelled:
                continue
            if token in job.subject.stop_ids:
                job.emit(job.text(last=True), "stop")
                continue
            job.written.append(token)
            if len(job.written) == job.limit:
                job.emit(job.text(last=True), "length")
                continue
            going.append(place)
            if text := job.text():
                job.emit(text, "")
        if not going:
            return None
        if len(going) < len(jobs):
            started.keep(torch.tensor(going, device=logits.device))
        logits = started.follow(torch.tensor([tokens[place] for place in going], device=logits.device))
        return started, logits, [jobs[place] for place in going]


def _fail(jobs: Sequence[Job], error: Exception) -> None:
    # Without the message: it may hold text that is guarded.
    LOG.error("%d answers ended by %s", len(jobs), type(error).__name__)
    for job in jobs:
        job.emit("", "error")
