"""What the output filter withholds and what it lets pass."""

import pytest

from expunge.errors import ParameterError
from expunge.methods.guard.case import GuardCase
from expunge.methods.guard.forbidden import Forbidden, answers
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
