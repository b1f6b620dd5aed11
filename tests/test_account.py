"""Accounts of a few entries, whose figures can be seen at a glance."""

import random

import pytest

from bench.measure.account import (
    CATEGORIES,
    GRADIENTS,
    INPUT,
    OUTSIDE,
    PARAMETERS,
    SAVED,
    TEMPORARY,
    WORKSPACE,
    Account,
    Change,
    ConvolutionCall,
    Mark,
    Moment,
    ReductionCall,
)


def change(storage, nbytes, category=TEMPORARY, module=OUTSIDE, operator="aten.relu"):
    return Change(storage, nbytes, category, module, operator)


CALLS = [ConvolutionCall("aten.convolution", "conv", 1000), ReductionCall("aten.sum", "conv", 10, 100, 4)]


def test_a_moment_is_split_by_what_is_named_the_largest_first():
    live = (
        change(0, 1, PARAMETERS, "a", ""), change(1, 2, SAVED, "a"), change(2, 4, SAVED, "b"), change(3, 8, SAVED, "a"),
    )  # fmt: skip
    moment = Moment(4, live)
    assert moment.nbytes == 15
    assert list(moment.split("category").items()) == [((SAVED,), 14), ((PARAMETERS,), 1)]
    assert list(moment.split("module", "category").items()) == [
        (("a", SAVED), 10), (("b", SAVED), 4), (("a", PARAMETERS), 1),
    ]  # fmt: skip
    assert moment.by_category() == dict.fromkeys(CATEGORIES, 0) | {PARAMETERS: 1, SAVED: 14}


def test_a_storage_counts_with_what_was_last_said_of_it():
    account = Account((change(0, 4), change(1, 8), change(0, 2, SAVED), *CALLS, change(1, 0), change(0, 3)))
    sizes = [account.moment(index).nbytes for index in range(len(account.entries) + 1)]
    assert sizes == [0, 4, 12, 10, 10, 10, 2, 3]
    assert set(account.moment(4).live) == {change(0, 2, SAVED), change(1, 8)}
    assert (account.peak.index, account.peak.nbytes) == (2, 12)


@pytest.mark.parametrize(
    ("entries", "index"),
    [
        pytest.param([change(0, 8), change(0, 8, SAVED)], 2, id="a-result-that-autograd-saves"),
        pytest.param([change(0, 8, WORKSPACE), change(0, 8, TEMPORARY)], 2, id="a-buffer-that-is-the-result"),
        pytest.param(
            [change(0, 8), change(1, 8), change(0, 8, SAVED), change(1, 8, GRADIENTS)], 4, id="the-last-of-several"
        ),
        pytest.param([change(0, 8), change(0, 8, SAVED), change(0, 8, TEMPORARY)], 2, id="not-what-it-stops-being"),
        pytest.param([change(0, 8, INPUT), change(0, 8, GRADIENTS)], 1, id="not-what-was-something-before"),
        pytest.param([change(0, 8), change(0, 8, TEMPORARY, "head")], 1, id="not-a-new-module-alone"),
        pytest.param([change(0, 8), change(0, 0), change(1, 8)], 1, id="not-another-as-large"),
        pytest.param([change(0, 8), change(1, 4), change(1, 0), change(0, 8, SAVED)], 2, id="not-a-lower-moment"),
    ],
)
def test_the_peak_is_where_each_storage_turned_out_to_be_something(entries, index):
    account = Account(tuple(entries))
    assert account.peak == account.moment(index)


def test_what_was_before_the_start_is_live_and_no_more():
    before = (change(0, 100), change(0, 0), change(1, 10, PARAMETERS), Mark("warm-up"))
    account = Account((*before, change(2, 5), change(1, 1, PARAMETERS), Mark("step")), start=len(before))
    assert account.peak.nbytes == 15
    assert account.peak.index == 5
    assert {name: phase.peak.nbytes for name, phase in account.phases.items()} == {"step": 15}
    assert [sum(sizes.values()) for sizes in account.curve()] == [10, 15, 6, 6]
    assert Account(before, start=len(before)).peak == account.moment(len(before))


def test_a_phase_is_all_its_stretches():
    account = Account((
        change(0, 4), change(1, 4), Mark("forward"),
        change(1, 0), Mark("backward"),
        change(1, 7), change(1, 1), Mark("forward"),
        change(0, 0), Mark("update"),
        change(2, 99),
    ))  # fmt: skip
    figures = {name: (phase.peak.index, phase.peak.nbytes, phase.end.nbytes) for name, phase in account.phases.items()}
    assert list(figures) == ["forward", "backward", "update"]
    assert figures["forward"] == (6, 11, 5)
    assert figures["backward"] == (3, 8, 4), "it begins with what the forward pass left"
    assert figures["update"] == (8, 5, 1)
    assert account.peak.nbytes == 100


def test_curve_and_peak_agree_with_each_moment():
    draw = random.Random(0)
    entries = [
        draw.choice([*CALLS, Mark("phase")]) if draw.random() < 0.1
        else change(draw.randrange(6), draw.choice([0, 1, 2, 4]), draw.choice(CATEGORIES))
        for _ in range(300)
    ]  # fmt: skip
    account = Account(tuple(entries), start=50)
    moments = [account.moment(index) for index in range(50, 301)]
    assert list(account.curve()) == [moment.by_category() for moment in moments]
    assert account.peak.nbytes == max(moment.nbytes for moment in moments)
    assert account.peak == account.moment(account.peak.index)
