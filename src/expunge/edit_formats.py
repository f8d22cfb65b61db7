"""Published forms of edit rows that nest things or call them by names of their own, brought to those of edits.py.

CounterFact  requested_rewrite {prompt, subject, target_new {str}, target_true {str}}, paraphrase_prompts,
             neighborhood_prompts (the old answer stays right), attribute_prompts (the new answer was right before)
MQuAKE       requested_rewrite [one], questions, new_answer, new_answer_alias: what follows in several steps
zsRE         src, alt, answers, rephrase, loc, loc_ans; with portability {New Question, New Answer}
EasyEdit     locality_prompt, locality_ground_truth beside its nested form
EditAttack   questions, targets, subjects, paraphrased_questions, portability_questions
known_1000   prompt, subject, attribute: facts for causal tracing
expunge      question, answer (or prompt, completion), entity: the rows of a request
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import RowError
from .rows import shown

Record = Mapping[str, Any]


def unnested(record: Record, where: str) -> Record:
    """The record with what a published form says under the names of edits.py; what it has under these stays.

    Raises:
        RowError: a form that lacks what it must have; begins with `where`.
    """
    found: dict[str, Any] = {}
    if "requested_rewrite" in record:
        found = _rewrite(record, where)
    elif "src" in record and "alt" in record:
        found = {"prompt": record["src"], "target_new": record["alt"], "ground_truth": record.get("answers")}
    elif "questions" in record and "targets" in record:
        found = {
            "prompt": record["questions"],
            "target_new": record["targets"],
            "subject": record.get("subjects"),
            "rephrase_prompt": record.get("paraphrased_questions"),
        }
        if record.get("portability_questions"):
            found["portability"] = {"hop": [[record["portability_questions"], record["targets"]]]}
    elif "attribute" in record and "subject" in record:
        found = {"ground_truth": record["attribute"]}
    elif "question" in record and "answer" in record:
        found = {"prompt": record["question"], "ground_truth": record["answer"], "kind": "qa"}
    elif "prompt" in record and "completion" in record:
        found = {"ground_truth": record["completion"]}
    if (
        "entity" in record
        and "subject" not in record
        and str(record["entity"]) in str({**found, **record}.get("prompt"))
    ):
        found["subject"] = record["entity"]
    for prompt, answer in (("loc", "loc_ans"), ("locality_prompt", "locality_ground_truth")):
        if record.get(prompt):
            found["locality"] = {"neighborhood": [{"prompt": record[prompt], "ground_truth": record.get(answer)}]}
    hop = record.get("portability")
    if isinstance(hop, Mapping) and "New Question" in hop:
        found["portability"] = {"one_hop": [{"prompt": hop["New Question"], "ground_truth": hop.get("New Answer")}]}
        return {**record, **found}
    return {**found, **record}


def _rewrite(record: Record, where: str) -> dict[str, Any]:
    rewrite = record["requested_rewrite"]
    if isinstance(rewrite, list):
        if len(rewrite) != 1:
            raise RowError(
                f"{where}: field 'requested_rewrite' holds {len(rewrite)} edits, expected one: a row is one edit, and "
                "what follows from several at once follows from none of them"
            )
        rewrite = rewrite[0]
    if not isinstance(rewrite, Mapping):
        raise RowError(
            f"{where}: field 'requested_rewrite' is {shown(rewrite)}, expected an object with prompt, subject, "
            "target_new and target_true"
        )
    missing = [name for name in ("prompt", "subject", "target_new") if not rewrite.get(name)]
    if missing:
        raise RowError(f"{where}: field 'requested_rewrite.{missing[0]}' is missing")
    new, true = (_said(rewrite.get(name), f"{where}: field 'requested_rewrite.{name}'") for name in NAMES)
    found = {
        "prompt": rewrite["prompt"],
        "subject": rewrite["subject"],
        "target_new": new,
        "ground_truth": true,
        "rephrase_prompt": record.get("paraphrase_prompts"),
        "locality": {},
    }
    for name, kind, answer in (("neighborhood", "neighborhood", true), ("attribute", "attribute", new)):
        prompts = record.get(f"{name}_prompts") or []
        if prompts and not answer:
            raise RowError(f"{where}: field '{name}_prompts' needs an answer: requested_rewrite.target_true is missing")
        found["locality"] |= {kind: [[prompt, answer] for prompt in prompts]} if prompts else {}
    if record.get("questions"):
        answers = [record.get("new_answer"), *(record.get("new_answer_alias") or [])]
        found["portability"] = {"multi_hop": [{"prompt": q, "ground_truth": answers} for q in record["questions"]]}
    return found


NAMES = ("target_new", "target_true")


def _said(value: Any, where: str) -> Any:
    """The text of an answer that comes with its entity's id."""
    if isinstance(value, Mapping):
        if not value.get("str"):
            raise RowError(f"{where} is {shown(value)}, expected {{str: the answer}}")
        return value["str"]
    return value
