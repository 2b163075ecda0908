"""Memory in which a batch waits on its way to the backbone's device and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch


class BatchBuffers:
    """Pixels and results of one batch, reused for a later one once the results are read.

    Beside a CUDA GPU it is page-locked memory: copies run while this process goes on, in the order in which the device
    was asked for work. Everywhere else nothing is copied that need not be, and `download` waits.

    Args:
        device: The backbone's.
        batch_size: The most frames in a batch.
        image_size: H, W.
    """

    def __init__(self, device: torch.device, batch_size: int, image_size: tuple[int, int]) -> None:
        self._device = device
        self._batch_size = batch_size
        self._is_pinned = device.type == "cuda"
        self._pixels = torch.zeros((batch_size, *image_size, 3), dtype=torch.uint8, pin_memory=self._is_pinned)
        self._pinned: dict[str, torch.Tensor] = {}
        self._results: dict[str, torch.Tensor] = {}
        self._arrival = torch.cuda.Event() if self._is_pinned else None

    @property
    def pixels(self) -> np.ndarray:
        """(batch_size, H, W, 3) uint8, to be filled."""
        return self._pixels.numpy()

    def upload(self, size: int) -> torch.Tensor:
        """The first `size` frames on the device; the pixels stay as they are until `read` has returned."""
        return self._pixels[:size].to(self._device, non_blocking=self._is_pinned)

    def download(self, results: Mapping[str, torch.Tensor]) -> None:
        """Begin to copy results from the device.

        Args:
            results: By name; the first axis is at most `batch_size` long.
        """
        if self._arrival is None:
            self._results = {name: values.cpu() for name, values in results.items()}
            return
        for name, values in results.items():
            if name not in self._pinned:
                shape = (self._batch_size, *values.shape[1:])
                self._pinned[name] = torch.empty(shape, dtype=values.dtype, pin_memory=self._is_pinned)
            self._results[name] = self._pinned[name][: len(values)]
            self._results[name].copy_(values, non_blocking=True)
        self._arrival.record(torch.cuda.current_stream(self._device))

    def read(self) -> dict[str, np.ndarray]:
        """Wait for the results; they are good until the next `download`."""
        if self._arrival is not None:
            self._arrival.synchronize()
        results, self._results = self._results, {}
        return {name: values.numpy() for name, values in results.items()}
