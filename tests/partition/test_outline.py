"""What is found of a program once holds for all that differ from it in sizes alone."""

from __future__ import annotations

import random

from galvatron_jax.partition.counts import NONE, Tally, largest
from galvatron_jax.partition.liveness import Lifetimes, Named, Where, peaks
from galvatron_jax.partition.outline import Outlines

SIZES = (1.0, 2.0, 3.0, 8.0)


def program(rng: random.Random, length: int) -> list[Tally]:
    """Each instruction reads some of what was made before."""
    tallies = []
    for index in range(1, length + 1):
        read = tuple((value, 0) for value in rng.sample(range(index), min(index, rng.randint(1, 3))))
        place = rng.choice([*Where, Where.FUSED, Where.FUSED])
        if place in (Where.SEEN, Where.TURNED):
            read = read[:1]
        made = (((index, 0), 1.0, False),)
        tallies.append(Tally(read, made, place is Where.FUSED, NONE, place=place))
    return tallies


def sized(rng: random.Random, tallies: list[Tally]) -> list[Tally]:
    """The same at other sizes."""
    return [
        tally._replace(made=tuple((version, rng.choice(SIZES), rng.random() < 0.5) for version, _, _ in tally.made))
        for tally in tallies
    ]


def test_lifetimes_found_at_some_sizes_hold_at_others() -> None:
    rng, seen = random.Random(0), 0
    for _ in range(40):
        tallies, known = program(rng, rng.randint(2, 14)), Lifetimes()
        staying = frozenset({(rng.randint(1, len(tallies)), 0)})
        for _ in range(12):
            again = sized(rng, tallies)
            named = Named(again, staying, frozenset({(1, 0)}))
            found = largest(known.peaks(again, lambda named=named: named))
            assert found == largest(peaks(again, staying, frozenset({(1, 0)})))
            seen += len(found) > 0
    assert seen > 400


def test_programs_are_told_apart_by_all_but_sizes() -> None:
    rng, outlines = random.Random(1), Outlines()
    tallies = program(rng, 8)
    number = outlines.number(tallies)
    assert outlines.number(sized(rng, tallies)) == number
    assert outlines.number([]) == 0 != number
    last = tallies[-1]
    for other in (
        last._replace(read=((0, 1),)),
        last._replace(made=(((9, 0), 1.0, False),)),
        last._replace(fused=not last.fused),
        last._replace(place=Where.IN_PLACE if last.place is not Where.IN_PLACE else Where.WHOLE),
        last._replace(inner_peaks=((1.0, 0.0),)),
    ):
        assert outlines.number([*tallies[:-1], other]) != number


def test_traffic_known_from_one_program_is_that_of_another_one() -> None:
    rng, outlines = random.Random(2), Outlines()
    for _ in range(20):
        tallies = program(rng, 10)
        for _ in range(4):
            again = sized(rng, tallies)
            forms = (outlines.number(again),)
            assert outlines.traffic(again, forms) == Outlines().traffic(again, forms)
