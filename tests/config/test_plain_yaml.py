"""Whatever reads and writes YAML, the values are those of PyYAML's own reader."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from yaml import safe_load

from everyrank.config.plain_yaml import dump, load

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=90)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_VALUES)
def test_what_is_written_is_read_as_it_was(value: object) -> None:
    text = dump(value)
    assert load(text) == safe_load(text) == value


def test_keys_keep_their_order_and_text_stays_legible() -> None:
    assert dump({"b": "é", "a": [1, None]}) == "b: é\na:\n- 1\n- null\n"
