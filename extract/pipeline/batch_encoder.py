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
from ..class_tokens import take_class_tokens


class BatchCoder:
    """Codes tokens by a store's codecs; nothing waits for the device until `finish`.

    Args:
        backbone: With weights.
        codec: Of the store's patches, numpy arrays.
        layout: Of the store.
        cls_codec: Of its class tokens; None where they are not coded.
    """

    def __init__(self, backbone: Backbone, codec: Codec, layout: StoreLayout, cls_codec: Codec | None = None) -> None:
        self._backbone = backbone
        self._codec = _move(codec, backbone.device)
        self._cls_codec = None if cls_codec is None else _move(cls_codec, backbone.device)
        self._layout = layout

    def code(self, tokens: FrameTokens, is_picture: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Code a batch, on the device.

        Args:
            tokens: Of its frames.
            is_picture: (B, N) bool, on the device: the patches that a mean of them is taken of; None takes all.

        Returns:
            patches (B, L, N, K), cls (B, L, D), or (B, L, K) codes, where the store has class tokens, embedding (B, E),
            and is_finite (1,): whether the tokens that they come from and they themselves are all numbers.
        """
        layout, first = self._layout, tokens.patches[0]
        shape = (len(first), len(layout.layers), layout.num_patches, layout.channels)
        codes = torch.empty(shape, dtype=getattr(torch, layout.patch_dtype), device=first.device)
        taken = take_class_tokens(tokens, layout.class_tokens, is_picture)
        cls = {} if taken is None else {"cls": self._code_cls(taken)}
        checked = [*cls.values(), *([] if taken is None else [taken]), tokens.embedding]
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
        if (taken := take_class_tokens(tokens, self._layout.class_tokens)) is not None:
            cls = self._code_cls(taken)
            for place, block in enumerate(self._layout.layers):
                check_finite(cls[:, place], taken[:, place], block, video_ids)
        check_finite(tokens.embedding, tokens.embedding, self._backbone.info.depth - 1, video_ids)
        raise EnvironmentFailedError(
            f"the backbone gave NaN or infinity on a batch from {video_ids[0]} to {video_ids[-1]}, and none when it "
            "ran on it again: this device cannot be relied on. Finished shards are kept."
        )

    def _code_cls(self, taken: torch.Tensor) -> torch.Tensor:
        """Class tokens (B, L, D) as the store keeps them: (B, L, D), or (B, L, K) codes."""
        codec = self._cls_codec
        if codec is None:
            return taken.to(getattr(torch, self._layout.cls_dtype))
        # A codec takes patches, (..., N, D): a frame has one class token.
        return torch.cat([codec.encode(taken[:, place, None], place) for place in range(taken.shape[1])], dim=1)


def _move(codec: Codec, device: torch.device) -> Codec:
    return codec.map_parts(lambda array: torch.from_numpy(np.asarray(array)).to(device))
