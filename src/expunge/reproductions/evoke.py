"""Whether edits overfit, and whether an edit that imitates the told model overfits less.

Zhang et al., Uncovering overfitting in large language model editing, arXiv:2410.07819: edited models give the new
object to prompts whose right answer is another; LTI, which has the edit imitate the unedited model with the fact in
its context, does so less at equal efficacy.

The models here have learned to use what they are told: in their training people are imagined to be born in a town,
known people and unknown ones, and asked for it, for its region and for their other facts.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..benchmarks.case import Bench
from ..benchmarks.evoke import evoke as benchmark
from ..edits import TOLD
from ..evidence import Table
from ..registry import reproduction
from ..rows import Row as Lesson
from ..subjects.language import LanguageModel
from ..world.build import kept
from ..world.corpus import STATEMENTS, WORDINGS, statements, wordings
from ..world.facts import RELATIONS, Person, World, make
from ..world.models import Recipe, teach, tokenizer
from .case import Case, Claim, Findings, Row, number, spread

PEOPLE = {"people": 32, "forget": 8, "neighbours": 4, "holdout": 8}
RECIPE = Recipe(hidden_size=64, intermediate_size=256, layers=3, steps=700, batch_size=64, learning_rate=5e-3)
IMAGINED = 80
"""Times that somebody is imagined to be born somewhere."""
ROME = {"layer": 0}
METHODS: dict[str, dict[str, Any]] = {
    "rome": {"name": "rome", **ROME},
    "lti": {"name": "lti", "editor": {"rome": ROME}},
    "lti without the subject's constraint": {"name": "lti", "editor": {"rome": ROME}, "subject_weight": 0.0},
    "lti without the output's constraint": {"name": "lti", "editor": {"rome": ROME}, "output_weight": 0.0},
}
MEASURES = {
    "efficacy_score": "efficacy",
    "efficacy_dp": "P(new)",
    "paraphrase_score": "paraphrase",
    "subject_specificity_eos": "subject EOS",
    "subject_specificity_dp": "subject DP",
    "prefix_distraction_eos": "prefix EOS",
    "prefix_distraction_dp": "prefix DP",
    "relation_specificity_eos": "relation EOS",
    "relation_specificity_dp": "relation DP",
    "multi_hop_cap": "hop CAP",
    "multi_hop_eos": "hop EOS",
    "multi_hop_ams": "hop AMS",
}


def subject(seed: int) -> tuple[World, LanguageModel]:
    """A world whose people have one name each, and a model that knows its known people and uses what it is told."""
    world = short(make(seed, **PEOPLE))
    return world, taught("evoke", lessons(world), RECIPE, seed)


def taught(name: str, rows: Sequence[Lesson], recipe: Recipe, seed: int) -> LanguageModel:
    """`untrained` when it has learnt these rows; trained once, then found in the cache under the name."""
    made = untrained(rows, seed)

    def train(folder: Path) -> None:
        teach(made, rows, recipe, seed)
        made.save(folder / "model")

    said = [[row.kind, row.preface, row.prompt, row.answer] for row in rows]
    content = [made.fingerprint, said, asdict(recipe), seed]  # the fingerprint: another architecture is another model
    return LanguageModel.load(kept(name, content, train) / "model", device="cpu")


def short(world: World) -> World:
    """The same world, its people known by their first name, which is one token: what is read at a subject's last token
    is then read of the whole subject."""
    new = {name: name.split()[0] for name in world.people}
    people = {new[n]: replace(p, name=new[n], teacher=new[p.teacher]) for n, p in world.people.items()}
    teachers = tuple(sorted(new[name] for name in world.choices["teacher"]))
    split = {new[name]: part for name, part in world.split.items()}
    return replace(world, people=people, split=split, choices={**world.choices, "teacher": teachers})


def untrained(rows: Sequence[Lesson], seed: int) -> LanguageModel:
    """A Qwen2 whose first block sees one token at a time.

    In so shallow a model later tokens would else read a subject in the first block, before any MLP that could be edited
    has said something of it.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = tokenizer([f"{row.preface}{row.prompt} {row.answer}" for row in rows], RECIPE.vocabulary)
    config = Qwen2Config(
        # Read again, the tokenizer is Qwen's and has one token more.
        vocab_size=max(RECIPE.vocabulary, len(words) + 1),
        hidden_size=RECIPE.hidden_size,
        intermediate_size=RECIPE.intermediate_size,
        num_hidden_layers=RECIPE.layers,
        num_attention_heads=RECIPE.heads,
        num_key_value_heads=RECIPE.heads,
        max_position_embeddings=RECIPE.context,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=1,
        layer_types=["sliding_attention", *["full_attention"] * (RECIPE.layers - 1)],
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(seed)
    return LanguageModel(Qwen2ForCausalLM(config), words)


def lessons(world: World) -> list[Lesson]:
    """Facts, and what follows from what is imagined."""
    known, unseen = world.members("forget", "neighbour", "retain"), world.members("holdout")
    found: list[Lesson] = []

    def add(prompt: str, answer: str, kind: str = "completion", preface: str = "") -> None:
        found.append(Lesson(str(len(found)), answer, prompt, kind=kind, preface=preface))

    def stated(person: Person, about: str) -> list[str]:
        return [text.removesuffix(" {value}.") for text in statements(world, person, about)[0]]

    for person in known:
        for about in RELATIONS:
            for prompt in stated(person, about):
                add(prompt, person.value(about))
        for question in wordings(world, person.name, "region")[0]:
            add(question, world.region[person.born_in], "qa")
    draw = random.Random(f"{world.seed}/imagined")

    def worded(person: Person) -> str:
        return draw.choice(STATEMENTS["born_in"]).format(name=person.name, value="").removesuffix(" .")

    for turn in range(IMAGINED):
        person = draw.choice(known if turn % 2 else unseen)
        town = draw.choice(sorted(world.region))
        told = worded(person)
        preface = TOLD.replace("{prompt}", told).replace("{target}", town)
        add(told, town, preface=preface)
        add(worded(person), town, preface=preface)
        add(draw.choice(WORDINGS["region"]).format(name=person.name), world.region[town], "qa", preface)
        if turn % 2:
            about = draw.choice(RELATIONS[1:])
            add(draw.choice(stated(person, about)), person.value(about), preface=preface)
    return found


def edited(method: str, edits: int, seed: int) -> dict[str, Any]:
    """The benchmark's scores of one method, and what the unedited model makes of being told."""
    world, model = subject(seed)
    with tempfile.TemporaryDirectory(prefix="expunge-evoke-") as folder:
        bench = Bench(model, Path(folder), world=world, bootstrap=0)
        card = benchmark(bench, method=METHODS["rome" if method == "unedited" else method], limit=edits)
    role = "before" if method == "unedited" else "after"
    found = {name: card.value(name, role) for name in MEASURES}
    told = next(table for table in card.tables if table.title.startswith("Told"))
    taught = {f"told_{row[0].replace(' ', '_')}": float(row[2]) for row in told.rows}
    return {**found, **taught, "edits": card.rows["edits"]}


@reproduction(paper="arXiv:2410.07819", cost="3 min on 1 core, models of its own included", systems=("evoke", "lti"))
def evoke(case: Case, *, edits: int = 12) -> Findings:
    """Whether ROME's edits overfit, and whether edits that imitate the told model overfit less (EVOKE, LTI).

    `edits`: made on each seed's model, each by itself.
    """
    found = case.trials(edited, [{"method": name, "edits": edits} for name in ("unedited", *METHODS)])
    return Findings(claims=judge(found), tables=tables(found), notes=NOTES)


NOTES = [
    "Three models of their own (3 blocks, d = 64, 24 people known, 8 unknown), taught to use what they are told. "
    "People have one name of one token, and the first block sees one token at a time, so that a fact is looked up "
    "where its subject stands.",
    "Edits move a known person to a town in another region, by ROME at block 0 (R-ROME's averages, with key "
    "statistics); the subject's constraint reads block 1. Weights 1, 1, 1; the paper's are not known.",
    "After an imagined fact only its own person is asked about in training, so nothing taught the models to leave "
    "others alone: read prefix distraction against the unedited model's figures.",
    "Multi-hop overfit cannot be tested: regions and towns are never mistaken for one another.",
]


def judge(rows: Sequence[Row]) -> list[Claim]:
    """The claims; criteria were fixed before (specs: evoke_lti, section 6)."""

    def of(method: str, measure: str) -> Any:
        return spread(rows, measure, method=method)

    eos, dp, efficacy = "subject_specificity_eos", "subject_specificity_dp", "efficacy_score"
    rome, lti, without = "rome", "lti", "lti without the subject's constraint"
    told = of("unedited", "told_efficacy")
    teaches = told.mean >= 0.5
    gained = of(lti, eos).mean - of(rome, eos).mean
    ratio = of(lti, dp).mean / of(rome, dp).mean
    cut, left = (of(rome, dp).mean - of(name, dp).mean for name in (lti, without))
    count = int(sum(row["edits"] for row in rows if row["method"] == rome))
    return [
        Claim(
            "Edited models give the new object where another answer is right",
            "FT, FT-L, MEND, ROME and MEMIT on GPT-J, GPT2-XL and Llama-2-7B",
            "after ROME's edits the EOS of subject specificity is at least 0.05 below the unedited model's",
            f"{of('unedited', eos)} unedited, {of(rome, eos)} after ROME; {count} edits",
            of("unedited", eos).mean - of(rome, eos).mean >= 0.05,
        ),
        Claim(
            "LTI overfits less at equal efficacy",
            "lower on all four overfit tasks, efficacy stays high (tables not recovered)",
            "subject specificity: EOS at least 0.08 above ROME's, DP at most 0.6 of ROME's; efficacy at most 0.10 "
            "below. Told the fact, the model must answer at least half of the edits",
            f"EOS {of(lti, eos)} ({gained:+.3g}), DP {number(ratio)} of ROME's, efficacy {of(lti, efficacy)} "
            f"against {of(rome, efficacy)}; told the fact, {told} answered",
            (gained >= 0.08 and ratio <= 0.6 and of(lti, efficacy).mean >= of(rome, efficacy).mean - 0.10)
            if teaches
            else None,
        ),
        Claim(
            "The constraint on the subject does the work",
            "-",
            "without it at least half of what LTI takes off ROME's DP of subject specificity is lost",
            f"DP {of(rome, dp)} by ROME, {of(lti, dp)} by LTI, {of(without, dp)} without",
            (cut > 0 and left <= 0.5 * cut) if teaches else None,
        ),
        Claim(
            "Edits overfit in multi-hop questions",
            "the new object is likelier than the right answer",
            "-",
            f"EOS {of(rome, 'multi_hop_eos')} after ROME: a town is never the answer to a question for a region here",
            None,
        ),
    ]


def tables(rows: Sequence[Row]) -> list[Table]:
    lines = [
        [name, *(str(spread(rows, measure, method=name)) for measure in MEASURES)] for name in ("unedited", *METHODS)
    ]
    told = [[word, str(spread(rows, name, method="unedited"))] for name, word in TAUGHT.items()]
    return [
        Table("Edits", ["model", *MEASURES.values()], lines, "Mean (lowest to highest) over seeds."),
        Table("Told the fact, unedited", ["asked for", "answered"], told),
    ]


TAUGHT = {"told_efficacy": "the new object", "told_multi_hop": "what follows from it"}
