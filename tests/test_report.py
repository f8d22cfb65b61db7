"""The report says everything the evidence holds, to anybody, and carries out nothing that a model wrote."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import itertools
import json
import math
import re
from pathlib import Path

import pytest
from evidence_factory import VERDICTS, evidence, fingerprint

from expunge import report
from expunge.errors import MismatchError, OutputError
from expunge.evidence import Evidence, Interval, Knowing, Measured
from expunge.report import charts, compare, tracks, words
from expunge.report import page as page_content
from expunge.report.headline import headline, speed, worst
from expunge.report.render import markdown

HOSTILE = '<script>alert("x")</script> <img src=x onerror=alert(1)> | `a` **b** & "quoted"'
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(html.parser.HTMLParser):
    """Collects tags, attributes, text and everything that is out of balance."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def written(made: Evidence, folder: Path) -> tuple[Page, str, dict[str, Path]]:
    paths = report.write(made, folder)
    return Page(paths["report.html"].read_text()), paths["report.md"].read_text(), paths


CASES = [evidence(v) for v in VERDICTS] + [
    evidence("suppressed", gold=0),
    evidence("inconclusive", skipped=True),
    evidence("suppressed", damage=0.2, flags=("neighbour_damage", "keeps_forget_data", "a_new_flag")),
    evidence("suppressed", experts=True),
]


