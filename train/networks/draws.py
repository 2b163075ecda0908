"""Dropout whose masks follow from seed, epoch and example, and from nothing that a training may do otherwise.

A mask is a hash of counters: the example's key, the place in the network, the token and the channel. A step that is
computed again draws the same, on a CPU and on a GPU, alone or among other processes, after a resume or without.

Source:
    Counters instead of a state: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The 32-bit mixer
    is `lowbias32` of https://github.com/skeeto/hash-prospector, the 64-bit one splitmix64's.
"""

from __future__ import annotations

import numpy as np
import torch

_GOLDEN_32, _GOLDEN_64 = 0x9E3779B9, 0x9E3779B97F4A7C15
_HALF = 2**16


def key_examples(seed: int, epoch: int, *numbers: np.ndarray) -> np.ndarray:
    """A key for each example of a batch.

    Args:
        seed: Of the run.
        epoch: From 0.
        numbers: (B,) whole numbers each, that tell an example from all others of its epoch: its row, its caption, and
            which time it is where an epoch has it several times.

    Returns:
        (B,) int64.
    """
    with np.errstate(over="ignore"):
        keys = np.zeros(len(numbers[0]), np.uint64)
        for part in (np.uint64(seed % 2**64), np.uint64(epoch), *numbers):
            keys = _mix_64(keys + np.uint64(_GOLDEN_64) + np.asarray(part).astype(np.uint64))
    return keys.view(np.int64)


def _mix_64(x: np.ndarray) -> np.ndarray:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def drop_channels(
    x: torch.Tensor, keys: torch.Tensor, place: int, tokens: torch.Tensor, probability: float
) -> torch.Tensor:
    """Set single numbers to zero, and scale the others so that the mean stays.

    Args:
        x: (B, ..., C).
        keys: (B,) int64, as `key_examples` gives them.
        place: In the network: other places draw otherwise.
        tokens: (...) int32, numbers of a video's tokens: a token draws the same whatever stands beside it.
        probability: Of a zero, below 1; it is rounded to 1/65,536.

    Returns:
        (B, ..., C), a tensor of its own.
    """
    num_zeros = _count_zeros(probability)
    channels = x.shape[-1]
    pairs = _mix(_count(torch.arange(-(-channels // 2), device=x.device, dtype=torch.int32)))
    of_tokens = _mix(_count(tokens) + _hash_keys(keys, place).view(-1, *(1,) * tokens.ndim))  # (B, ...)
    # Two channels share the halves of a hash.
    halves = _mix(of_tokens[..., None] + pairs).view(torch.int16)[..., :channels]
    is_kept = halves >= num_zeros - _HALF // 2
    return x * is_kept.to(x.dtype).mul_(_HALF / (_HALF - num_zeros))


def drop_examples(x: torch.Tensor, keys: torch.Tensor, place: int, probability: float) -> torch.Tensor:
    """Set whole examples to zero, and scale the others: (B, ...) -> (B, ...); the arguments are `drop_channels`'s."""
    num_zeros = _count_zeros(probability)
    halves = _hash_keys(keys, place).view(torch.int16)[::2]  # (B,)
    is_kept = (halves >= num_zeros - _HALF // 2).to(x.dtype).mul_(_HALF / (_HALF - num_zeros))
    return x * is_kept.view(-1, *(1,) * (x.ndim - 1))


def _count_zeros(probability: float) -> int:
    """Of 65,536 values of a half."""
    if not 0 <= probability < 1:
        raise ValueError(f"the probability of a zero is from 0 to below 1; found {probability}")
    return min(round(probability * _HALF), _HALF - 1)


def _hash_keys(keys: torch.Tensor, place: int) -> torch.Tensor:
    """(B,) int64 -> (B,) int32, of this place."""
    low, high = keys.view(torch.int32).view(-1, 2).unbind(1)
    return _mix(_mix(low + _signed(place * _GOLDEN_32)) ^ high)


def _count(numbers: torch.Tensor) -> torch.Tensor:
    """Neighbours far from each other."""
    return numbers * _signed(_GOLDEN_32)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Every bit of int32 numbers into every other; the tensor is one that nobody else holds."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = _shift_in(x, shift).mul_(_signed(factor))
    return _shift_in(x, 16)


def _shift_in(x: torch.Tensor, shift: int) -> torch.Tensor:
    # torch shifts the sign in, and has no unsigned product on every device.
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def _signed(number: int) -> int:
    """The int32 with the same low bits."""
    return (number + 2**31) % 2**32 - 2**31
