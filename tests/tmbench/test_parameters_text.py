"""The text of a method's parameters reads back exactly, whatever they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmbench.results.parameters_text import parameters_text, parse_parameters

NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
VALUES = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(min_size=1)


@pytest.mark.slow
@given(st.dictionaries(NAMES, VALUES | st.sampled_from(["16", "16-", "0.5", "nan", "1e5", 'a"b', "a b", "a=b", "\n", "é"])))
def test_any_parameters_come_back_as_they_were(parameters):
    text = parameters_text(parameters)
    found = parse_parameters(text)
    assert list(found.items()) == list(parameters.items())
    assert [type(value) for value in found.values()] == [type(value) for value in parameters.values()]
    assert parameters_text(found) == text, "one text for each"


def test_how_it_reads():
    assert parameters_text({"layers": "16-", "n_init": 8, "gamma": 0.95}) == "layers=16- n_init=8 gamma=0.95"
    assert parameters_text({"layers": "7", "patterns": "my budgets:1f"}) == 'layers="7" patterns="my budgets:1f"'
    assert parameters_text({"dense_backend": ""}) == parameters_text({}) == ""
    assert dict(parse_parameters("")) == {}


@pytest.mark.parametrize(
    "text", ["a", "a=", "=1", "a=1 ", " a=1", "a=1  b=2", "a=1 a=1", 'a="', 'a="x', 'a="x"b', "1=2", "a=1;b=2 c"]
)
def test_what_is_no_text_of_parameters_is_refused(text):
    with pytest.raises(ValueError, match="which is no list of them"):
        parse_parameters(text)
