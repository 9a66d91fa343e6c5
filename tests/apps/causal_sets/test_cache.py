"""The cache: a pure function of its recipe, filled by all ranks together, and proof against damage and company."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everyrank
from everyrank.apps.causal_sets import cache, orders
from everyrank.apps.causal_sets.cache import SHARD_SIZE, cache_key, load_or_make, make_shard
from everyrank.apps.causal_sets.samples import COUNTS, KINDS, NO_DIMENSION, OTHERS, SPACETIMES, Recipe, draw_sample
from everyrank.errors import DataError

RECIPE = Recipe(
    min_size=5,
    max_size=12,
    dimensions=(2, 3),
    spacetimes=tuple(SPACETIMES),
    duration=2.0,
    others=OTHERS,
    others_fraction=0.3,
    seed=7,
)


def load(folder: Path, num_samples: int, recipe: Recipe = RECIPE) -> list[cache.Arrays]:
    return load_or_make(folder, recipe, num_samples, everyrank.current_world())


def assert_same(shards: list[cache.Arrays], others: list[cache.Arrays]) -> None:
    assert len(shards) == len(others)
    for shard, other in zip(shards, others, strict=True):
        assert shard.keys() == other.keys()
        for name, values in shard.items():
            np.testing.assert_array_equal(values, other[name])


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger("everyrank"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="everyrank"):
        yield caplog


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    assert draw_sample(RECIPE, 3).links.tolist() == draw_sample(RECIPE, 3).links.tolist()
    drawn = [draw_sample(RECIPE, index) for index in range(200)]
    assert len({sample.counts.tobytes() for sample in drawn}) > 150, "samples differ (small orders may coincide)"
    other = Recipe(**{**vars(RECIPE), "seed": 8})
    assert draw_sample(other, 3).counts.tolist() != draw_sample(RECIPE, 3).counts.tolist()
    shard, first_node, first_link = make_shard(RECIPE, 1), 0, 0
    for position in range(40):
        sample = draw_sample(RECIPE, SHARD_SIZE + position)
        num_nodes, num_links = shard["num_nodes"][position], shard["num_links"][position]
        np.testing.assert_array_equal(shard["counts"][first_node : first_node + num_nodes], sample.counts)
        np.testing.assert_array_equal(shard["links"][:, first_link : first_link + num_links], sample.links)
        assert shard["kind"][position] == sample.kind
        assert shard["dimension"][position] == sample.dimension
        assert shard["num_relations"][position] == sample.num_relations
        first_node, first_link = first_node + num_nodes, first_link + num_links


def test_kinds_and_sizes_are_drawn_as_the_recipe_says() -> None:
    drawn = [draw_sample(RECIPE, index) for index in range(3000)]
    kinds = np.array([KINDS[sample.kind] for sample in drawn])
    dimensions = np.array([sample.dimension for sample in drawn])
    shares = {**dict.fromkeys(SPACETIMES, 0.7 / 3), **dict.fromkeys(OTHERS, 0.3 / 5)}
    found = [(kinds == kind, share) for kind, share in shares.items()]
    found += [(dimensions == NO_DIMENSION, 0.3), (dimensions == 2, 0.35), (dimensions == 3, 0.35)]
    sizes = np.array([len(sample.counts) for sample in drawn])
    assert (sizes.min(), sizes.max()) == (5, 12)
    # Each n has the share of log n that lies between n and n + 1.
    found += [(sizes == n, np.log((n + 1) / n) / np.log(13 / 5)) for n in range(5, 13)]
    for rows, share in found:
        assert abs(rows.mean() - share) < 5 * np.sqrt(share * (1 - share) / len(drawn))
    assert ((dimensions == NO_DIMENSION) == np.isin(kinds, OTHERS)).all()
    fixed = Recipe(**{**vars(RECIPE), "min_size": 8, "max_size": 8})
    assert {len(draw_sample(fixed, index).counts) for index in range(20)} == {8}


def test_counts_are_those_of_the_order() -> None:
    sample = draw_sample(RECIPE, 5)
    size = len(sample.counts)
    links = np.zeros((size, size), dtype=bool)
    links[tuple(sample.links.astype(int))] = True
    causal = orders.transitive_closure(links)
    counted = dict(zip(COUNTS, sample.counts.T.tolist(), strict=True))
    assert counted["past"] == causal.sum(axis=0).tolist()
    assert counted["future"] == causal.sum(axis=1).tolist()
    assert counted["links_in"] == links.sum(axis=0).tolist()
    assert counted["links_out"] == links.sum(axis=1).tolist()
    assert counted["height"] == orders.heights(causal).tolist()
    assert counted["depth"] == orders.heights(causal.T).tolist()
    assert sample.num_relations == causal.sum()


def test_made_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load(tmp_path, 10)
    assert sorted(path.name for path in (tmp_path / cache_key(RECIPE)).iterdir()) == [
        "lock",
        "recipe.json",
        "shard-00000.safetensors",
    ]
    made = []
    monkeypatch.setattr(cache, "make_shard", lambda recipe, shard: made.append(shard) or make_shard(recipe, shard))
    assert_same(load(tmp_path, SHARD_SIZE), small)
    assert made == []
    larger = load(tmp_path, SHARD_SIZE + 1)
    assert_same(larger[:1], small)
    assert made == [1], "a larger set reuses the smaller"


def test_other_data_have_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting that changes a sample changes the key, and so does the generator's version."""
    changes: dict[str, object] = {
        "min_size": 6,
        "max_size": 13,
        "dimensions": (3, 2),
        "spacetimes": ("minkowski",),
        "duration": 1.5,
        "others": ("layered",),
        "others_fraction": 0.4,
        "seed": 8,
    }
    assert changes.keys() == vars(RECIPE).keys()
    keys = {cache_key(Recipe(**{**vars(RECIPE), name: value})) for name, value in changes.items()}
    keys.add(cache_key(RECIPE))
    monkeypatch.setattr(cache, "GENERATOR_VERSION", 0)
    keys.add(cache_key(RECIPE))
    assert len(keys) == len(changes) + 2


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "no safetensors file"])
def test_damaged_files_are_made_again(tmp_path: Path, damage: str, log: pytest.LogCaptureFixture) -> None:
    whole = load(tmp_path, 10)
    path = tmp_path / cache_key(RECIPE) / "shard-00000.safetensors"
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    harm = {"truncated": content[:-100], "one bit": flipped, "empty": b"", "no safetensors file": b"x" * 100}
    path.write_bytes(harm[damage])
    assert_same(load(tmp_path, 10), whole)
    assert path.read_bytes() == content, "whoever makes a shard makes the same bytes"
    assert len(log.messages) == 1
    assert "is damaged" in log.messages[0]
    assert str(path) in log.messages[0]


