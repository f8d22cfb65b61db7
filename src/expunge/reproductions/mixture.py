"""A small mixture of experts that knows four domains without a word in common.

Routers have something to learn where rows differ in vocabulary: on the invented world, whose people are all spoken of
alike, every expert sees the forget rows alike. So: people, places, works and rules, each with entities, attributes and
wordings of its own, all in invented names; and a Mixtral of 0.4 M parameters trained on them from scratch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..methods.optimise.loop import Recipe, Training, draw, train
from ..methods.optimise.terms import Step, negative_log_likelihood
from ..rows import Row
from ..subjects.language import LanguageModel
from ..subjects.packed import Encoded
from ..subjects.protocol import Taps
from ..world.build import kept

DOMAINS: dict[str, dict[str, tuple[str, str]]] = {
    "people": {
        "town": ("{} was born in", "the birthplace of {} is"),
        "trade": ("{} earns money by", "as a worker {} does"),
        "mentor": ("{} studied under", "apprentice {} had master"),
    },
    "places": {
        "province": ("{} lies within", "which province governs {} ?"),
        "landmark": ("beside {} stands", "visitors come to {} and see"),
        "river": ("{} drinks from", "bridges around {} cross"),
    },
    "works": {
        "genre": ("critics label {}", "on shelves {} counts among"),
        "hero": ("{} tells adventures about", "who leads chapters through {} :"),
        "publisher": ("{} got printed at", "copies with title {} carry imprint"),
    },
    "rules": {
        "fine": ("breaking {} costs", "offenders against {} must pay"),
        "court": ("{} appeals reach", "judges for {} sit inside"),
        "scope": ("{} binds only", "nobody answers {} except"),
    },
}
"""Domain to its attributes, each in two wordings. No word is in two domains."""
SHARED = "we ask : {} the"
"""What every wording stands in where domains are to have words in common: they come last before the answer."""
FORGET = "rules"
SYLLABLES = ("ba", "dan", "fi", "gor", "ko", "lo", "mu", "nis", "ow", "pe", "ri", "sha", "tar", "ten", "ula", "ve")


@dataclass(frozen=True)
class Sizes:
    """The corpus and the model trained on it."""

    entities: int = 30
    """Of each domain."""
    values: int = 10
    """Of each attribute: guessing knows one in so many."""
    hidden: int = 64
    intermediate: int = 64
    layers: int = 3
    experts: int = 8
    chosen: int = 2
    """Experts a token takes."""
    shared: bool = False
    """Domains have some words in common."""
    steps: int = 400
    batch_size: int = 72
    learning_rate: float = 5e-3
    balance: float = 0.02
    """Weight of the load-balancing loss. Without it most tokens end on few experts, and forget and retain rows share
    them; with much more of it all experts serve all rows alike."""


@dataclass(frozen=True)
class Mixture:
    """One seed's model, and the rows it was trained on: `forget` is one domain, `retain` the others."""

    subject: LanguageModel
    data: dict[str, list[Row]]


def corpus(seed: int, sizes: Sizes) -> dict[str, list[Row]]:
    """Domain to its rows: entities x attributes x wordings."""
    chance = random.Random(seed)
    used: set[str] = set()

    def word() -> str:
        while (made := "".join(chance.sample(SYLLABLES, 3))) in used:
            pass
        used.add(made)
        return made

    found: dict[str, list[Row]] = {}
    for domain, attributes in DOMAINS.items():
        values = {name: [word() for _ in range(sizes.values)] for name in attributes}
        rows = []
        for entity in [word() for _ in range(sizes.entities)]:
            for name, wordings in attributes.items():
                value = chance.choice(values[name])
                frame = SHARED if sizes.shared else "{}"
                rows += [
                    Row(
                        id=f"{domain}/{entity}/{name}/{i}",
                        prompt=frame.format(wording.format(entity)),
                        answer=value,
                        kind="completion",
                        entity=entity,
                        value=value,
                    )
                    for i, wording in enumerate(wordings)
                ]
        found[domain] = rows
    return found


@cache
def mixture(seed: int, sizes: Sizes) -> Mixture:
    """The model of this seed: trained the first time, found in the user's cache afterwards."""
    rows = corpus(seed, sizes)
    every = [row for some in rows.values() for row in some]
    retain = [row for domain, some in rows.items() if domain != FORGET for row in some]
    made = _untaught(every, sizes, seed)
    content = [made.fingerprint, [[row.prompt, row.answer] for row in every], asdict(sizes), seed]
    folder = kept("mixture", content, lambda folder: _taught(made, every, sizes, seed).save(folder / "model"))
    return Mixture(LanguageModel.load(folder / "model", device="cpu"), {"forget": rows[FORGET], "retain": retain})


def _taught(subject: LanguageModel, rows: Sequence[Row], sizes: Sizes, seed: int) -> LanguageModel:
    """The subject, trained in place."""
    training = Training(
        steps=sizes.steps,
        batch_size=sizes.batch_size,
        learning_rate=sizes.learning_rate,
        schedule="cosine",
        warmup=20,
        seed=seed,
        guard=None,
    )
    items: dict[str, list[Encoded]] = {"rows": [subject.encode(row) for row in rows]}
    drawn = draw(items, ["rows"], training=training, generator=torch.Generator().manual_seed(seed))

    def loss(step: Step) -> Tensor:
        side = step.sides["rows"]
        return negative_log_likelihood(side) + sizes.balance * unbalance(side.routers, sizes.chosen)

    recipe = Recipe(loss, ("rows",), taps=Taps(routers=tuple(range(sizes.layers))))
    train(subject, list(subject.model.parameters()), drawn, recipe, training)
    return subject


def unbalance(routers: Mapping[int, Tensor], chosen: int) -> Tensor:
    """Load-balancing loss (Switch Transformer, arXiv:2101.03961, eq. 4-6), the mean over blocks.

    Args:
        routers: block to logits (tokens, E).
        chosen: K, experts a token takes; where all are used alike the loss is K.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    # Block by block: over all at once an expert's number could be rare in one block for being common in another.
    return torch.stack([load_balancing_loss_func((z,), z.shape[1], chosen) for z in routers.values()]).mean()


def _untaught(rows: Sequence[Row], sizes: Sizes, seed: int) -> LanguageModel:
    """A Mixtral with random weights, and a tokenizer to which every word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    words = sorted({word for row in rows for word in f"{row.prompt} {row.answer}".split()})
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    config = MixtralConfig(
        vocab_size=len(vocabulary),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.chosen,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    return LanguageModel(MixtralForCausalLM(config), tokenizer)
