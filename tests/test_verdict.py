"""The verdict as a function of probe runs (specs: taxonomy, section 9)."""

import itertools
import random

import pytest

from expunge.cards import MethodCard
from expunge.errors import CardError, MismatchError
from expunge.evidence import Item, ProbeRun
from expunge.registry import guard, parts
from expunge.verdict import Rules, Runs, auc, decide, judge, null

GROUP = {"direct": "direct", "paraphrase": "black_box", "logit_lens": "latent", "relearn": "tamper"}
RULES = Rules(draws=400)


def probe(attack, score, *, entities=12, each=4, status="scored", seed=0, group=None):
    """A probe that recovers a share `score` of the items of every entity, spread at random."""
    draw = random.Random(f"{attack}/{seed}")
    items = [
        Item(f"e{e}", f"e{e}/{i}", float(draw.random() < score) if 0 < score < 1 else float(score))
        for e in range(entities)
        for i in range(each)
    ]
    return ProbeRun(attack, group or GROUP[attack], items, {}, {"queries": len(items)}, status=status)


def model(direct, paraphrase, logit_lens, relearn, **options):
    scores = {"direct": direct, "paraphrase": paraphrase, "logit_lens": logit_lens, "relearn": relearn}
    return [probe(attack, score, **options) for attack, score in scores.items()]


ORIGINAL = model(1, 1, 1, 1)
GOLDS = [model(0.05, 0.05, 0.1, 0.1, seed=s) for s in (1, 2, 3)]
FORGOT = model(0.05, 0.05, 0.1, 0.1, seed=9)


def verdict(after, *, before=ORIGINAL, golds=GOLDS, **options):
    runs = Runs(before, after, golds)
    options.setdefault("has_gold", bool(golds))
    return decide(judge(runs, RULES), chance=null(runs, RULES), rules=RULES, **options)


def test_the_original_scores_one_and_mean_gold_zero():
    judged = judge(Runs(ORIGINAL, ORIGINAL, GOLDS), RULES).probes
    assert all(p.recovery.value == pytest.approx(1) and p.recovery.low == pytest.approx(1) for p in judged)
    mean = [
        ProbeRun(
            runs[0].attack,
            runs[0].group,
            [Item(i[0].entity, i[0].row, sum(x.recovered for x in i) / 3) for i in zip(*(r.items for r in runs))],
            {},
            {},
        )
        for runs in zip(*GOLDS)
    ]
    for p in judge(Runs(ORIGINAL, mean, GOLDS), RULES).probes:
        assert p.recovery.value == pytest.approx(0, abs=1e-12)


def test_known_models_get_their_verdicts():
    assert verdict(ORIGINAL).verdict == "not_forgotten"
    assert verdict(FORGOT).verdict == "removed_under_tested_attacks"
    hidden = verdict(model(0, 0, 1, 0))
    assert hidden.verdict == "suppressed"
    assert hidden.by == ["logit_lens"]
    assert verdict(model(0, 0, 0.1, 0.9, seed=9)).by == ["relearn"]


@pytest.mark.parametrize("after", [ORIGINAL, FORGOT, model(0, 0, 1, 0)])
def test_the_order_of_probes_does_not_matter(after):
    expected = verdict(after)
    for order in itertools.permutations(range(4)):

        def pick(runs, order=order):
            return [runs[i] for i in order]

        found = verdict(pick(after), before=pick(ORIGINAL), golds=[pick(gold) for gold in GOLDS])
        assert found.verdict == expected.verdict
        assert sorted(found.by) == sorted(expected.by)


def test_adding_probes_is_monotone():
    def more(runs, score):
        return [*runs, probe("extra", score, group="latent")]

    before, golds = more(ORIGINAL, 1), [more(gold, 0) for gold in GOLDS]
    quiet = verdict(more(model(0, 0, 0.1, 0.9, seed=9), 0), before=before, golds=golds)
    assert quiet.verdict == "suppressed"
    loud = verdict(more(FORGOT, 1), before=before, golds=golds)
    assert loud.verdict == "suppressed"
    assert loud.by == ["extra"]


