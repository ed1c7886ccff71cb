"""Bytes in memory during a program, on programs whose answer can be counted by hand."""

from __future__ import annotations

from galvatron_jax.partition.counts import NONE, Tally
from galvatron_jax.partition.liveness import Where, peaks

X, A, B, C, D = (0, 0), (1, 0), (2, 0), (3, 0), (4, 0)


def step(read: tuple, made: tuple, size: float, place: Where) -> Tally:
    return Tally(read=read, made=((made, size, True),), fused=place is Where.FUSED, moved=NONE, place=place)


def peak(*tallies: Tally, handed_on: frozenset = frozenset()) -> float:
    return max(stays + grows for stays, grows in peaks(tallies, handed_on))


def test_a_product_needs_its_operands_beside_its_result() -> None:
    assert peak(step((X,), A, 8, Where.WHOLE), step((A,), B, 2, Where.WHOLE), step((B,), C, 1, Where.WHOLE)) == 10


def test_elementwise_work_is_done_in_the_one_that_reads_it() -> None:
    wide = step((A,), B, 16, Where.FUSED)
    assert peak(step((X,), A, 8, Where.WHOLE), wide, step((B,), C, 1, Where.REDUCED)) == 9


def test_what_several_read_is_done_again_where_that_reads_no_more_than_it_makes() -> None:
    start, widened = step((X,), A, 8, Where.WHOLE), step((A,), B, 16, Where.FUSED)
    readers = step((B,), C, 1, Where.REDUCED), step((B, C), D, 1, Where.REDUCED)
    assert peak(start, widened, *readers) == 10
    two = step((X,), A, 8, Where.WHOLE), step((X,), (5, 0), 8, Where.WHOLE), step((A, (5, 0)), B, 9, Where.FUSED)
    # Both summands would have to stay: the sum is kept instead, made just before it is first read.
    assert peak(*two, *readers) == 8 + 8 + 9


def test_what_a_product_reads_is_in_memory() -> None:
    assert peak(step((X,), A, 16, Where.FUSED), step((A,), B, 1, Where.WHOLE)) == 17


def test_what_is_converted_for_a_product_is_gone_before_its_result_is_there() -> None:
    start, narrowed = step((X,), A, 16, Where.WHOLE), step((A,), B, 4, Where.FUSED)
    assert peak(start, narrowed, step((B,), C, 8, Where.WHOLE)) == 16 + 4
    assert peak(start, narrowed, step((A, B), C, 8, Where.WHOLE)) == 16 + 4 + 8


def test_a_result_takes_the_place_of_an_operand_of_its_size_that_dies() -> None:
    start, end = step((X,), A, 8, Where.WHOLE), step((B,), C, 1, Where.WHOLE)
    assert peak(start, step((A,), B, 8, Where.IN_PLACE), end) == 9
    assert peak(start, step((A,), B, 8, Where.IN_PLACE), step((A, B), C, 1, Where.WHOLE)) == 17
    assert peak(start, step((A,), B, 8, Where.WHOLE), end) == 16


def test_what_is_seen_otherwise_is_there_once() -> None:
    assert peak(step((X,), A, 8, Where.WHOLE), step((A,), B, 8, Where.SEEN), step((B,), C, 1, Where.WHOLE)) == 9


def test_what_is_handed_on_stays_to_the_end() -> None:
    tallies = step((X,), A, 8, Where.WHOLE), step((X,), B, 4, Where.WHOLE)
    assert peak(*tallies) == 8
    assert peak(*tallies, handed_on=frozenset([A])) == 12


def test_a_loop_adds_what_its_body_needs() -> None:
    loop = step((A,), B, 1, Where.WHOLE)._replace(inner_peaks=((3.0, 20.0),))
    assert peak(step((X,), A, 8, Where.WHOLE), loop) == 8 + 23


def test_elementwise_work_brings_what_it_reads_into_one_order_of_dims() -> None:
    turned = step((A,), (6, 0), 8, Where.TURNED)
    start = step((X,), A, 8, Where.WHOLE), turned, step((X,), B, 4, Where.WHOLE), step((B,), C, 8, Where.FUSED)
    both, end = step(((6, 0), C), D, 8, Where.FUSED), step((D,), (7, 0), 1, Where.REDUCED)
    assert peak(*start, both, end) == 8 + 4 + 8
    seen = start[0], turned._replace(place=Where.SEEN), *start[2:]
    assert peak(*seen, both, end) == 8 + 4 + 1
    # What is in memory already is copied, and then gone.
    plain = start[:2], step((X,), B, 8, Where.WHOLE), step(((6, 0), B), D, 8, Where.FUSED)
    assert peak(*plain[0], *plain[1:], end) == 8 + 8 + 8


def test_what_is_turned_twice_is_as_it_was() -> None:
    back = step((A,), (6, 0), 8, Where.TURNED), step(((6, 0),), (5, 0), 8, Where.TURNED)
    start = step((X,), A, 8, Where.WHOLE), *back, step((X,), B, 8, Where.WHOLE)
    assert peak(*start, step(((5, 0), B), D, 8, Where.FUSED), step((D,), C, 1, Where.REDUCED)) == 8 + 8 + 1


def test_what_is_done_at_once_does_not_wait_for_its_reader() -> None:
    made, widened = step((X,), A, 4, Where.WHOLE), step((A,), B, 8, Where.FUSED)
    between = step((X,), C, 16, Where.WHOLE), step((C,), (5, 0), 1, Where.WHOLE)
    program = made, widened, *between, step((B,), D, 1, Where.WHOLE)
    assert peak(*program) == 4 + 16 + 1
    assert max(grows for _, grows in peaks(program, at_once=frozenset([B]))) == 8 + 16 + 1
