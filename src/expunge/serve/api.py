"""What clients may send, and the shapes of what they get: OpenAI's chat completions and completions."""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "store": (False,),
}
"""Fields that are not carried out, with the values that ask for nothing; null does too."""
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer."""


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers: dict[str, str] = {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": None}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Part(_Strict):
    type: Literal["text"]
    text: str


class Turn(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    include_usage: bool = False


class Asked(_Strict):
    """What both endpoints take."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in found if text]


class Chat(Asked):
    """A body of /v1/chat/completions."""

    kind: Literal["chat.completion"] = Field("chat.completion", exclude=True, init=False)
    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def question(self) -> str:
        # Every turn: a conversation may be steered towards the answer over several of them.
        return "\n".join(turn.text for turn in self.messages)


class Completion(Asked):
    """A body of /v1/completions."""

    kind: Literal["text_completion"] = Field("text_completion", exclude=True, init=False)
    prompt: Annotated[str, Field(min_length=1)]

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def question(self) -> str:
        return self.prompt


def parsed(text: bytes, form: type[Chat] | type[Completion]) -> Chat | Completion:
    """
    Raises:
        ApiError: 400, with the field that is wrong.
    """
    body = json_object(text)
    for name in [name for name in body if name not in form.model_fields or name == "kind"]:
        value = body.pop(name)
        if (
            name in IGNORED
            or value is None
            or any(value == fine and value is not True for fine in NEUTRAL.get(name, ()))
        ):
            continue
        raise ApiError(400, f"{name} = {json.dumps(value)[:80]} is not supported here; leave it out", param=name)
    try:
        return form.model_validate(body)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{field}: {first['msg']}", param=field) from None


def json_object(text: bytes) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    return body


class Reply:
    """The shapes of one answer."""

    def __init__(self, asked: Chat | Completion) -> None:
        self.chat = isinstance(asked, Chat)
        self.head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex,
            "object": asked.kind,
            "created": int(time.time()),
            "model": asked.model,
        }

    def whole(self, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self.head, "choices": [choice], "usage": usage}

    def first(self) -> dict[str, Any] | None:
        """What a stream begins with."""
        return self._chunk({"role": "assistant", "content": ""}, "", None) if self.chat else None

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text}, text, None)

    def last(self, reason: str) -> dict[str, Any]:
        return self._chunk({}, "", reason)

    def used(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage}

    @property
    def _head(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion"}

    def _chunk(self, delta: dict[str, str], text: str, reason: str | None) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": text}
        return {**self._head, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}
