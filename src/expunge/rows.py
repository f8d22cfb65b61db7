"""Rows: what is to be forgotten, kept or asked, read from the files people bring."""

from __future__ import annotations

from dataclasses import dataclass

Message = tuple[str, str]
"""(role, content)"""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing a model can be asked or taught.

    `prompt` is the text before the answer ("" for running text); for chat rows `messages` holds the turns before the
    answer and `prompt` their last user turn.
    """

    id: str
    answer: str
    prompt: str = ""
    messages: tuple[Message, ...] = ()
    kind: str = "qa"
    """qa (question/answer, goes through the template), completion (prompt + answer as they are), chat, text."""
    entity: str = ""
    """Whom or what the row is about: the unit over which the verdict's intervals are drawn."""
    value: str = ""
    """The short string that counts as knowing it ("Tivin"); "" means the whole answer."""
    aliases: tuple[str, ...] = ()
    """Other strings that count as the value."""
    paraphrased_prompts: tuple[str, ...] = ()
    """Held-out wordings of the prompt, never trained on."""
    paraphrased_answer: str = ""
    perturbed_answers: tuple[str, ...] = ()
    """Wrong answers in the form of the right one."""
    relation: str = ""
    task: str = ""
    """qa, cloze, multi_hop, passage ...: the format, for the skill checks."""
    source: str = ""
    """file:row, for error messages."""
