"""PyTorch's threads are taken away for a while, and given back."""

from __future__ import annotations

import pytest
import torch

from fna.threads import one_thread


@pytest.fixture
def two_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("wanted", "threads"), [(True, 1), (False, 2)])
def test_within_there_is_one_if_that_is_wanted(wanted: bool, threads: int) -> None:
    with one_thread(wanted):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_they_come_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="wrong"), one_thread():
        raise ValueError("wrong")
    assert torch.get_num_threads() == 2
