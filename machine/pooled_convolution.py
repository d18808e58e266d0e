"""A convolution along signals and the maxima of its windows: on a CPU in one pass.

As two operations it writes many times what is kept, and passes back a gradient of zeros for all the rest. Here some
signals at a time are convolved, as a matrix product whose outcome stays in a near cache until its maxima are found; and
the gradient is taken at these alone. composeAE's, forward and back for 32 queries, takes 7 ms of a core's time, torch's
two operations 35: over a frozen encoder a step takes 42 ms in place of 56, and a batch half of the memory.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from machine.compiled import compiled

NEAR = 2**19    # numbers: what fits the caches of today's cores


def in_one_pass(signals: Tensor, windows: int) -> bool:
    """Whether `pooled_convolution` takes these, (B, C, L)."""
    return (signals.shape[2] % windows == 0 and signals.device.type == "cpu" and signals.dtype == torch.float32
            and not torch.compiler.is_compiling() and not torch.jit.is_tracing())


def pooled_convolution(signals: Tensor, weight: Tensor, bias: Tensor, windows: int) -> Tensor:
    """(B, C, L), (K, C, 3), (K,) -> (B, K, windows): conv1d with a padding of 1, then max_pool1d by L // windows."""
    return PooledConvolution.apply(signals, weight, bias, windows)


class PooledConvolution(torch.autograd.Function):

    @staticmethod
    def forward(ctx, signals: Tensor, weight: Tensor, bias: Tensor, windows: int) -> Tensor:
        length, kernels = signals.shape[2], len(weight)
        reached = F.pad(signals, (1, 1))                                        # (B, C, L + 2)
        maxima = signals.new_empty(len(signals), windows, kernels)
        places = torch.empty_like(maxima, dtype=torch.int32)
        at_once = max(1, min(NEAR // (length * kernels), len(signals)))
        filters = weight.flatten(1).T                                           # (3 C, K)
        near = signals.new_empty(at_once * length, kernels)
        for some in range(0, len(signals), at_once):
            part = reached[some:some + at_once].unfold(2, length, 1)            # (b, C, 3, L)
            part = part.permute(1, 2, 0, 3).reshape(weight[0].numel(), -1)      # (3 C, b L)
            convolved = torch.mm(part.T, filters, out=near[:part.shape[1]]).view(-1, length, kernels)
            find_maxima(*arrays(convolved, bias, maxima[some:some + at_once], places[some:some + at_once]))
        ctx.save_for_backward(reached, weight, places)
        return maxima.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        reached, weight, places = ctx.saved_tensors
        of_reached, of_weight = torch.zeros_like(reached), torch.zeros_like(weight)
        pass_back(*arrays(reached, weight, places, gradient.contiguous(), of_reached, of_weight))
        return of_reached[:, :, 1:-1], of_weight, gradient.sum((0, 2)), None


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


@compiled
def find_maxima(convolved, bias, maxima, places):
    """Fill `maxima` and `places`, (B, windows, K); a place counts in the signal, of equal ones it is the first.

    convolved: (B, L, K), to which the bias is yet to be added. Where a window ends in NaN that is its maximum; NaN with
    numbers after it is passed over, which torch's pooling does not.
    """
    width = convolved.shape[1] // maxima.shape[1]
    kernels = np.uintp(len(bias))       # unsigned: what might count from the end would keep vector instructions out
    for signal in range(len(maxima)):
        for window in range(maxima.shape[1]):
            top, place = maxima[signal, window], places[signal, window]
            top[:], place[:] = convolved[signal, window * width], window * width
            for at in range(window * width + 1, (window + 1) * width):
                row = convolved[signal, at]
                for kernel in range(kernels):
                    higher = not row[kernel] <= top[kernel]                     # NaN is
                    top[kernel] = row[kernel] if higher else top[kernel]
                    place[kernel] = np.int32(at) if higher else place[kernel]
            for kernel in range(kernels):
                top[kernel] += bias[kernel]


@compiled
def pass_back(reached, weight, places, gradient, of_reached, of_weight):
    """Add to the gradients of `reached`, (B, C, L + 2), and `weight`, from that of the maxima, (B, K, windows)."""
    windows = np.uintp(places.shape[1])
    found = np.empty(windows, np.uintp)                                         # where a maximum's left tap reaches
    for signal in range(len(reached)):
        for kernel in range(len(weight)):
            for window in range(windows):
                found[window] = places[signal, window, kernel]
            from_above = gradient[signal, kernel]
            for channel in range(reached.shape[1]):
                given, of_given = reached[signal, channel], of_reached[signal, channel]
                left, middle, right = weight[kernel, channel, 0], weight[kernel, channel, 1], weight[kernel, channel, 2]
                of_left, of_middle, of_right = np.float32(0), np.float32(0), np.float32(0)
                for window in range(windows):                                   # three sums, none waiting for another
                    part, at = from_above[window], found[window]
                    of_left += part * given[at]
                    of_middle += part * given[at + np.uintp(1)]
                    of_right += part * given[at + np.uintp(2)]
                    of_given[at] += part * left
                    of_given[at + np.uintp(1)] += part * middle
                    of_given[at + np.uintp(2)] += part * right
                of_weight[kernel, channel, 0] += of_left
                of_weight[kernel, channel, 1] += of_middle
                of_weight[kernel, channel, 2] += of_right
