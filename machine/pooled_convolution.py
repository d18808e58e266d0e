"""A convolution along signals and the maxima of its windows: on a CPU in one pass.

As two operations it writes many times what is kept, and passes back a gradient of zeros for all the rest. In one a row
stays in the nearest cache until its maxima are found, and the gradient is taken at these alone: a third of the time.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from machine.compiled import compiled


def in_one_pass(signals: Tensor, windows: int) -> bool:
    """Whether `pooled_convolution` takes these, (B, C, L)."""
    return (signals.shape[2] % windows == 0 and signals.device.type == "cpu" and signals.dtype == torch.float32
            and not torch.compiler.is_compiling())


def pooled_convolution(signals: Tensor, weight: Tensor, bias: Tensor, windows: int) -> Tensor:
    """(B, C, L), (K, C, 3), (K,) -> (B, K, windows): conv1d with a padding of 1, then max_pool1d by L // windows."""
    return PooledConvolution.apply(signals, weight, bias, windows)


class PooledConvolution(torch.autograd.Function):

    @staticmethod
    def forward(ctx, signals: Tensor, weight: Tensor, bias: Tensor, windows: int) -> Tensor:
        width = signals.shape[2] // windows
        reached = F.pad(signals, (1, 1)).unfold(2, width + 2, width)            # (B, C, windows, width + 2)
        reached = reached.transpose(2, 3).contiguous()                          # one place of all windows side by side
        maxima = signals.new_empty(len(signals), len(weight), windows)
        places = torch.empty_like(maxima, dtype=torch.int32)
        find_maxima(*arrays(reached.flatten(2), weight, bias, maxima, places))
        ctx.save_for_backward(reached, weight, places)
        return maxima

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        reached, weight, places = ctx.saved_tensors
        of_reached, of_weight = torch.zeros_like(reached), torch.zeros_like(weight)
        pass_back(*arrays(reached.flatten(2), weight, places, gradient.contiguous(), of_reached.flatten(2), of_weight))
        of_signals = of_reached[:, :, 1:-1].transpose(2, 3).contiguous()        # (B, C, windows, width)
        of_signals[:, :, :-1, -1] += of_reached[:, :, 0, 1:]                    # the ends are also the neighbours'
        of_signals[:, :, 1:, 0] += of_reached[:, :, -1, :-1]
        return of_signals.flatten(2), of_weight, gradient.sum((0, 2)), None


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


@compiled
def find_maxima(reached, weight, bias, maxima, places):
    """Fill `maxima` and `places`, (B, K, windows); a place counts in its window, of equal ones it is the first.

    reached: (B, C, (width + 2) windows), the signals with what a tap reaches on either side. Where a window ends in
    NaN that is its maximum; NaN with numbers after it is passed over, which torch's pooling does not.
    """
    windows = np.uintp(maxima.shape[2])
    width = reached.shape[2] // maxima.shape[2] - 2
    row = np.empty(reached.shape[2] - 2 * windows, np.float32)                  # one filter's convolution of one signal
    for signal in range(len(reached)):
        for kernel in range(len(weight)):
            row[:] = bias[kernel]
            for channel in range(reached.shape[1]):
                left, middle, right = weight[kernel, channel, 0], weight[kernel, channel, 1], weight[kernel, channel, 2]
                given = reached[signal, channel]
                # Unsigned: places that might count from the end would keep vector instructions out.
                for at in range(np.uintp(len(row))):
                    row[at] += left * given[at] + middle * given[at + windows] + right * given[at + windows + windows]
            top, place = maxima[signal, kernel], places[signal, kernel]
            for window in range(windows):
                top[window], place[window] = row[window], 0
            for offset in range(1, width):
                start = np.uintp(offset) * windows
                for window in range(windows):
                    value = row[start + window]
                    higher = not value <= top[window]                           # NaN is
                    top[window] = value if higher else top[window]
                    place[window] = np.int32(offset) if higher else place[window]


@compiled
def pass_back(reached, weight, places, gradient, of_reached, of_weight):
    """Add to the gradients of `reached` and `weight`, from that of the maxima, (B, K, windows)."""
    windows = np.uintp(places.shape[2])
    found = np.empty(windows, np.uintp)                                         # where a maximum's left tap reaches
    for signal in range(len(reached)):
        for kernel in range(len(weight)):
            for window in range(windows):
                found[window] = np.uintp(places[signal, kernel, window]) * windows + window
            from_above = gradient[signal, kernel]
            for channel in range(reached.shape[1]):
                given, of_given = reached[signal, channel], of_reached[signal, channel]
                left, middle, right = weight[kernel, channel, 0], weight[kernel, channel, 1], weight[kernel, channel, 2]
                of_left, of_middle, of_right = np.float32(0), np.float32(0), np.float32(0)
                for window in range(windows):                                   # three sums, none waiting for another
                    part, at = from_above[window], found[window]
                    of_left += part * given[at]
                    of_middle += part * given[at + windows]
                    of_right += part * given[at + windows + windows]
                    of_given[at] += part * left
                    of_given[at + windows] += part * middle
                    of_given[at + windows + windows] += part * right
                of_weight[kernel, channel, 0] += of_left
                of_weight[kernel, channel, 1] += of_middle
                of_weight[kernel, channel, 2] += of_right
