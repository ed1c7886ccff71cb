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
    # Both summands would have to stay: the sum is kept instead, made when it is first read.
    assert peak(*two, *readers) == 8 + 8 + 9 + 1


def test_what_a_product_reads_is_in_memory() -> None:
    assert peak(step((X,), A, 16, Where.FUSED), step((A,), B, 1, Where.WHOLE)) == 17


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
