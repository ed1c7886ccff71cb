"""Lists and ranges as people type them."""

import pytest

from galvatron_jax.cli.ranges import parse_counts, parse_memory, parse_schedules, parse_sweep
from galvatron_jax.errors import InputError
from galvatron_jax.search.sweeps import Quantity
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.units import GIB


def test_lists_are_sorted_and_ranges_hold_their_last_value():
    assert parse_counts("8, 2,8", option="x") == (2, 8)
    assert parse_counts("64:192:64", option="x") == (64, 128, 192)
    assert parse_counts("64:200:64", option="x") == (64, 128, 192)
    assert parse_counts("5:5:1", option="x") == (5,)
    assert parse_schedules("1f1b,gpipe,1f1b") == (Schedule.ONE_F_ONE_B, Schedule.GPIPE)


def test_sweeps_name_their_quantity():
    memory, links = parse_sweep(["memory=16GiB:24GiB:4GiB", "intra-bandwidth=x2,0.5"])
    assert memory.quantity is Quantity.MEMORY
    assert memory.values == (16 * GIB, 20 * GIB, 24 * GIB)
    assert links.values == (0.5, 2.0)
    (rates,) = parse_sweep(["inter-bandwidth=x0.5:x1:x0.1"])
    assert rates.values == pytest.approx((0.5, 0.6, 0.7, 0.8, 0.9, 1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("many", "--x: 'many' is no whole number."),
        ("0", "--x: 0 must be at least 1."),
        ("8,,16", "--x: '8,,16' has an empty part."),
        ("8:16", "--x: '8:16' is no range; write first:last:step, such as 16GiB:80GiB:8GiB."),
        ("16:8:2", "--x: the range '16:8:2' is empty; the first value must not exceed the last."),
        ("1:99999:1", "--x: the range '1:99999:1' has 99999 values; take a larger step, at most 1000."),
    ],
)
def test_what_is_no_list_is_refused(text, message):
    with pytest.raises(InputError) as caught:
        parse_counts(text, option="--x")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memroy=1GiB", "--sweep memroy=1GiB: cannot vary 'memroy'. Did you mean 'memory'?"),
        ("devices", "--sweep devices: no values; write for example devices=8,16,32."),
        ("memory=", "--sweep memory: no values; write for example memory=16GiB:80GiB:8GiB."),
        ("memory=lots", "--sweep memory: 'lots' is no size in bytes; write for example '20GiB', '512MiB' or '80GB'."),
        ("memory=0", "--sweep memory: '0' is no budget; it must be positive, such as '20GiB'."),
        ("inter-bandwidth=fast", "--sweep inter-bandwidth: 'fast' is no multiple; write for example x0.5, x1 or x2."),
        ("inter-bandwidth=x0", "--sweep inter-bandwidth: 'x0' is no multiple; write for example x0.5, x1 or x2."),
        ("inter-bandwidth=xinf", "--sweep inter-bandwidth: 'xinf' is no multiple; write for example x0.5, x1 or x2."),
        ("devices=2.5", "--sweep devices: '2.5' is no whole number."),
    ],
)
def test_what_is_no_sweep_is_refused(text, message):
    with pytest.raises(InputError) as caught:
        parse_sweep([text])
    assert str(caught.value) == message


def test_unknown_schedules_and_budgets_are_refused():
    with pytest.raises(InputError, match="--schedules: no schedule '1f2b' of pipelines. Did you mean '1f1b'"):
        parse_schedules("1f2b")
    with pytest.raises(InputError, match="--schedules: no schedule 'none' of pipelines"):
        parse_schedules("none")
    with pytest.raises(InputError, match="--memory: 'lots' is no size in bytes"):
        parse_memory("lots")
