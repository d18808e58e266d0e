"""The convolution that is pooled in one pass, against torch's two operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from machine.pooled_convolution import in_one_pass, pooled_convolution


def two_passes(signals, weight, bias, windows):
    return F.max_pool1d(F.conv1d(signals, weight, bias, padding=1), signals.shape[2] // windows)


def with_gradients(function, windows, *inputs):
    inputs = [value.clone().requires_grad_() for value in inputs]
    pooled = function(*inputs, windows)
    (pooled * (torch.arange(pooled.numel()) % 8 - 2.5).view_as(pooled)).sum().backward()     # -2.5, -1.5, ... 4.5, -2.5
    return [pooled, *(value.grad for value in inputs)]


def test_by_hand():
    """The filter is (1, 0, 2) + 1/2: of the signal 1, -2, 3, 4 the convolution is -3.5, 7.5, 6.5, 3.5."""
    signals, weight, bias = torch.tensor([[[1.0, -2, 3, 4]]]), torch.tensor([[[1.0, 0, 2]]]), torch.tensor([0.5])
    pooled, of_signals, of_weight, of_bias = with_gradients(pooled_convolution, 2, signals, weight, bias)
    first, second = torch.tensor([-2.5, -1.5])
    assert pooled.tolist() == [[[7.5, 6.5]]]                                    # from places 1 and 0 of their windows
    torch.testing.assert_close(of_signals[0, 0], torch.stack([first, second, 2 * first, 2 * second]))
    torch.testing.assert_close(of_weight[0, 0], torch.stack([first - 2 * second, 3 * second - 2 * first,
                                                             3 * first + 4 * second]))
    torch.testing.assert_close(of_bias, (first + second)[None])


@pytest.mark.parametrize(("queries", "channels", "length", "kernels", "windows"), [
    (39, 5, 512, 64, 16), (3, 1, 896, 64, 14), (2, 5, 12, 3, 4), (2, 2, 7, 3, 7), (2, 2, 7, 3, 1), (1, 1, 1, 1, 1),
    (0, 5, 12, 3, 4)])
def test_as_torchs_two_operations(queries, channels, length, kernels, windows):
    """Exactly, of whole and half numbers, whose sums no processor rounds: else of nearly equal maxima any is found."""
    torch.manual_seed(0)
    inputs = [torch.randint(-9, 10, shape).float() for shape in (
        (queries, channels, length), (kernels, channels, 3), (kernels,))]
    ours, theirs = (with_gradients(function, windows, *inputs) for function in (pooled_convolution, two_passes))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_of_equal_maxima_the_first_gets_the_gradient():
    """With a filter that passes the signal through, whose numbers are all the same."""
    inputs = torch.ones(1, 1, 6), torch.tensor([[[0.0, 1, 0]]]), torch.zeros(1)
    for ours, theirs in zip(with_gradients(pooled_convolution, 2, *inputs), with_gradients(two_passes, 2, *inputs),
                            strict=True):
        assert torch.equal(ours, theirs)
    assert with_gradients(pooled_convolution, 2, *inputs)[1].ne(0).tolist() == [[[1, 0, 0, 1, 0, 0]]]


def test_what_is_not_finite_shows():
    inputs = torch.full((1, 1, 6), torch.nan), torch.ones(1, 1, 3), torch.zeros(1)
    assert pooled_convolution(*inputs, 2).isnan().all()
    inputs = torch.full((1, 1, 6), torch.inf), torch.ones(1, 1, 3), torch.zeros(1)
    assert pooled_convolution(*inputs, 2).isinf().all()


def test_layouts_and_frozen_weights():
    """Rows of a larger tensor, a gradient whose rows are one, and weights that do not learn."""
    torch.manual_seed(0)
    conv, whole = nn.Conv1d(2, 3, 3, padding=1).requires_grad_(False), torch.randn(4, 6, 2, requires_grad=True)
    found = []
    for function in (pooled_convolution, two_passes):
        (grad,) = torch.autograd.grad(function(whole.transpose(1, 2)[::2], conv.weight, conv.bias, 3).sum(), whole)
        found.append(grad)
    torch.testing.assert_close(*found)
    assert found[0][1].eq(0).all() and found[0][0].ne(0).any()


def test_what_is_left_to_torch():
    assert in_one_pass(torch.ones(2, 5, 12), 4)
    assert not in_one_pass(torch.ones(2, 5, 13), 4)                             # windows of 3 and of 4
    assert not in_one_pass(torch.ones(2, 5, 12, dtype=torch.float64), 4)
    assert not in_one_pass(torch.ones(2, 5, 12, device="meta"), 4)
