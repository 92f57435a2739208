from typing import NamedTuple

import pytest

from routing_jax.kernels.choice import choose


class Kernel(NamedTuple):
    name: str
    reason: str | None


FAST, PLAIN = Kernel("fast", "head dim 100 is not a multiple of 8"), Kernel("plain", None)


def choice(wanted, *kernels):
    return choose(wanted, kernels, lambda kernel: kernel.reason)


def test_the_first_that_can_is_taken_in_order():
    assert choice(None, FAST, PLAIN) is PLAIN
    assert choice(None, PLAIN, Kernel("slow", None)) is PLAIN
    assert choice("plain", FAST, PLAIN) is PLAIN


def test_a_named_one_that_cannot_says_why_and_what_can():
    with pytest.raises(NotImplementedError, match=r"'fast' cannot .*: head dim 100 .*; plain can"):
        choice("fast", FAST, PLAIN)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"None or one of \['fast', 'plain'\]; it is 'xlaa'"):
        choice("xlaa", FAST, PLAIN)
