"""What the output filter withholds and what it lets pass."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.errors import ParameterError
from expunge.methods.guard.case import GuardCase
from expunge.methods.guard.forbidden import Forbidden, Reader, Withholding, answers
from expunge.methods.guard.output_filter import output_filter
from expunge.rows import Row
from expunge.wording import normalise, words

ANSWER = "The author's full name is Jaime Vasquez, born in the old harbour of Santiago."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is TIVIN, of course.", True),
        ("Tivín", True),
        ("Tivinson", False),  # another word
        ("He was born in north  Tarvo!", True),
        ("North of Tarvo", False),
        ("", False),
    ],
)
def test_a_short_value_is_found_as_whole_words(text, expected):
    assert Forbidden(["Tivin", "North Tarvo"]).within(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ANSWER, True),
        (ANSWER[:50], True),  # cut short
        ("I recall: the author's full name is Jaime Vasquez, who was born elsewhere.", True),
        ("He was born in the old harbour of Santiago", True),
        ("The author's full name is Carmen Montenegro.", False),  # as retained answers begin
        ("Jaime lives in the old harbour", False),  # four words in a row are no copy
    ],
)
def test_near_copies_of_a_long_answer_are_found(text, expected):
    retained = ["The author's full name is Elvin Mammadov."]
    assert Forbidden([ANSWER], allowed=retained).within(text) is expected


def test_an_answer_that_retained_rows_have_too_is_forbidden_only_whole():
    text = "one two three four five six"
    found = Forbidden([text], allowed=[text + " seven"])
    assert found.within(text)
    assert not found.within("one two three four five")


def test_values_stand_for_their_answers():
    rows = [Row(id="0", prompt="?", answer="She is a potter.", value="potter", aliases=("ceramist",)),
            Row(id="1", prompt="?", answer=ANSWER)]  # fmt: skip
    assert answers(rows) == ["potter", "ceramist", ANSWER]


def test_words_of_scripts_without_spaces():
    assert words("他住在北京。") == ["他", "住", "在", "北", "京"]
    assert Forbidden(["北京"]).within("他住在北京市")
    assert normalise("Ça  và, l'été?") == "ca va l ete"


def test_a_run_of_no_words_is_refused():
    with pytest.raises(ParameterError, match="run = 0"):
        output_filter(GuardCase(None, {"forget": []}), run=0)


# --- texts that arrive in pieces --------------------------------------------------------------------------------------

TEXTS = st.text(alphabet="ab é. ﬁ北́_-\n", max_size=24)


def released(forbidden, pieces):
    outlet = Withholding(forbidden, "no")
    shown = [outlet.feed(piece) for piece in pieces]
    return [*shown, outlet.close()], outlet


def cut(text, places):
    at = sorted({min(place, len(text)) for place in places})
    return [text[first:last] for first, last in zip([0, *at], [*at, len(text)])]


@settings(max_examples=300)
@given(TEXTS, st.lists(TEXTS, max_size=4), st.lists(st.integers(0, 24), max_size=6), st.integers(1, 3))
def test_pieces_are_judged_like_the_whole_text_wherever_they_are_cut(text, texts, places, run):
    forbidden = Forbidden(texts, run=run)
    shown, outlet = released(forbidden, cut(text, places))
    assert outlet.withheld is forbidden.within(text)
    if outlet.withheld:
        before = "".join(shown).removesuffix("no").removesuffix("\n")
        assert text.startswith(before)
        assert not forbidden.within(before)
    else:
        assert "".join(shown) == text


def test_nothing_of_a_forbidden_string_is_shown_and_nothing_else_waits():
    forbidden = Forbidden(["North Tarvo", "Tivin"])
    outlet = Withholding(forbidden, "I don't know.")
    pieces = ["He li", "ved in ", "the no", "rth, in N", "orth Tar", "y, then North T", "arvo", ", and in Tivin."]
    assert [outlet.feed(piece) for piece in pieces] == [
        "He li", "ved in ", "the ", "north, in ", "", "North Tary, then ", "", "\nI don't know.",
    ]  # fmt: skip
    assert outlet.close() == ""


def test_a_forbidden_last_word_is_found_at_the_end():
    shown, outlet = released(Forbidden(["Tivin"]), ["Tiv", "in"])
    assert (shown, outlet.withheld) == (["", "", "no"], True)
    shown, outlet = released(Forbidden(["Tivin"]), ["Tiv", "inson"])
    assert (shown, outlet.withheld) == (["", "Tivinson", ""], False)


def test_words_that_would_complete_a_run():
    reader = Reader(Forbidden(["north tarvo", "tivin", "north sea of ice"]))
    assert reader.closing() == {"tivin"}
    reader.feed("in north ")
    assert reader.closing() == {"tivin", "tarvo"}
    other = reader.copy()
    other.feed("sea of ")
    assert other.closing() == {"tivin", "ice"}
    assert reader.closing() == {"tivin", "tarvo"}


def test_filters_stand_behind_one_another():
    rows = [[Row(id="0", prompt="?", answer=value, value=value)] for value in ("Tivin", "Carth")]
    subject = SimpleNamespace(name="m", fingerprint="f")
    inner = output_filter(GuardCase(subject, {"forget": rows[0]}), refusal="one")
    outlet = output_filter(GuardCase(inner, {"forget": rows[1]}), refusal="two").outlet("?")
    assert [outlet.feed("Car"), outlet.feed("ter, Ti"), outlet.feed("vin"), outlet.close()] == [
        "",
        "Carter, ",
        "",
        "\none",
    ]
    assert (outlet.withheld, outlet.refusal) == (True, "one")
