"""What a store keeps of a batch's tokens, made on the backbone's device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch

from ...backbone.vision_tower import Backbone, FrameTokens
from ...errors import EnvironmentFailedError
from ...store.codecs.affine import check_finite, round_mantissas
from ...store.codecs.contract import Codec
from ...store.layout import StoreLayout


class BatchCoder:
    """Codes tokens by a store's codec; nothing waits for the device until `finish`.

    Args:
        backbone: With weights.
        codec: Of the store, numpy arrays.
        layout: Of the store.
    """

    def __init__(self, backbone: Backbone, codec: Codec, layout: StoreLayout) -> None:
        self._backbone = backbone
        self._codec = codec.map_parts(lambda array: torch.from_numpy(np.asarray(array)).to(backbone.device))
        self._layout = layout

    def code(self, tokens: FrameTokens, is_picture: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Code a batch, on the device.

        Args:
            tokens: Of its frames.
            is_picture: (B, N) bool, on the device: the patches that a mean of them is taken of; None takes all.

        Returns:
            patches (B, L, N, K), cls (B, L, D) where the store has class tokens, embedding (B, E), and is_finite (1,):
            whether the tokens that they come from and they themselves are all numbers.
        """
        layout, first = self._layout, tokens.patches[0]
        shape = (len(first), len(layout.layers), layout.num_patches, layout.channels)
        codes = torch.empty(shape, dtype=getattr(torch, layout.patch_dtype), device=first.device)
        cls = self._make_class_tokens(tokens, is_picture)
        checked = [*cls.values(), tokens.embedding]
        are_finite = [torch.isfinite(values).all() for values in checked]
        for place, values in enumerate(tokens.patches):
            codes[:, place] = self._codec.encode(values, place)
            # A float code is a number only if its token is; int8 hides it.
            are_finite.append(torch.isfinite(values if layout.patch_dtype == "int8" else codes[:, place]).all())
        is_finite = torch.stack(are_finite).all().reshape(1)
        return {"patches": codes, **cls, "embedding": tokens.embedding, "is_finite": is_finite}

    def finish(self, results: dict[str, np.ndarray]) -> bool:
        """Round the patches of results that have left the device, where the store keeps fewer bits.

        Returns:
            Whether all are numbers.
        """
        if self._layout.keep_bits is None:
            return bool(results["is_finite"].all())
        results["patches"] = round_mantissas(results["patches"], self._layout.keep_bits)
        # Rounded up, a number may pass the largest float16.
        return bool(results["is_finite"].all() and np.isfinite(results["patches"]).all())

    def raise_for(self, pixels: torch.Tensor, video_ids: Sequence[str]) -> NoReturn:
        """Name block and video of a batch with NaN or infinity, by a second pass: the first one's tokens are gone.

        Args:
            pixels: (B, H, W, 3) uint8 on the device.
            video_ids: Of its frames.

        Raises:
            EnvironmentFailedError: In any case.
        """
        tokens = self._backbone.encode_frames(pixels, self._layout.layers)
        for place, (block, values) in enumerate(zip(self._layout.layers, tokens.patches, strict=True)):
            codes = round_mantissas(self._codec.encode(values, place).cpu().numpy(), self._layout.keep_bits)
            check_finite(torch.from_numpy(codes), values, block, video_ids)
        for cls in self._make_class_tokens(tokens).values():
            source = cls if tokens.cls is None or self._layout.class_tokens == "mean" else tokens.cls
            for place, block in enumerate(self._layout.layers):
                check_finite(cls[:, place], source[:, place], block, video_ids)
        check_finite(tokens.embedding, tokens.embedding, self._backbone.info.depth - 1, video_ids)
        raise EnvironmentFailedError(
            f"the backbone gave NaN or infinity on a batch from {video_ids[0]} to {video_ids[-1]}, and none when it "
            "ran on it again: this device cannot be relied on. Finished shards are kept."
        )

    def _make_class_tokens(
        self, tokens: FrameTokens, is_picture: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """`cls` (B, L, D) as the store keeps it; nothing in a store that has none."""
        dtype = getattr(torch, self._layout.cls_dtype)
        if self._layout.class_tokens == "mean":
            # In float32: half precision would round the sum of a thousand patches.
            return {"cls": torch.stack([_average(one.float(), is_picture) for one in tokens.patches], dim=1).to(dtype)}
        if self._layout.class_tokens == "none":
            return {}
        assert tokens.cls is not None
        return {"cls": tokens.cls.to(dtype)}


def _average(patches: torch.Tensor, is_picture: torch.Tensor | None) -> torch.Tensor:
    """The mean of patch tokens (B, N, D), of those that show something of the picture."""
    if is_picture is None:
        return patches.mean(dim=1)
    shares = is_picture / is_picture.sum(dim=1, keepdim=True)
    return (patches * shares[:, :, None]).sum(dim=1)