@pytest.mark.parametrize("made", CASES, ids=lambda e: f"{e.verdict.verdict}-{len(e.models)}")
def test_a_page_is_balanced_self_contained_and_free_of_nan(made: Evidence, tmp_path: Path) -> None:
    page, summary, paths = written(made, tmp_path)
    assert not page.wrong
    assert not page.open
    source = paths["report.html"].read_text()
    for text in (source, summary):
        assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
        assert not re.search(r"\b(nan|NaN|None|inf|null|undefined)\b", text), re.findall(r".{30}\bNone\b.{9}", text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "img"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert len(source) < 150_000


@pytest.mark.parametrize("made", CASES, ids=lambda e: f"{e.verdict.verdict}-{len(e.models)}")
def test_the_verdict_comes_first_with_all_its_flags_in_the_same_line(made: Evidence, tmp_path: Path) -> None:
    _, summary, paths = written(made, tmp_path)
    line = re.search(r'<h2 id="verdict">.*', paths["report.html"].read_text())
    assert line
    title = words.verdict_words(made.verdict.verdict).title
    for wanted in (title, *(words.flag_words(flag)[0] for flag in made.verdict.flags)):
        assert wanted in line[0]
        assert wanted in summary.split("\n")[2]
    source = paths["report.html"].read_text()
    assert source.index('<h2 id="verdict">') < min(m.start() for m in re.finditer("<table|<figure|<dl", source))


@pytest.mark.parametrize("made", CASES, ids=lambda e: f"{e.verdict.verdict}-{len(e.models)}")
def test_every_image_has_words_for_those_who_cannot_see_it(made: Evidence, tmp_path: Path) -> None:
    page, _, _ = written(made, tmp_path)
    images = [attributes for tag, attributes in page.tags if tag == "svg" and "overflow" not in attributes]
    assert len(images) > 20
    assert all(a.get("aria-hidden") == "true" or (a.get("role") == "img" and a.get("aria-label")) for a in images)


def test_everything_in_the_evidence_is_on_the_page(tmp_path: Path) -> None:
    made = evidence("suppressed", damage=0.08)
    made.metrics[0].flag = "after: an impossible value"
    page, _, _ = written(made, tmp_path)
    request, method = made.request, made.method
    wanted = [request["name"], request["reason"], request["proof"], *map(str, request["rows"].values())]
    wanted += [value[:12] for value in request["fingerprints"].values()] + [m["fingerprint"][:12] for m in made.models]
    wanted += [m["name"] for m in made.models] + [method["name"], method["scope"]["form"], "beta 0.10", "steps 120"]
    wanted += [words.label(probe.attack) for probe in made.probes] + [p.caveat for p in made.probes]
    wanted += [words.with_interval(p.recovery, words.percent) for p in made.probes if p.recovery]
    wanted += [p.why for p in made.probes] + [p.curve_label for p in made.probes]
    for m in made.metrics:
        wanted += [words.label(m.metric), m.rows, m.sentence, m.ideal, str(m.n), words.DIRECTIONS[m.direction], m.flag]
        wanted += [words.with_interval(interval) for interval in (m.before, m.after, m.gold)]
    for effect in made.side_effects:
        wanted += [words.label(effect.name), effect.sentence, str(effect.n)]
        wanted += [words.percent(v) for v in (effect.before, effect.after, effect.gold)]
        wanted += [words.with_interval(Interval(effect.low, effect.after, effect.high), words.percent)]
        wanted += [words.points(effect.after - effect.before), "beyond ±5" if effect.raised else "within ±"]
    for row in made.examples:
        wanted += [row[key] for key in ("row", "question", "answer", "set", "before", "after", "gold")]
    for case in made.self_test.cases:
        wanted += [case["model"], words.verdict_words(case["verdict"]).title]
    wanted += [f"{words.in_sentence(name)} {words.number(value)}" for name, value in made.self_test.auc.items()]
    wanted += [*made.limits, *made.warnings, made.verdict.because, made.verdict.verdict]
    wanted += ["arXiv:2404.05868", "intention removal", "known weaknesses relearning, quantisation_4bit"]
    wanted += [words.with_interval(made.verdict.groups["black_box"], words.percent)]
    wanted += ["41 s", "182\u202f400", "3.1 TFLOP", "412 MB", *map(str, made.environment.values())]
    wanted += ["samples 32", "tau", "0.20", "schema"]
    text = page.text + " ".join(str(a.get("aria-label")) for _, a in page.tags)
    squeezed = re.sub(r"\s+", "", text).lower()
    missing = [w for w in wanted if re.sub(r"\s+", "", w).lower() not in squeezed]
    assert not missing


def test_what_lies_behind_wrong_answers_is_shown_where_a_probe_tells(tmp_path: Path) -> None:
    made = evidence("suppressed")
    made.knowing = [Knowing("after", 40, 0.05, 0.7, 0.25, 0.91), Knowing("gold/0", 40, 0.025, 0.1, 0.875, 0.94)]
    page, summary, paths = written(made, tmp_path)
    assert "| after | 5% | 70% | 25% | 40 | 91% |" in summary
    assert "| gold 0 |" in summary
    assert "Ignorance or error, gold 0" in page.text
    assert Evidence.load(paths["evidence.json"]).knowing == made.knowing
    page, summary, _ = written(evidence("suppressed"), tmp_path / "without")
    assert "Ignorance or error" not in summary + page.text


def test_a_mixture_shows_which_experts_are_still_taken_and_a_dense_model_does_not(tmp_path: Path) -> None:
    made = evidence("suppressed", experts=True)
    made.method["prepared"] = {
        "experts": [{"block": 5, "expert": 61, "affinity": 0.0412}],
        "affinity": {str(block): [0.001 * i for i in range(64)] for block in range(2, 12)},
    }
    page, summary, paths = written(made, tmp_path)
    for wanted in ("Same experts as before", "82% (78 to 86%)", "68% in block 11", "1,912 tokens of 40 rows"):
        assert wanted.replace(",", " ") in page.text
    forget, retain = (line for line in summary.split("\n") if " tokens | " in line)
    for wanted in ("82% (78 to 86%)", "68% in block 11", "12% → 97% of tokens take an expert that moved in block 5"):
        assert wanted in forget
        assert wanted in page.text
    assert "150 rows of 200" in retain
    assert "By block: 2: 100%, 3: 100%, 4: 100%, 5: 80%" in page.text
    assert "block 5, expert 61, affinity 0.041" in page.text
    assert "640 figures, in evidence.json" in page.text
    assert Evidence.load(paths["evidence.json"]).routing == made.routing
    page, summary, paths = written(evidence("suppressed"), tmp_path)
    assert "xperts" not in page.text + summary
    old = json.loads(paths["evidence.json"].read_text())
    del old["routing"]
    paths["evidence.json"].write_text(json.dumps(old))
    assert Evidence.load(paths["evidence.json"]).routing == []


def test_what_a_model_wrote_is_shown_and_never_run(tmp_path: Path) -> None:
    made = evidence("suppressed")
    made.request["name"] = made.request["reason"] = HOSTILE
    made.verdict.because = made.limits[0] = made.warnings[0] = HOSTILE
    made.models[0]["name"] = made.metrics[0].sentence = made.metrics[0].rows = made.probes[3].attack = HOSTILE
    made.probes[4].curve_label = made.probes[4].caveat = made.side_effects[0].name = made.verdict.flags = [HOSTILE][0]
    made.verdict.flags = [HOSTILE]
    made.verdict.by = ["relearning", HOSTILE]
    made.method["settings"] = {HOSTILE: HOSTILE}
    made.self_test.cases[0]["model"] = HOSTILE
    made.cost[HOSTILE] = {"seconds": 1.0}
    for row in made.examples:
        row |= dict.fromkeys(row, HOSTILE)
    for runs in made.runs.values():
        for run in runs:
            run.note = HOSTILE
            for item in run.items:
                item.text = item.entity = item.row = HOSTILE
    page, summary, paths = written(made, tmp_path)
    assert not page.wrong
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert "<script>" in page.text
    assert "<" not in summary
    assert all(line.count("|") - line.count("\\|") == 8 for line in summary.split("\n") if "how sure" in line.lower())
    made.runs = {}
    other = dataclasses.replace(made)
    compared = compare.write([made, other], tmp_path, [HOSTILE, "b"])
    page = Page(compared["compare.html"].read_text())
    assert not page.wrong
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert "<" not in compared["compare.md"].read_text()
    assert Evidence.load(paths["evidence.json"]).request["name"] == HOSTILE


def test_the_summary_for_a_model_card_quotes_no_row(tmp_path: Path) -> None:
    made = evidence("not_forgotten")
    _, summary, _ = written(made, tmp_path)
    for row in made.examples:
        assert row["question"] not in summary
        assert row["before"] not in summary


def test_a_table_in_the_summary_has_the_same_number_of_columns_in_every_row(tmp_path: Path) -> None:
    _, summary, _ = written(evidence("suppressed", damage=0.1), tmp_path)
    tables = [block.strip().split("\n") for block in summary.split("\n\n") if block.strip().startswith("|")]
    assert len(tables) == 4
    _, summary, _ = written(evidence("suppressed", experts=True), tmp_path)
    tables += [block.strip().split("\n") for block in summary.split("\n\n") if block.strip().startswith("|")]
    assert len(tables) == 9
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, lines


def test_missing_measurements_are_words(tmp_path: Path) -> None:
    made = evidence("inconclusive", gold=0, skipped=True)
    made.self_test, made.metrics, made.side_effects, made.examples, made.limits, made.cost = None, [], [], [], [], {}
    made.metrics = [Measured("perplexity", "retain", None, Interval(math.nan, 3.2, math.nan), None, 9, "lower", "", "")]
    made.probes[1].recovery = Interval(math.nan, math.nan, math.nan)
    page, summary, _ = written(made, tmp_path)
    assert not page.wrong
    for wanted in ("not measured", "not run", "none was given", "No side effect was measured", "skipped: the request"):
        assert wanted in page.text
    assert "none measured" in summary
    assert "nan" not in (page.text + summary).lower().split()


def test_evidence_without_a_single_probe_still_makes_a_report(tmp_path: Path) -> None:
    made = evidence("inconclusive")
    made.probes, made.runs = [], {}
    page, _, _ = written(made, tmp_path)
    assert "No attack gave a usable measurement" in page.text


def test_without_gold_no_judgement_says_removed(tmp_path: Path) -> None:
    _, summary, paths = written(evidence("no_recovery_found"), tmp_path)
    judged = paths["report.html"].read_text().split('class="facts"')[0]
    assert "no recovery found" in judged.lower()
    assert "removed" not in re.sub("<style>.*</style>", "", judged, flags=re.DOTALL).lower()
    assert "removed" not in summary.split("| | |")[0].lower()


def test_evidence_read_back_makes_the_same_page(tmp_path: Path) -> None:
    made = evidence("inconclusive", skipped=True)
    first = report.write(made, tmp_path / "a")
    second = report.write(Evidence.load(first["evidence.json"]), tmp_path / "b")
    for name in first:
        assert first[name].read_text() == second[name].read_text()


def test_a_place_that_cannot_be_written_is_an_error_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        report.write(evidence(), tmp_path / "file" / "out")


def test_the_interval_of_a_side_effect_may_be_of_the_value_or_of_the_change() -> None:
    effect = evidence().side_effects[0]
    effect.before, effect.after = 0.9, 0.8
    for effect.low, effect.high in ((0.75, 0.85), (-0.15, -0.05)):
        interval = page_content.effect_interval(effect)
        assert (interval.low, interval.value, interval.high) == pytest.approx((0.75, 0.8, 0.85))
    effect.low = None
    assert page_content.effect_interval(effect) is None


# Sentences and figures


def test_what_brings_it_back_is_the_verdicts_probes_or_the_strongest_one() -> None:
    made = evidence("suppressed")
    assert worst(made).attack == "relearning"
    assert headline(made) == "Suppressed, not removed"
    assert "4 relearning steps; gold does not get there" in speed(made.probes[4])
    assert speed(made.probes[0]) == ""
    assert speed(evidence("removed_under_tested_attacks").probes[4]).startswith("It stays below half")
    told = next(probe for probe in made.probes if probe.group == "reintroduce")
    told.informative, told.recovery = True, Interval(2, 2, 2)
    assert worst(made).attack == "relearning"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.05, "0.05"),
        (0.0432, "0.043"),
        (0.4312, "0.43"),
        (12.345, "12.3"),
        (1234.5, "1234"),
        (2.3e-9, "2.3×10⁻⁹"),
        (-8.6, "−8.60"),
        (math.nan, "not measured"),
        (math.inf, "not measured"),
        (None, "not measured"),
    ],
)
def test_figures_have_as_many_digits_as_mean_something(value: float | None, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.431, "43%"),
        (0.004, "0.4%"),
        (0.0, "0%"),
        (-0.0001, "0%"),
        (1.02, "102%"),
        (-0.02, "−2%"),
        (None, "not measured"),
    ],
)
def test_shares_are_percentages(value: float | None, text: str) -> None:
    assert words.percent(value) == text