def test_without_gold_nothing_is_ever_removed():
    for after in (ORIGINAL, FORGOT, model(0, 0, 0, 0), model(0, 0, 1, 0)):
        found = verdict(after, golds=[])
        assert "removed" not in found.verdict
    assert verdict(model(0, 0, 0, 0), golds=[]).verdict == "no_recovery_found"


def test_reintroduction_never_changes_the_verdict():
    for score in (0, 0.5, 1):

        def more(runs, score=score):
            return [*runs, probe("ununlearning", score, group="reintroduce")]

        for after in (ORIGINAL, FORGOT, model(0, 0, 1, 0)):
            found = verdict(more(after), before=more(ORIGINAL), golds=[more(gold) for gold in GOLDS])
            assert found.verdict == verdict(after).verdict


def test_fewer_than_eight_entities_get_no_verdict():
    few = {"entities": 7}
    golds = [model(0.05, 0.05, 0.1, 0.1, seed=s, **few) for s in (1, 2, 3)]
    found = verdict(model(0, 0, 0, 0, **few), before=model(1, 1, 1, 1, **few), golds=golds)
    assert found.verdict == "inconclusive"
    assert "7 entities" in found.because


def test_a_probe_without_power_is_dropped_and_says_why():
    weak = judge(Runs(model(1, 1, 0.06, 1), FORGOT, GOLDS), RULES).probes[2]
    assert not weak.informative
    assert "too near" in weak.why
    strong = judge(Runs(ORIGINAL, FORGOT, [model(0.05, 0.05, 0.7, 0.1, seed=s) for s in (1, 2)]), RULES).probes[2]
    assert "would bring it out of any model" in strong.why
    assert verdict(FORGOT, before=model(1, 1, 0.06, 1)).verdict == "inconclusive"


def test_a_skipped_probe_is_missing_not_zero():
    def skipped(runs):
        return [*runs[:3], ProbeRun("relearn", "tamper", [], {}, {}, status="skipped: too large")]

    found = verdict(skipped(FORGOT), before=skipped(ORIGINAL), golds=[skipped(gold) for gold in GOLDS])
    assert found.verdict == "inconclusive"
    assert "tamper" in found.because


def test_a_failed_self_test_gives_no_verdict():
    assert verdict(FORGOT, self_test=False).verdict == "inconclusive"


def test_with_api_access_only_text_is_judged():
    assert verdict(model(0, 0, 1, 1), access="api").verdict == "removed_under_tested_attacks"
    assert verdict(model(0, 1, 0, 0), access="api").verdict == "suppressed"


def test_what_chance_gives_between_golds_raises_the_bar():
    # One gold that relearns far more than the others: the same from a candidate is chance, not recovery.
    golds = [*GOLDS[:2], model(0.05, 0.05, 0.1, 0.45, seed=3)]
    assert verdict(model(0.05, 0.05, 0.1, 0.45, seed=4), golds=golds).verdict != "suppressed"


def test_flags_stand_beside_any_verdict():
    assert verdict(FORGOT, flags=["damaged"]).flags == ["damaged"]


def test_models_that_were_asked_different_rows_are_not_compared():
    with pytest.raises(MismatchError, match="different rows"):
        judge(Runs(ORIGINAL, model(0, 0, 0, 0, each=3), GOLDS), RULES)


def test_auc_counts_ties_half():
    assert auc([1, 1], [0, 0]) == 1
    assert auc([0.5], [0.5, 0.5]) == 0.5


def test_a_guard_cannot_claim_removal():
    with pytest.raises(CardError, match="intention can only be suppression"):

        @guard(paper="x", intention="removal", known_weaknesses=("relearn",))
        def pretender(case):
            """Pretends."""


def test_every_registered_method_has_a_card_that_holds():
    for part in parts("methods"):
        assert isinstance(part.card, MethodCard)
        assert part.card.known_weaknesses
