"""The words and figures of a report, as a reader who is not a researcher needs them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from ..evidence import Interval

NOT_MEASURED = "not measured"


class VerdictWords(NamedTuple):
    title: str
    meaning: str
    action: str
    tone: str
    """good, fair, bad or open: the colour; the title says the same, so that colour is never needed."""
    sign: str


VERDICTS = {
    "not_forgotten": VerdictWords(
        "Not forgotten",
        "Asked plainly, the model still gives answers that it was meant to forget.",
        "Do not hand this model over as one that has forgotten. Train longer, choose a stronger method or let more "
        "of the model move, then run again.",
        "bad",
        "✕",
    ),
    "suppressed": VerdictWords(
        "Suppressed, not removed",
        "Asked plainly, the model behaves as if it had never seen the data, but the knowledge can still be got out "
        "of it.",
        "Treat the knowledge as present for anyone who can do what is listed beside this. Choose a method that "
        "removes, or retrain without the rows, and run again.",
        "bad",
        "◐",
    ),
    "removed_under_tested_attacks": VerdictWords(
        "Removed under the attacks tested",
        "No attack tried here got more out of this model than out of models that never saw the data.",
        "The model can replace the original for this request. Keep this report and evidence.json with it, and audit "
        "again after any further training.",
        "good",
        "✓",
    ),
    "no_recovery_found": VerdictWords(
        "No recovery found",
        "No attack tried here brought the knowledge back. There is no retrained model to compare with, so this report "
        "cannot say that it is gone.",
        "To learn whether it is gone, audit again with a gold model: one trained without the forget rows, or a "
        "surrogate for it.",
        "fair",
        "○",
    ),
    "inconclusive": VerdictWords(
        "Inconclusive",
        "The measurements do not allow a judgement either way.",
        "Give the audit what it lacks, named above, and run it again. Until then, treat the knowledge as present.",
        "open",
        "?",
    ),
}

FLAGS = {
    "damaged": (
        "damaged",
        "The model lost knowledge that it was meant to keep.",
        "Lower the learning rate or the number of steps, or give the retained rows more weight.",
    ),
    "neighbour_damage": (
        "neighbours damaged",
        "People or things close to the forgotten ones were hurt as well.",
        "Add neighbouring rows to the retained data and run again.",
    ),
    "over_forgotten": (
        "over-forgotten",
        "The model does worse on the forgotten rows than one that never saw them; that itself shows what was erased.",
        "Stop earlier, or choose a method with a floor.",
    ),
    "unfair_suppression": (
        "unfair suppression",
        "Questions that only resemble the forgotten ones are refused as well.",
        "Narrow the target or add look-alike rows to the retained data.",
    ),
    "over_refusal": (
        "over-refusal",
        "The model refuses questions that it should answer.",
        "Mix ordinary answers into the retained data.",
    ),
    "safety_feature_lost": (
        "safety behaviour lost",
        "A protective behaviour of the original, such as a refusal, no longer works.",
        "Do not deploy before the safety behaviour is trained back and checked.",
    ),
    "needs_filter": (
        "needs a filter",
        "Given the forgotten text in a prompt, the model uses it.",
        "If users may not see this content at all, put an output filter in front of the model.",
    ),
    "keeps_forget_data": (
        "keeps forget data",
        "The method stores the data it was asked to forget.",
        "Check whether that is allowed for this request, and protect what is kept.",
    ),
    "earlier_back": (
        "earlier request undone",
        "Something that an earlier request removed is answered again.",
        "Do not deploy: run the earlier requests again together with this one.",
    ),
    "composition_leak": (
        "can be inferred",
        "Some forgotten facts follow from facts that were kept.",
        "Extend the request with the facts listed under the limits.",
    ),
    "utility_unknown": (
        "utility unknown",
        "Without retained rows nobody measured what the model lost.",
        "Add retained rows to the request.",
    ),
}

GROUPS = {
    "direct": "Asked directly",
    "black_box": "Asked cleverly (text access only)",
    "latent": "Read from inside the model",
    "tamper": "After tampering with a copy",
    "reintroduce": "Told again in the prompt (not part of the verdict)",
}

DIRECTIONS = {"lower": "lower", "higher": "higher", "closest_to_gold": "like gold"}
ACRONYMS = {
    word.lower(): word
    for word in ("AUC", "FLOP", "FLOPs", "KL", "KS", "LoRA", "MIA", "MLP", "NLL", "QA", "ROUGE", "TV")
}
ROLES = ("before", "after", "gold")
MANY = 48
"""More figures than this at once are counted, not shown."""


def verdict_words(verdict: str) -> VerdictWords:
    """The words of a verdict; one that this version does not know is shown by its name, as an open one."""
    return VERDICTS.get(verdict) or VerdictWords(label(verdict), "", "", "open", "?")


def flag_words(flag: str) -> tuple[str, str, str]:
    """(label, what it means, what to do)"""
    return FLAGS.get(flag, (in_sentence(flag), "", ""))


def label(name: str) -> str:
    """`quantisation_8bit` -> `Quantisation 8-bit`, `mia_zlib` -> `MIA zlib`."""
    words = [
        ACRONYMS.get(word.lower(), re.sub(r"^(\d+)bit$", r"\1-bit", word)) for word in name.replace("_", " ").split()
    ]
    text = " ".join(words).replace(" plus plus", "++")
    return text[:1].upper() + text[1:]


def in_sentence(name: str) -> str:
    """`label` for the middle of a sentence: acronyms stay as they are."""
    text = label(name)
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def measured(value: Any) -> TypeGuard[float]:
    """Whether `value` is a figure: not None, not NaN, not infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: float | None) -> str:
    """A figure with as many digits as mean something."""
    if not measured(value):
        return NOT_MEASURED
    size = abs(value)
    if size == 0 or (float(value).is_integer() and size < 1e6):
        return f"{int(value):,}".replace(",", "\u202f").replace("-", "−")
    if size < 1e-3 or size >= 1e6:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits}×10{str(int(power)).translate(_SUPERSCRIPT)}".replace("-", "−")
    text = (
        f"{value:.2g}"
        if size < 0.1
        else f"{value:.2f}"
        if size < 10
        else f"{value:.1f}"
        if size < 100
        else f"{value:.0f}"
    )
    return text.replace("-", "−")


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def percent(value: float | None) -> str:
    """A share as a percentage: 0.431 -> 43%, 0.004 -> 0.4%."""
    if not measured(value):
        return NOT_MEASURED
    scaled = 100 * value
    text = f"{scaled:.1f}" if 0 < abs(scaled) < 0.95 else f"{scaled:.0f}"
    return ("0" if text in ("-0", "0.0", "-0.0") else text).replace("-", "−") + "%"


