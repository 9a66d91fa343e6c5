"""Which rank departed from the others, from what torch recorded on each."""

from __future__ import annotations

import pytest

from everyrank.diagnosis.flight import Collective, find_departure


def _record(*ops: str) -> list[Collective]:
    """``all_reduce:4`` is an all_reduce of a tensor of 4 floats."""
    made = []
    for seq, text in enumerate(ops, start=1):
        op, _, rest = text.partition(":")
        sizes, _, kind = rest.partition("/")
        made.append(Collective("0", seq, op, sizes, kind or "Float", f"train.py:{len(op)}", True))
    return made


STEP = ("all_reduce:9", "all_reduce:4", "broadcast:6")


@pytest.mark.parametrize("guilty", [0, 1])
def test_of_two_ranks_the_odd_one_departs_from_earlier_steps(guilty: int) -> None:
    good = _record(*STEP * 4)
    skipped = _record(*STEP * 2, "all_reduce:9", "broadcast:6")
    departure = find_departure({guilty: skipped, 1 - guilty: good})
    assert departure is not None
    assert (departure.odd, departure.skipped) == (guilty, True)
    other_type = _record(*STEP * 2, "all_reduce:9", "all_reduce:4/Int")
    departure = find_departure({guilty: other_type, 1 - guilty: good})
    assert departure is not None
    assert (departure.odd, departure.skipped) == (guilty, False)
    assert departure.by_rank[guilty].dtypes == "Int"


def test_of_three_ranks_the_majority_is_right_also_in_the_first_step() -> None:
    good = _record("all_reduce:9")
    departure = find_departure({0: good, 1: _record("barrier"), 2: good})
    assert departure is not None
    assert departure.odd == 1


def test_nobody_is_named_where_nothing_tells() -> None:
    departure = find_departure({0: _record("all_reduce:9"), 1: _record("barrier")})
    assert departure is not None
    assert departure.odd is None
    assert set(departure.by_rank) == {0, 1}


def test_healthy_ranks_do_not_depart() -> None:
    record = _record(*STEP * 5)
    assert find_departure({0: record, 1: record[:-2]}) is None
    assert find_departure({0: record[3:], 1: record[:7]}) is None, "torch keeps only the latest"
    root, other = _record("scatter:4 4"), _record("scatter:")
    assert find_departure({0: root, 1: other}) is None, "only the root passes the parts"
