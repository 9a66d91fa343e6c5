"""What rank 0 may do alone, and what the others are told where it may not."""

from __future__ import annotations

from pathlib import Path

import alone
import pytest

import everyrank


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The test's result in one process."""
    trainer, test_loader = alone.make_trainer(tmp_path_factory.mktemp("one"))
    return trainer.run_test(test_loader).as_dict()


def test_rank_0_tests_alone_while_the_others_leave(tmp_path: Path, expected: dict[str, float]) -> None:
    found, *others = everyrank.launch(alone.as_the_documents_say, tmp_path, nproc_per_node=3)
    assert others == [None, None]
    assert found["num_samples"] == 53
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("where", ["rank0", "all"])
def test_called_on_all_ranks_each_gets_the_result(tmp_path: Path, where: str, expected: dict[str, float]) -> None:
    for results in everyrank.launch(alone.on_all_ranks, tmp_path, where, nproc_per_node=2):
        assert len(results) == 3
        for result in results:  # the sum is one of single precision
            assert result == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(("rank", "methods"), [(0, ("save_checkpoint", "validate")), (1, ("run_test", "validate"))])
def test_a_rank_that_has_left_is_named_at_once(tmp_path: Path, rank: int, methods: tuple[str, ...]) -> None:
    ends = everyrank.launch(alone.called_on, tmp_path, methods, rank, nproc_per_node=2)
    assert ends[1 - rank] == []
    assert len(ends[rank]) == 2
    for said in ends[rank]:
        assert f"rank {1 - rank}" in said
        assert "left" in said


@pytest.mark.parametrize("between_looks", [False, True])
def test_a_failure_reaches_those_who_wait_and_nothing_is_saved_without_a_group(
    tmp_path: Path, between_looks: bool
) -> None:
    first, second = everyrank.launch(alone.fails_and_leaves, tmp_path, between_looks, nproc_per_node=2)
    assert first[0] == "ZeroDivisionError: no loss"
    assert second[0] == "RankFailedError: rank 0 failed: ZeroDivisionError: no loss"
    for said in (first[1], second[1]):
        assert "has left the process group" in said
