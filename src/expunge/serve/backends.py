"""Who writes the answers: the model in this process, or another server."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import AgentError, RowError
from ..rows import Row
from .api import ApiError, Chat, Completion
from .engine import Engine, Job

DEFAULT_TOKENS = 256
"""Length of an answer where the client names none and the context has room."""


@dataclass
class Answer:
    """One answer as it is written."""

    pieces: AsyncGenerator[str, None]
    """Closing it ends the writing."""
    reason: str = "stop"
    """Why it ended, once it has."""
    usage: dict[str, int] = field(default_factory=lambda: {"prompt_tokens": 0, "completion_tokens": 0})


class Backend(Protocol):
    name: str
    """Of the model, as clients name it."""

    async def answer(self, asked: Chat | Completion, subject: Any) -> Answer:
        """
        Args:
            subject: the guarded subject of this answer.

        Raises:
            ApiError: the prompt does not fit, there is no room, or the other server refuses.
        """
        ...

    async def change(self, function: Any) -> Any:
        """Carry out a change of the guards where it disturbs no answer."""
        ...

    async def close(self) -> None: ...


class Here:
    """The model in this process."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self.engine = engine

    async def answer(self, asked: Chat | Completion, subject: Any) -> Answer:
        prompt = self._prompt(asked, subject)
        try:
            ids = subject.prompt_ids(prompt, ("request", "prompt"))
        except RowError:
            raise ApiError(400, "the prompt is empty, there is nothing to continue") from None
        room = subject.context_length - len(ids)
        limit = asked.limit or min(DEFAULT_TOKENS, max(room, 1))
        if limit > room:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens and {limit} more were asked for; the context holds "
                f"{subject.context_length}",
                param="max_tokens" if asked.limit else "messages" if isinstance(asked, Chat) else "prompt",
            )
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

        def emit(text: str, reason: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, (text, reason))

        temperature = 1.0 if asked.temperature is None else asked.temperature
        job = Job(subject, ids, limit, emit, temperature, asked.top_p or 1.0, asked.seed)
        if not self.engine.submit(job):
            error = ApiError(503, "too many answers wait for their turn; try again", "server_error")
            error.headers["retry-after"] = "1"
            raise error

        async def written() -> AsyncGenerator[str, None]:
            first = True
            try:
                while True:
                    text, reason = await pieces.get()
                    if reason == "error":
                        raise ApiError(500, "the answer could not be written", "server_error")
                    text = text.lstrip() if first else text
                    first = first and not text
                    answer.usage["completion_tokens"] = len(job.written)
                    if text:
                        yield text
                    if reason:
                        answer.reason = reason
                        return
            finally:
                job.cancelled = True

        answer = Answer(written(), usage={"prompt_tokens": len(ids), "completion_tokens": 0})
        return answer

    @staticmethod
    def _prompt(asked: Chat | Completion, subject: Any) -> str:
        if isinstance(asked, Completion):
            return str(subject.prompt_text(Row("request", "-", asked.prompt, kind="completion")))
        turns = tuple((turn.role, turn.text) for turn in asked.messages)
        row = Row("request", "-", turns[-1][1], turns, "chat")
        if turns[-1][0] != "user":
            raise ApiError(400, f"the last message is the {turns[-1][0]}'s, expected the user's", param="messages")
        if not subject.chats(row):
            if len(turns) > 1:
                raise ApiError(
                    400,
                    "this model has no chat template: send one message, or a prompt to /v1/completions",
                    param="messages",
                )
            row = Row("request", "-", turns[-1][1])
        try:
            return str(subject.prompt_text(row))
        except Exception as error:  # chat templates raise what they like about turns they do not take
            raise ApiError(400, f"the chat template does not take these messages: {error}", param="messages") from None

    async def change(self, function: Any) -> Any:
        # The engine's thread is the only one that may use the model.
        return await asyncio.wrap_future(self.engine.call(function))

    async def close(self) -> None:
        await asyncio.to_thread(self.engine.close)


class Remote:
    """What a guard knows of a model behind another server: its name."""

    def __init__(self, address: str, model: str) -> None:
        self.name = f"{address}#{model}"
        self.fingerprint = hashlib.sha256(self.name.encode()).hexdigest()


class There:
    """Another OpenAI-compatible server. What it sends besides text (tool calls, log-probabilities) is not passed on."""

    def __init__(self, address: str, model: str, key: str, timeout: float) -> None:
        try:
            import httpx2
        except ImportError:
            raise AgentError("a proxy needs the extra: pip install 'expunge[serve]'") from None
        self.name = model
        self.address = address.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._failure: type[Exception] = httpx2.HTTPError
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits)

    async def answer(self, asked: Chat | Completion, subject: Any) -> Answer:
        body = asked.model_dump(exclude_none=True, mode="json")
        body |= {"model": self.name, "stream": True, "stream_options": {"include_usage": True}}
        path = "/chat/completions" if isinstance(asked, Chat) else "/completions"
        request = self._client.build_request("POST", self.address + path, json=body)
        try:
            response = await self._client.send(request, stream=True)
            if response.status_code != 200:
                text = (await response.aread())[:300].decode(errors="replace")
                await response.aclose()
                status = response.status_code if response.status_code in (400, 404, 413, 422, 429) else 502
                raise ApiError(status, f"the server behind answered {response.status_code}: {text}", "upstream_error")
        except self._failure as error:
            raise ApiError(
                502, f"the server behind cannot be reached: {type(error).__name__}", "upstream_error"
            ) from None

        async def written() -> AsyncGenerator[str, None]:
            try:
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if usage := chunk.get("usage"):
                        answer.usage.update({name: int(usage.get(name) or 0) for name in answer.usage})
                    for choice in chunk.get("choices") or []:
                        answer.reason = choice.get("finish_reason") or answer.reason
                        text = (choice.get("delta") or {}).get("content") if "delta" in choice else choice.get("text")
                        if text:
                            yield text
            except (self._failure, ValueError, AttributeError, TypeError):
                raise ApiError(
                    502, "the server behind broke off or sent something unreadable", "upstream_error"
                ) from None
            finally:
                await response.aclose()

        answer = Answer(written())
        return answer

    async def change(self, function: Any) -> Any:
        return await asyncio.to_thread(function)

    async def close(self) -> None:
        await self._client.aclose()
