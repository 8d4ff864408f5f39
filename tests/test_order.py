"""What an epoch of an order holds, how it is shared, and that it depends on the step alone."""

import re
from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from assertions import global_generators_untouched
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, orders, rank_counts, seeds

from fresnet import FresnetError
from fresnet.data import Order, Place, batch_at, batches, steps_per_epoch
from fresnet.data.order import keyed_generator


def epoch(order: Order, number: int = 0) -> list[Place]:
    steps = steps_per_epoch(order)
    return list(chain.from_iterable(batches(order, number * steps, (number + 1) * steps)))


@examples(50)
@given(orders(), st.integers(0, 3))
def test_an_epoch_has_every_image_once(order: Order, number: int) -> None:
    places = epoch(order._replace(repeats=1), number)
    assert sorted(place.image for place in places) == list(range(order.size))


@examples(50)
@given(orders(), st.integers(0, 3))
def test_repeats_stand_in_a_row(order: Order, number: int) -> None:
    """The shuffle is the same as without repeats, and only the last image may have fewer."""
    places = epoch(order, number)
    shuffle = [place.image for place in epoch(order._replace(repeats=1), number)]
    expected = [image for image in shuffle for _ in range(order.repeats)][: order.size]
    assert [place.image for place in places] == expected
    assert [place.place for place in places] == list(range(order.size))
    assert {place.epoch for place in places} == {number}
    *whole, _ = Counter(place.image for place in places).values()
    assert set(whole) <= {order.repeats}


@examples(50)
@given(orders())
def test_batches_are_even_and_the_fewest(order: Order) -> None:
    steps = steps_per_epoch(order)
    sizes = [len(batch) for batch in batches(order, 0, steps)]
    assert (steps - 1) * order.batch < order.size
    assert max(sizes) <= order.batch
    assert sizes == [len(part) for part in torch.arange(order.size).tensor_split(steps)]


@examples(50)
@given(st.data(), orders())
def test_ranks_share_the_batch(data: st.DataObject, order: Order) -> None:
    ranks, step = data.draw(rank_counts(order)), data.draw(st.integers(0, 30))
    whole = batch_at(order, step)
    shares = [batch_at(order, step, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert list(chain.from_iterable(shares)) == whole
    split = torch.arange(len(whole)).tensor_split(ranks)
    assert [len(share) for share in shares] == [len(part) for part in split]


@examples(50)
@given(st.data(), orders())
def test_it_resumes_at_any_step(data: st.DataObject, order: Order) -> None:
    start = data.draw(st.integers(0, 20))
    stop = start + data.draw(st.integers(0, 20))
    ranks = data.draw(rank_counts(order))
    rank = data.draw(st.integers(0, ranks - 1))
    tail = list(batches(order, start, stop, rank=rank, ranks=ranks))
    assert tail == list(batches(order, 0, stop, rank=rank, ranks=ranks))[start:]
    assert tail == [batch_at(order, step, rank=rank, ranks=ranks) for step in range(start, stop)]


@examples(30)
@given(seeds, st.integers(0, 5))
def test_every_seed_and_epoch_has_its_own_shuffle(seed: int, number: int) -> None:
    """The shuffle of the next seed is not that of the next epoch either."""
    order = Order(100, 10, seed)
    shuffles = [
        epoch(order, number),
        epoch(order, number + 1),
        epoch(order._replace(seed=seed + 1)),
    ]
    assert len({tuple(place.image for place in shuffle) for shuffle in shuffles}) == 3
    assert epoch(order, number) == shuffles[0]


def test_numbers_of_the_same_digits_make_other_generators() -> None:
    """Seed 1 at epoch 23 is not seed 12 at epoch 3, nor seed 123."""
    keys = [(123,), (1, 23), (12, 3), (1, 2, 3), (3, 12), (-1, 23), (1, -23), (1, 230), (12, 30)]
    assert len({keyed_generator(*key).initial_seed() for key in keys}) == len(keys)
    assert epoch(Order(100, 10, seed=1), 23) != epoch(Order(100, 10, seed=12), 3)


def test_shuffles_are_uniform() -> None:
    """The six orders of three images are equally frequent, within four standard deviations."""
    counts = Counter(
        tuple(place.image for place in batch) for batch in batches(Order(3, 3, seed=0), 0, 6000)
    )
    assert len(counts) == 6
    assert all(abs(count - 1000) < 4 * (6000 * 5 / 36) ** 0.5 for count in counts.values())


def test_nothing_global_matters() -> None:
    order = Order(100, 10, seed=3)
    expected = epoch(order)
    with global_generators_untouched(), torch.device("meta"):
        assert epoch(order) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": Order(0, 1, 0)}, "an Order expects size to be an integer of at least 1; got 0"),
        ({"order": Order(1, 0, 0)}, "an Order expects batch to be an integer of at least 1; got 0"),
        ({"order": Order(1, 1, 0, -1)}, "an Order expects repeats to be an integer of at least 1"),
        ({"start": -1}, "batches expects 0 <= start <= stop; got -1 and 5"),
        ({"start": 6}, "batches expects 0 <= start <= stop; got 6 and 5"),
        ({"rank": 2, "ranks": 2}, "a rank from 0 to below ranks=2; got 2"),
        ({"rank": -1}, "a rank from 0 to below ranks=1; got -1"),
        ({"ranks": 4}, "an image for each of 4 ranks; 10 images in 3 batches make batches of 3"),
    ],
)
def test_bad_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FresnetError, match=re.escape(message)):
        batches(**{"order": Order(10, 4, 0), "start": 0, "stop": 5, **arguments})