def test_three_ranks_share_the_work(tmp_path: Path) -> None:
    """They fill a common cache, each node of its own disk, and where one rank fails all of them end with its name."""

    def on_rank(folder: Path, recipe: Recipe) -> dict[str, Any]:
        import dataclasses

        from everyrank.apps.causal_sets import cache

        made: list[int] = []
        make = cache.make_shard
        cache.make_shard = lambda recipe, shard: made.append(shard) or make(recipe, shard)
        with everyrank.join(backend="gloo") as world:
            shared = cache.load_or_make(folder / "shared", recipe, 5 * cache.SHARD_SIZE, world)
            shared_made = list(made)
            made.clear()
            # As if each rank were a node with a disk of its own.
            node = dataclasses.replace(world, local_rank=0, local_world_size=1)
            own = cache.load_or_make(folder / f"node-{world.rank}", recipe, 2 * cache.SHARD_SIZE, node)
            own_made = list(made)
            blocked = folder / f"blocked-{world.rank}"
            if world.rank == 1:
                blocked.write_text("a file where the folder should be")
            try:
                cache.load_or_make(blocked, recipe, 1000, world)
                said = "nothing"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
        return {"shared_made": shared_made, "own_made": own_made, "said": said, "shared": shared, "own": own}

    results = everyrank.launch(on_rank, tmp_path, RECIPE, nproc_per_node=3)
    assert [result["shared_made"] for result in results] == [[0, 3], [1, 4], [2]]
    assert [sorted(result["own_made"]) for result in results] == [[0, 1]] * 3
    expected = [make_shard(RECIPE, shard) for shard in range(5)]
    for result in results:
        assert_same(result["shared"], expected)
        assert_same(result["own"], expected[:2])
        assert str(result["said"]).startswith("DataError")
        assert "rank 1: " in str(result["said"])
        assert "rank 0: " not in str(result["said"])
        assert "env.data_dir" in str(result["said"])
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")], "nothing half-written is left"


def _make_in_company(folder: Path, connection: multiprocessing.connection.Connection) -> None:
    made: list[int] = []

    def make(recipe: Recipe, shard: int) -> cache.Arrays:
        made.append(shard)
        connection.send(shard)
        return make_shard(recipe, shard)

    cache.make_shard = make
    load(folder, 2 * SHARD_SIZE)
    connection.send(made)


def test_two_runs_at_once_do_not_make_the_same_shard(tmp_path: Path) -> None:
    """This process has shard 0 in hand; another run makes shard 1 meanwhile, waits, and finds shard 0 done."""
    home = tmp_path / cache_key(RECIPE)
    home.mkdir()
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    with open(home / "lock", "a+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
        other = context.Process(target=_make_in_company, args=(tmp_path, there))
        other.start()
        assert here.poll(60)
        assert here.recv() == 1, "it goes on with what nobody has in hand"
        (tmp_path / "elsewhere").mkdir()
        load(tmp_path / "elsewhere", 1)
        done = tmp_path / "elsewhere" / cache_key(RECIPE) / "shard-00000.safetensors"
        done.rename(home / done.name)
    assert here.poll(60)
    assert here.recv() == [1]
    other.join(60)
    assert other.exitcode == 0


def test_an_unwritable_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"was to be written to .*Fix: set env\.data_dir"):
        load(tmp_path / "file" / "cache", 3)
