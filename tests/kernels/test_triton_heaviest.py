"""The heaviest within a limit or up to one, and the largest by number, in Triton against sorting; interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sorted_choice(shares, limit):
    """The definition, one row at a time."""
    chosen = torch.zeros(shares.shape, dtype=torch.bool)
    for row, kept in zip(shares.flatten(0, -2).tolist(), chosen.flatten(0, -2), strict=True):
        held = 0.0
        for n in sorted(range(len(row)), key=lambda n: (-row[n], n)):
            held += row[n]
            if held > limit:
                break
            kept[n] = True
    return chosen


def check(shares, limit):
    from tmbench_kernels.triton_heaviest import heaviest, heaviest_count

    on_device = shares.to(DEVICE)
    expected = sorted_choice(shares, limit)
    assert torch.equal(heaviest(on_device, limit).cpu(), expected)
    assert torch.equal(heaviest_count(on_device, limit).cpu().long(), expected.sum(-1))
    assert torch.equal(scores.heaviest(shares, limit), expected)
    assert torch.equal(scores.heaviest_count(shares, limit), expected.sum(-1))
    return expected


def check_reaching(shares, share, before=None):
    from tmbench_kernels.triton_heaviest import reaching

    expected = torch.zeros(shares.shape, dtype=torch.bool)
    given = torch.zeros(shares.shape[:-1], dtype=torch.float64) if before is None else before
    rows = zip(shares.flatten(0, -2).tolist(), given.flatten().tolist(), expected.flatten(0, -2), strict=True)
    for row, held, kept in rows:
        order = sorted(range(len(row)), key=lambda n: (-row[n], n))
        need = share * (held + sum(row[n] for n in order))
        for n in order:
            kept[n] = held < need
            held += row[n]
    assert torch.equal(scores.heaviest_reaching(shares, share, before), expected)
    on_device = None if before is None else before.to(DEVICE)
    assert torch.equal(reaching(shares.to(DEVICE), share, on_device).cpu(), expected)
    return expected


def check_largest(numbers, counts):
    from tmbench_kernels.triton_heaviest import largest

    expected = torch.zeros(numbers.shape, dtype=torch.bool)
    wanted = counts.expand(numbers.shape[:-1]).flatten().tolist()
    for row, kept, count in zip(numbers.flatten(0, -2).tolist(), expected.flatten(0, -2), wanted, strict=True):
        kept[sorted(range(len(row)), key=lambda n: (-row[n], n))[:count]] = True
    assert torch.equal(largest(numbers.to(DEVICE), counts.to(DEVICE)).cpu(), expected)
    assert torch.equal(scores.largest_of_positive(numbers, counts), expected)
    return expected


def drawn(kind, n, random):
    """Two by two rows of probabilities that add up to 1, in sixty-fourths where they tie."""
    if kind == "even":
        return torch.rand(2, 2, n, generator=random).softmax(-1)
    if kind == "uneven":
        return (20 * torch.randn(2, 2, n, generator=random)).softmax(-1)
    if kind == "powers":
        return 2.0 ** -torch.randint(1, 140, (2, 2, n), generator=random)
    places = torch.randint(n, (2, 2, 64), generator=random)
    return torch.zeros(2, 2, n).scatter_add_(2, places, torch.full_like(places, 1 / 64, dtype=torch.float32))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["even", "uneven", "powers", "ties"]),
    st.sampled_from([1, 2, 63, 64, 700, 4096, 4097]),
    st.sampled_from([0.01, 0.25, 0.5, 0.77, 0.95, 1.0, 3.0]),
    st.integers(0, 999),
)
def test_any_probabilities(kind, n, limit, seed):
    check(drawn(kind, n, torch.Generator().manual_seed(seed)), limit)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["even", "uneven", "powers", "ties"]),
    st.sampled_from([1, 2, 63, 64, 700, 4096, 4097]),
    st.sampled_from([0.01, 0.25, 0.5, 0.77, 0.95]),
    st.sampled_from([None, 0.0, 0.1, 1.0, 30.0]),
    st.integers(0, 999),
)
def test_a_share_of_any_probabilities(kind, n, share, held, seed):
    """With and without something that is held before."""
    random = torch.Generator().manual_seed(seed)
    shares = drawn(kind, n, random)
    check_reaching(shares, share, None if held is None else held * torch.rand(2, 2, generator=random).double())


@pytest.mark.slow
@pytest.mark.parametrize(("share", "taken"), [(1 / 8, 1), (0.4, 4), (7 / 8, 7), (1.0, 8)])
def test_what_reaches_a_share_exactly_is_enough(share, taken):
    shares = torch.zeros(1, 1, 3 * 4096 + 5)
    shares[..., [9, 4000, 4095, 4096, 8191, 8192, 12287, 12290]] = 1 / 8
    assert check_reaching(shares, share).sum() == taken


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0.0, 1 / 8, 0.4, 7 / 8, 1.0])
def test_ties_go_to_the_first_and_reach_from_part_to_part(limit):
    shares = torch.zeros(1, 1, 3 * 4096 + 5)
    shares[..., [9, 4000, 4095, 4096, 8191, 8192, 12287, 12290]] = 1 / 8
    chosen = check(shares, limit)
    assert chosen.sum() == (shares.shape[-1] if limit == 1 else int(8 * limit))


@pytest.mark.slow
def test_a_limit_is_not_rounded_to_float32():
    shares = torch.tensor([[[0.5, 0.25, 2.0**-30, 2.0**-31]]])
    assert check(shares, 0.75 + 2.0**-30).sum() == 3
    assert check(shares, 0.75 + 2.0**-30 - 2.0**-50).sum() == 2


@pytest.mark.slow
def test_more_than_is_read_at_once_and_rows_that_are_no_neighbours():
    shares = (4 * torch.randn(2, 20011, 2, generator=torch.Generator().manual_seed(1))).softmax(1).transpose(1, 2)
    assert 0 < check(shares[None], 0.9).sum() < shares.numel()


@pytest.mark.slow
def test_the_largest_numbers_that_are_taken_for_probabilities_and_the_smallest():
    least = 2.0**-126
    check(torch.tensor([[[1.0 + 2**-23, 1.0, least, 0.0, least]]]), 2.0)
    check(torch.tensor([[[least, 0.0, 3 * least, 0.0]]]), 3 * least)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["even", "uneven", "powers", "ties"]),
    st.sampled_from([1, 2, 63, 64, 700, 4096, 4097]),
    st.sampled_from([1.0, 1e-38, 64.0, 3e38]),
    st.integers(0, 100),
    st.integers(0, 999),
)
def test_any_number_of_the_largest(kind, n, factor, forced, seed):
    """Infinite ones among them, as selections force what they always take."""
    random = torch.Generator().manual_seed(seed)
    numbers = drawn(kind, n, random) * factor
    numbers[..., :forced] = torch.inf
    check_largest(numbers, torch.randint(0, n + 3, (2, 1), generator=random, dtype=torch.int32))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 9, 5000])
def test_equal_ones_are_taken_from_the_front_and_reach_from_part_to_part(count):
    numbers = torch.zeros(1, 3 * 4096 + 5)
    numbers[..., [9, 4000, 4095, 4096, 8191, 8192, 12287, 12290]] = 1 / 8
    assert check_largest(numbers, torch.tensor([count], dtype=torch.int32)).sum() == count


@pytest.mark.slow
def test_the_largest_of_more_than_is_read_at_once_and_of_rows_that_are_no_neighbours():
    numbers = torch.rand(20011, 2, generator=torch.Generator().manual_seed(1)).T
    check_largest(numbers, torch.tensor([6096, 1000], dtype=torch.int32))


@pytest.mark.slow
def test_numbers_that_differ_in_their_last_bit():
    numbers = torch.tensor([[1.0, 1.0 + 2**-23, 1.0, 1.0 - 2**-24, 2.0**-149, 0.0, torch.inf, 3.4028234e38]])
    for count in range(9):
        check_largest(numbers, torch.tensor([count], dtype=torch.int32))


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_host():
    from tmbench_kernels.triton_heaviest import heaviest, heaviest_count, largest, reaching

    shares = torch.rand(2, 3, 70001).softmax(-1)
    on_gpu = shares.cuda()
    counts = torch.tensor([6096, 1000, 70001], dtype=torch.int32)
    wanted = counts.cuda()
    heaviest(on_gpu[..., :9], 0.5)
    largest(on_gpu[..., :9], wanted)
    reaching(on_gpu[..., :9], 0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, count = heaviest(on_gpu, 0.9), heaviest_count(on_gpu, 0.9)
        most, enough = largest(on_gpu, wanted), reaching(on_gpu, 0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = sorted_choice(shares, 0.9)
    assert torch.equal(got.cpu(), expected)
    assert torch.equal(count.cpu().long(), expected.sum(-1))
    assert torch.equal(most.cpu(), scores.largest(shares, counts))
    assert torch.equal(enough.cpu(), scores.heaviest_reaching(shares, 0.9))