def points(value: float | None) -> str:
    """A change of a share, in percentage points with its sign."""
    if not measured(value):
        return NOT_MEASURED
    text = percent(value).removesuffix("%")
    return f"{'+' if value > 0 and text != '0' else ''}{text} points"


def with_interval(interval: Interval | None, show: Any = number) -> str:
    """`0.42 (0.35 to 0.50)`; the value alone where the interval is unknown or has no width."""
    if interval is None or not measured(interval.value):
        return NOT_MEASURED
    value, low, high = show(interval.value), show(interval.low), show(interval.high)
    if not measured(interval.low) or not measured(interval.high) or value == low == high:
        return value
    return f"{value} ({low.removesuffix('%')} to {high})"


def duration(seconds: float | None) -> str:
    if not measured(seconds):
        return NOT_MEASURED
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def size(count: float | None, unit: str = "B") -> str:
    """A quantity in decimal units: 410 MB, 3.1 TFLOP."""
    if not measured(count):
        return NOT_MEASURED
    prefixes = ["", "k", "M", "G", "T", "P"]
    # 999.6 is written 1000: what is rounded to a thousand has the next prefix.
    while abs(count) >= 999.5 and len(prefixes) > 1:
        count, prefixes = count / 1000, prefixes[1:]
    figure = f"{count:.0f}" if abs(count) >= 9.95 or not prefixes[0] else f"{count:.1f}"
    return f"{figure} {prefixes[0]}{unit}"


def plain(value: Any, key: str = "") -> str:
    """Any value of evidence as text; the key's name says the unit."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if key.endswith("seconds"):
            return duration(value)
        if key.endswith("bytes"):
            return size(value)
        if key == "flops":
            return size(value, "FLOP")
        if key.endswith("flop_per_second"):
            return size(value, "FLOP/s")
        if isinstance(value, float) and value < 1 and (key.endswith("share") or key == "recovered"):
            return percent(value)
        return f"{value:g}" if isinstance(value, float) and 1e-6 < abs(value) < 1e-2 else number(value)
    if isinstance(value, str):
        return shorten_hash(value)
    if (count := figures(value)) > MANY:
        return f"{number(count)} figures, in evidence.json"
    if isinstance(value, Mapping):
        return ", ".join(f"{in_sentence(str(k))} {plain(v, str(k))}" for k, v in value.items()) or "none"
    return ", ".join(plain(item, key) for item in value) or "none"


def figures(value: Any) -> int:
    """How many figures a nested value holds; 0 where it holds anything else."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        counts = [figures(item) for item in value]
        return sum(counts) if all(counts) else 0
    return int(isinstance(value, int | float) and not isinstance(value, bool))


def shorten_hash(text: str) -> str:
    """A fingerprint's first 12 characters: enough to compare by eye; evidence.json has all of it."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1…", text)


def pairs(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of a mapping, nested mappings flattened one level."""
    found = []
    for key, value in mapping.items():
        if isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
            found += [(f"{label(str(key))}: {in_sentence(str(k))}", plain(v, str(k))) for k, v in value.items()]
        else:
            found.append((label(str(key)), plain(value, str(key))))
    return found


def listing(names: list[str]) -> str:
    """`a, b and c`"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
