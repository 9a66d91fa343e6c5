"""``everyrank.exact``: loops of other libraries see each sample once, killed and resumed at another world size."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

import everyrank
from conftest import RunCli, nightly
from everyrank.errors import DataError

LOOPS = str(Path(__file__).parent / "programs" / "loops.py")
_IMPORTS = {"plain": "torch", "accelerate": "accelerate", "fabric": "lightning.fabric"}
DATA = TensorDataset(torch.arange(23.0))


def seen(folder: Path) -> list[collections.Counter[int]]:
    """How often each sample was trained on, by epoch."""
    counts: list[collections.Counter[int]] = [collections.Counter(), collections.Counter()]
    for path in folder.glob("samples-*.txt"):
        for line in path.read_text().splitlines():
            epoch, sample = line.split()
            counts[int(epoch)][int(sample)] += 1
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "kind"),
    [
        *((library, "exact") for library in ("plain", "accelerate")),
        ("plain", "alone"),
        nightly("fabric", "exact"),
        *(nightly(library, "alone") for library in ("accelerate", "fabric")),
    ],
)
def test_killed_and_resumed_at_another_world_size_each_sample_once(
    run_cli: RunCli, tmp_path: Path, library: str, kind: str
) -> None:
    """And what the library does alone, seen by the same eyes."""
    loop, no_gpu = (LOOPS, library, kind), {"CUDA_VISIBLE_DEVICES": ""}
    once_for_all_ranks = f"+app.preload=[{_IMPORTS[library]}]"
    killed = run_cli(once_for_all_ranks, "-n", "2", "--", *loop, "4", str(tmp_path), env=no_gpu)
    assert killed.returncode == 1, killed.stderr
    resumed = run_cli(once_for_all_ranks, "-n", "3", "--", *loop, "0", str(tmp_path), env=no_gpu)
    assert resumed.returncode == 0, resumed.stderr
    once = collections.Counter(range(23))
    if kind == "exact":
        assert seen(tmp_path) == [once, once]
    else:  # the epoch that was cut loses samples, the one after it is padded with some of its own
        cut, whole = seen(tmp_path)
        assert cut != once
        assert sum(cut.values()) + sum(whole.values()) != 2 * 23
        assert set(whole) == set(once)


def test_one_process_goes_through_epochs_by_itself() -> None:
    loader = everyrank.exact(DataLoader(DATA, batch_size=4, shuffle=True))
    epochs = [[int(x) for (batch,) in loader for x in batch] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(23))] * 2
    assert epochs[0] != epochs[1], "another order in each epoch, though nobody called set_epoch"
    assert (len(loader), loader.epoch) == (6, 2)


def test_the_cursor_is_what_was_yielded_whatever_workers_read_ahead() -> None:
    loader = everyrank.exact(DataLoader(DATA, batch_size=4, shuffle=True, num_workers=2), seed=3)
    first = []
    for number, (batch,) in enumerate(loader):
        first += batch.tolist()
        state = loader.state_dict()
        if number == 2:
            break
    rest = everyrank.exact(DataLoader(DATA, batch_size=4, shuffle=True), seed=3)
    rest.load_state_dict(state)
    assert sorted(first + [x for (batch,) in rest for x in batch.tolist()]) == list(range(23))


def test_an_epoch_that_is_done_is_not_begun_again_where_it_was_asked_for() -> None:
    loader = everyrank.exact(DataLoader(DATA, batch_size=23))
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert len(list(loader)) == 1
    loader.set_epoch(1)
    assert list(loader) == []


class _Stream(IterableDataset):
    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(range(3))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(_Stream()), "an iterable dataset, whose order is its own"),
        (DataLoader(DATA, batch_size=None), "without a batch size"),
        (DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 23, 23)), "the sampler WeightedRandomSampler"),
        (DataLoader(DATA, batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * 23, 23), 2, False)), "Weighted"),
        ([1, 2], "it takes a torch.utils.data.DataLoader"),
    ],
)
def test_an_order_that_is_not_ours_to_make_is_refused(loader: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        everyrank.exact(loader)