def test_quantities_have_two_digits_and_a_decimal_prefix() -> None:
    counts = (0, 999, 999.6, 1500, 9.96e3, 3.21e9, 999.7e9, 4.2e18, -1500)
    written = ["0 B", "999 B", "1.0 kB", "1.5 kB", "10 kB", "3.2 GB", "1.0 TB", "4200 PB", "-1.5 kB"]
    assert [words.size(count) for count in counts] == written
    assert words.size(float("nan")) == "not measured"


def test_units_follow_the_name_of_the_quantity() -> None:
    assert words.plain(90.0, "seconds") == "90 s"
    assert words.plain(4e8, "peak_memory_bytes") == "400 MB"
    assert words.plain({"a": {"b": None}}) == "a b not measured"
    assert words.plain(fingerprint("x")) == fingerprint("x")[:12] + "…"
    assert words.label("quantisation_8bit") == "Quantisation 8-bit"
    assert words.in_sentence("mia_zlib") == "MIA zlib"


def test_text_for_markdown_cannot_leave_its_cell() -> None:
    assert markdown("a|b\nc <i>") == "a\\|b c &lt;i&gt;"
    assert markdown("logit_lens") == "logit_lens"


# Pictures


def test_marks_lie_where_their_values_are_and_never_outside() -> None:
    assert tracks.position(0.25, (0, 1)) == "25.00%"
    assert tracks.position(7, (0, 1)) == "100.00%"
    assert tracks.position(0, (-1, 1)) == "50.00%"


