"""GUARD (arXiv:2505.13312): a classifier of prompts, and decoding that cannot say what the forgotten answers say.

Prompts that the classifier lets through are answered as if there were no guard. For the others the forget rows nearest
to the prompt, and those about whoever it names, give words and phrases; a token y after what was written so far, s, has

    log p(y | x, s) - token(s + y) - meaning(s + y)

`token` is infinite where a phrase (its first `beta`) stands at the end of s + y. `meaning` is the cosine c between the
word that y ends and the nearest telling word of the phrases; infinite from `delta` on.

Phrases are runs of words, whatever the tokens they are spelt with (guard/forbidden.py). The prompt is read once: the
classifier looks at the hidden states that decoding starts from, and keys and values are kept.
"""

from __future__ import annotations

from typing import Any, Literal

from ... import registry
from ...errors import ParameterError, RequestError
from ...subjects.language import LanguageModel
from . import embeddings
from .case import GuardCase
from .gate import Phrases, pooled, question, train
from .restriction import Restriction


@registry.guard(
    paper="arXiv:2505.13312",
    requires=("weights", "forget_data", "retain_data", "classifier"),
    keeps=("the forgotten answers, or what they give away", "a classifier of prompts about them"),
    sequential="free",
    cost="a small network per prompt; per token of a flagged prompt a few look-ups and one addition to the logits",
    known_weaknesses=("logit_lens", "relearn", "paraphrase"),
)
def guard(
    case: GuardCase,
    *,
    threshold: float = 0.5,
    nearest: int = 3,
    beta: float = 1.0,
    run: int = 5,
    soft: float = 1.0,
    delta: float = 0.5,
    embedder: str = "subject",
    beams: int = 1,
    on_flag: Literal["restrict", "refuse"] = "restrict",
    on_block: Literal["continue", "refuse"] = "continue",
    refusal: str = "I don't know.",
    common: float = 0.02,
    epochs: int = 50,
    seed: int = 0,
) -> Restriction:
    """Classify prompts by their hidden states, and let flagged ones be answered by nothing that forgotten answers say.

    What a row's answer says is its value and aliases; without a value, runs of words that its question, a list of stop
    words and retained answers do not have, and near copies of the whole. Questions that the classifier does not know
    as forgotten ones are answered in full.

    Args:
        threshold: probability from which on a prompt is flagged.
        nearest: forget rows whose questions are most like the prompt's; those about whoever it names are added.
        beta: share of a phrase's words at which it is matched.
        run: of texts longer than so many words every run of so many is a phrase.
        soft: weight of matching by meaning; 0 is none.
        delta: cosine from which on a word is forbidden; 1 or more: none.
        embedder: of words, `subject` for the model's own input embeddings or a sentence-transformers model.
        beams: width of the search where nothing is sampled (7 in the paper's public re-implementation).
        on_flag: restrict what flagged prompts are answered with, or refuse to answer.
        on_block: continue with what is allowed, or refuse as soon as the likeliest token is not.
        refusal: what is said where nothing is allowed.
        common: a word that this share of retained answers has tells nothing.
        epochs: of the classifier.
        seed: of the classifier.

    Raises:
        RequestError: no retain rows; a forgotten answer that says nothing of its own; a guard inside.
        ParameterError: a number out of its range, or an embedder that cannot be used.
    """
    for name, value, good in (("beta", beta, 0 < beta <= 1), ("nearest", nearest, nearest >= 0), ("run", run, run > 0),
                              ("soft", soft, soft >= 0), ("beams", beams, beams > 0),
                              ("epochs", epochs, epochs > 0)):  # fmt: skip
        if not good:
            raise ParameterError(f"guard: {name} = {value} is out of range")
    if not isinstance(case.subject, LanguageModel):
        raise RequestError("guard changes how a model decodes; put it around the model, and other guards around it")
    forget, retain = case.rows.get("forget", []), case.rows.get("retain", [])
    if forget and not retain:
        raise RequestError("guard: 0 retain rows, but the classifier needs questions that are to be answered")
    settings: dict[str, Any] = {
        "threshold": threshold,
        "nearest": nearest,
        "beta": beta,
        "run": run,
        "soft": soft,
        "delta": delta,
    }
    settings |= {"beams": beams, "on_flag": on_flag, "on_block": on_block, "refusal": refusal, "embedder": embedder}
    settings |= {"common": common, "epochs": epochs, "seed": seed}
    phrases = Phrases(retain, refusal, common)
    items = [phrases.item(row) for row in forget]
    words = embeddings.embedder(embedder, case.subject) if soft or delta < 1 else None
    allowed = [row.answer for row in retain]
    if not forget:
        return Restriction(case.subject, [], None, None, words, allowed, **settings)
    asked = [case.subject.prompt_text(question(row)) for row in (*forget, *retain)]
    features = pooled(case.subject, asked)
    known, others = features[: len(forget)], features[len(forget) :]
    classifier = train(known, others, epochs=epochs, seed=seed)
    return Restriction(case.subject, items, known, classifier, words, allowed, **settings)