def test_recovery_is_back_only_when_its_whole_interval_is_beyond_the_threshold() -> None:
    assert tracks.state(Interval(0.21, 0.5, 0.9), 0.2) == "back"
    assert tracks.state(Interval(0.1, 0.5, 0.9), 0.2) == "open"
    assert tracks.state(Interval(-0.1, 0.1, 0.2), 0.2) == "held"
    assert tracks.state(Interval(math.nan, 0.1, math.nan), 0.2) == "open"


def test_labels_of_lines_that_end_together_do_not_overlap() -> None:
    placed = charts.spread([50, 50, 52, 99], 14, 0, 100)
    assert placed == sorted(placed)
    assert all(b - a >= 14 - 1e-9 for a, b in itertools.pairwise(placed))
    assert max(placed) <= 100


def test_budgets_that_double_are_drawn_at_equal_distances() -> None:
    place = charts.x_scale([1, 2, 4, 8, 16], 0, 100)
    steps = [place(b) - place(a) for a, b in zip([3, 7, 15], [7, 15, 31])]
    assert steps == pytest.approx([steps[0]] * 3)
    assert charts.x_scale([0, 1, 2, 3], 0, 30)(2) == pytest.approx(20)
    assert charts.x_scale([4], 0, 30)(4) == 15


# Comparison


def runs() -> list[Evidence]:
    return [
        evidence("suppressed", method="npo", damage=0.03),
        evidence("not_forgotten", method="idk", damage=0.01),
        evidence("suppressed", method="grad_diff", damage=0.14, flags=("neighbour_damage",)),
        evidence("removed_under_tested_attacks", method="distil", damage=0.06),
    ]


def test_runs_side_by_side(tmp_path: Path) -> None:
    paths = compare.write(runs(), tmp_path)
    assert set(paths) == {"compare.html", "compare.md", "compare.json"}
    page = Page(paths["compare.html"].read_text())
    assert not page.wrong
    assert not page.open
    assert not re.search(r"https?:|\bnan\b|\bNone\b", paths["compare.html"].read_text())
    for wanted in (
        "npo",
        "Suppressed, not removed",
        "neighbours damaged",
        "84% (77 to 91%)",
        "−14 points",
        "96%",
        "2 min",
    ):
        assert wanted in page.text
        assert wanted in paths["compare.md"].read_text()
    read = json.loads(paths["compare.json"].read_text())
    assert [run["on_frontier"] for run in read["runs"]] == [True, True, False, True]
    first = read["runs"][0]
    assert first["worst_probe"] == "relearning"
    assert first["worst_recovery"] == pytest.approx([0.77, 0.84, 0.91])
    assert first["direct_recovery"] == pytest.approx(0.02)
    assert first["retain_change"] == pytest.approx(-0.03)
    assert first["utility_kept"] == pytest.approx((0.81 - 1.2 * 0.03) / 0.81)
    assert read["differences"] == []


def test_the_frontier_is_what_nothing_else_beats_in_both_directions() -> None:
    places = [(0.9, 0.2), (0.8, 0.9), (0.8, 0.5), (0.95, 0.1), (0.8, 0.9), (math.nan, 1.0), (1.0, math.nan)]
    assert compare.pareto(places) == [True, True, False, True, True, False, False]
    assert compare.pareto([]) == []
    assert compare.pareto([(0.1, 0.1)]) == [True]


def test_what_is_not_measured_keeps_a_run_off_the_plot_but_in_the_table(tmp_path: Path) -> None:
    blind = evidence("inconclusive", method="npo")
    blind.metrics, blind.side_effects = [], []
    entry = compare.entries([blind])[0]
    assert math.isnan(entry.utility)
    assert not entry.best
    paths = compare.write([blind], tmp_path)
    page = Page(paths["compare.html"].read_text())
    assert "not measured" in page.text
    assert "Forgetting against usefulness" not in page.text
    assert json.loads(paths["compare.json"].read_text())["runs"][0]["utility_kept"] is None


def test_utility_without_its_metric_comes_from_the_retained_side_effects() -> None:
    made = evidence("suppressed", damage=0.095)
    made.metrics = [m for m in made.metrics if m.metric != "model_utility"]
    effects = [e for e in made.side_effects if e.flag == "damaged"]
    assert compare.entries([made])[0].utility == pytest.approx(sum(e.after / e.before for e in effects) / len(effects))


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda e: e.models[0].update(fingerprint=fingerprint("other")), "base model"),
        (lambda e: e.request["fingerprints"].update(forget=fingerprint("other rows")), "forget rows"),
        (lambda e: e.models.pop(), "gold models"),
        (lambda e: e.runs["after"][4].settings.update(steps=8), "settings of relearning"),
        (lambda e: e.verdict.thresholds.update(tau=0.5), "thresholds"),
    ],
)
def test_runs_that_answer_different_questions_are_not_compared_unless_told(spoil, word: str, tmp_path: Path) -> None:
    one, other = evidence(method="npo"), evidence(method="idk")
    other.runs = {
        role: [dataclasses.replace(run, settings=dict(run.settings)) for run in r] for role, r in other.runs.items()
    }
    spoil(other)
    with pytest.raises(MismatchError, match=f"{word} \\(npo: .*idk: "):
        compare.write([one, other], tmp_path)
    assert not list(tmp_path.iterdir())
    paths = compare.write([one, other], tmp_path, allow_mismatch=True)
    page = Page(paths["compare.html"].read_text())
    assert "not answers to one question" in page.text
    assert word in page.text
    assert word in paths["compare.md"].read_text()


def test_runs_without_fingerprints_are_told_apart_by_the_rows_they_were_asked() -> None:
    one, other = evidence(), evidence()
    for made in (one, other):
        del made.request["fingerprints"]
    assert compare.differences([one, other]) == []
    for item in other.runs["after"][0].items:
        item.row = "x" + item.row
    assert [d.split(" (")[0] for d in compare.differences([one, other])] == ["forget rows"]


def test_runs_of_one_method_get_names_of_their_own() -> None:
    assert compare.run_names([evidence(), evidence(), evidence(method="idk")]) == ["npo (1)", "npo (2)", "idk"]
    with pytest.raises(MismatchError, match="2 runs were given with 1 names"):
        compare.run_names([evidence(), evidence()], ["a"])


def test_the_table_for_the_terminal_has_a_row_per_run() -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    made = compare.table(runs(), ["a", "[red]b", "c", "d"])
    console.print(made)
    text = console.export_text()
    assert made.row_count == 4
    assert "★ [red]b" in text
    assert "Suppressed, not removed" in text
    assert "84% (77 to 91%)" in text
