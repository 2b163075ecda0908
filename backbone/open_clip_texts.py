"""The frozen text towers of open_clip: texts to embeddings, or to one token a word."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import _build_text_tower
from torch import nn

from ..errors import BackboneError, WeightsError
from ..store.texts import Texts
from ..terminal import quote
from .contract import TextTower
from .facts import TextTowerInfo
from .open_clip_models import build_tower, read_architecture, resolve_model, resolve_weights
from .weights import KNOWN_WORDS, WeightsSource, fill_tower, open_tensors

# Texts in one pass; the last is padded, so that a text's numbers do not depend on how many others there are.
_TEXTS_PER_PASS = 64

# Tokenised at once where words are counted: 200,000 captions would be two copies of a large array.
_TEXTS_PER_COUNT = 4096

_PREFIXES = ("text.", "", "clip.text.", "clip.")

_MOST_NAMED = 3

_HEAD_WIDTH = 64
"""Of CLIP's attention."""

_log = logging.getLogger(__name__)


class OpenClipTextTower(TextTower):
    """A text tower of open_clip with its tokenizer; `load_text_tower` makes one."""

    def __init__(
        self, tower: nn.Module, tokenizer: Any, device: torch.device, known_words: torch.Tensor | None = None
    ) -> None:
        self._tower = tower
        self._tokenizer = tokenizer
        self._device = device
        self._known_words = known_words

    @property
    def context_length(self) -> int:
        """The most words that a text can have, start and end among them."""
        return self._tokenizer.context_length

    @property
    def vocab_size(self) -> int:
        """How many words the tokenizer has."""
        return self._tokenizer.vocab_size

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> np.ndarray:
        """Embed texts; each is cut at the tower's context length.

        Warns of what is cut off, and of words that the weights do not know: tiny-clip's know a few dozen.

        Returns:
            (len(texts), E) float32, not normalised.
        """
        self._warn_of_cut(texts, self.context_length)
        return self._tower(self._tokenise(texts, self.context_length).to(self._device)).float().cpu().numpy()

    @torch.inference_mode()
    def encode_words(
        self, texts: list[str], num_words: int, *, is_cut_known: bool = False, blocks: Sequence[int] = ()
    ) -> Texts:
        """As the contract says.

        Raises:
            BackboneError: If the tower is not one of open_clip's own that ends a text with its highest token, as CLIP
                does, or has no such block.
        """
        depth = _describe(self._tower).depth
        if any(not 0 <= block < depth for block in blocks):
            raise BackboneError(f"this text tower has blocks 0 to {depth - 1}; found {list(blocks)}")
        if not is_cut_known:
            self._warn_of_cut(texts, num_words)
        tokens = self._tokenise(texts, num_words)
        padded = F.pad(tokens, (0, 0, 0, -len(texts) % _TEXTS_PER_PASS))
        parts = [self._encode_words(part, blocks, num_words) for part in padded.split(_TEXTS_PER_PASS)]
        words, embeddings, *layers = (torch.cat(values)[: len(texts)] for values in zip(*parts, strict=True))
        mask = _find_words(tokens, num_words)
        words = words[:, :num_words] * mask[..., None]
        tapped = layers[0].masked_fill(~mask[:, None, :, None], 0).numpy() if layers else None
        return Texts(words.half().numpy(), mask.numpy(), embeddings.numpy(), tapped)

    def count_words(self, texts: Sequence[str], num_words: int) -> np.ndarray:
        """As the contract says.

        Raises:
            BackboneError: As `encode_words` does.
        """
        _describe(self._tower)
        return _count_words(lambda part: self._tokenise(part, num_words), texts, num_words)

    def find_cut(self, texts: Sequence[str], num_words: int | None = None) -> dict[str, str]:
        """What is left out of texts that are longer than a number of words, start and end among them.

        Args:
            texts: Any.
            num_words: None takes the tower's context length.

        Returns:
            The end that is not read, of each text that has one. A tokenizer may split a word, and write in small
            letters.
        """
        tokenizer = getattr(self._tokenizer, "tokenizer", self._tokenizer)  # of Hugging Face's, the one inside
        if not hasattr(tokenizer, "encode"):
            return {}
        options = {} if tokenizer is self._tokenizer else {"add_special_tokens": False}
        num_read = (num_words or self.context_length) - 2
        cut = {}
        for text in dict.fromkeys(texts):
            tokens = tokenizer.encode(text, **options)
            if len(tokens) > num_read:
                cut[text] = tokenizer.decode(tokens[num_read:]).strip()
        return cut

    def _warn_of_cut(self, texts: list[str], num_words: int) -> None:
        cut = self.find_cut(texts, num_words)
        for left_out in list(cut.values())[:_MOST_NAMED]:
            _log.warning(
                "the text tower reads %d words (and parts of words) of a text: it leaves out %s",
                *(num_words - 2, quote(left_out)),
            )
        if len(cut) > _MOST_NAMED:
            _log.warning("the text tower leaves out the ends of %d more texts", len(cut) - _MOST_NAMED)

    def _encode_words(self, tokens: torch.Tensor, blocks: Sequence[int], num_words: int) -> tuple[torch.Tensor, ...]:
        """Texts (n, context) -> (n, context, E) and (n, E), of blocks also (n, Lt, M, Dt) float16, from one pass."""
        normed: list[torch.Tensor] = []
        tapped: list[torch.Tensor] = []
        tower: Any = self._tower
        hooks = [tower.ln_final.register_forward_hook(lambda _, __, output: normed.append(output))]
        for block in blocks:
            module = tower.transformer.resblocks[block]
            hooks.append(module.register_forward_hook(lambda _, __, output: tapped.append(output)))
        try:
            embeddings = tower(tokens.to(self._device)).float().cpu()
        finally:
            for hook in hooks:
                hook.remove()
        projection: Any = tower.text_projection
        words = projection(normed[0]) if isinstance(projection, nn.Linear) else normed[0] @ projection
        if not blocks:
            return words.float().cpu(), embeddings
        # Rounded here: in float32, all of a shard's texts would take a giant's memory.
        layers = [output if tower.transformer.batch_first else output.transpose(0, 1) for output in tapped]
        rounded = torch.stack([one[:, :num_words] for one in layers], dim=1).half().cpu()
        is_finite = rounded.isfinite().all(dim=3).all(dim=2).all(dim=0)  # (Lt,)
        if not is_finite.all():
            block = blocks[int(is_finite.int().argmin())]
            raise BackboneError(
                f"what block {block} of the text tower gives does not fit float16, in which it would be stored: "
                "take fewer of its last blocks (--text-layers)"
            )
        return words.float().cpu(), embeddings, rounded

    def _tokenise(self, texts: list[str], num_words: int) -> torch.Tensor:
        """Texts to (n, context): cut at `num_words`, padded to what the tower takes."""
        tokens = self._tokenizer(texts, context_length=num_words)
        if self._known_words is not None:
            tokens = self._drop_unknown(tokens, self._known_words)
        return F.pad(tokens, (0, self.context_length - num_words))

    def _drop_unknown(self, tokens: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Texts (n, context) without the words that are not known, padded with zeros again."""
        is_known = torch.isin(tokens, known) | (tokens == 0)
        if unknown := tokens[~is_known].unique().tolist():
            words = ", ".join(repr(self._tokenizer.decode([word]).strip()) for word in unknown)
            _log.warning("this backbone's text tower does not know %s: as if not said", words)
        kept = torch.zeros_like(tokens)
        for row, words_known in enumerate(is_known):
            kept[row, : int(words_known.sum())] = tokens[row, words_known]
        return kept


def describe_text_tower(name: str) -> TextTowerInfo:
    """The sizes of a model's text tower, for which no weights are needed.

    Raises:
        BackboneError: If its words and blocks are not CLIP's kind, or its library is not there.
    """
    tower = _build(name, read_architecture(resolve_model(name)[0]))
    try:
        return _describe(tower)
    except BackboneError as error:
        raise BackboneError(f"{name}: {error}") from error


def _describe(tower: Any) -> TextTowerInfo:
    """The sizes of a tower of open_clip's own that ends a text with its highest token, as CLIP does.

    Raises:
        BackboneError: If it is another.
    """
    is_known = isinstance(getattr(tower, "ln_final", None), nn.Module)
    if not is_known or getattr(tower, "pool_type", None) != "argmax" or tower.output_tokens:
        raise BackboneError("this text tower is not like CLIP's: s4v cannot tell where its words end")
    return TextTowerInfo(
        depth=len(tower.transformer.resblocks),
        width=tower.width,
        embed_dim=tower.output_dim or tower.width,
        context_length=tower.context_length,
    )


def _find_words(tokens: torch.Tensor, num_words: int) -> torch.Tensor:
    """Texts (n, context) to (n, M) bool: what is a word, up to the end token.

    Which has the highest number; a `!` inside a word has the number of the padding.
    """
    return torch.arange(num_words) <= tokens.argmax(dim=1, keepdim=True)


def count_words(name: str, texts: Sequence[str], num_words: int) -> np.ndarray:
    """As the contract says.

    Raises:
        BackboneError: As `describe_text_tower` does, or if its tokenizer cannot be had.
    """
    describe_text_tower(name)
    tokenizer = _load_tokenizer(name)
    return _count_words(lambda part: tokenizer(part, context_length=num_words), texts, num_words)


def _count_words(tokenise: Callable[[list[str]], torch.Tensor], texts: Sequence[str], num_words: int) -> np.ndarray:
    parts = [list(texts[first : first + _TEXTS_PER_COUNT]) for first in range(0, len(texts), _TEXTS_PER_COUNT)]
    counts = [_find_words(tokenise(part), num_words).sum(dim=1).numpy() for part in parts]
    return np.concatenate([np.zeros(0, dtype=np.int64), *counts])


def _load_tokenizer(name: str) -> Any:
    try:
        return open_clip.get_tokenizer(resolve_model(name)[0])
    except (ImportError, OSError) as error:  # those of others are downloaded, by a library that s4v does not need
        raise BackboneError(f"the tokenizer of {name} cannot be had: {str(error).splitlines()[0]}") from error


def _build(name: str, config: Any) -> Any:
    return build_tower(name, _build_text_tower, config["embed_dim"], config["text_cfg"], config)


def build_clip_text_tower(tensors: Mapping[str, torch.Tensor], label: str, num_heads: int | None) -> OpenClipTextTower:
    """CLIP's own text tower from its tensors, whose shapes are all that tells its sizes.

    Args:
        tensors: By CLIP's names.
        label: Where they come from, for messages.
        num_heads: Of attention; None takes CLIP's, which are 64 wide.

    Raises:
        WeightsError: If they are no whole text tower, or not of CLIP's words.
    """
    needed = ("token_embedding.weight", "positional_embedding", "text_projection", "ln_final.weight")
    if missing := [name for name in needed if name not in tensors]:
        raise WeightsError(f"{label} holds no whole text tower of CLIP: no {', no '.join(missing)}")
    (num_words, width), context_length = tensors["token_embedding.weight"].shape, len(tensors["positional_embedding"])
    blocks = {name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")}
    sizes = {
        "context_length": context_length,
        "vocab_size": num_words,
        "width": width,
        "heads": num_heads or max(1, width // _HEAD_WIDTH),
        "layers": len(blocks),
    }
    embed_dim = tensors["text_projection"].shape[1]
    tower = build_tower(label, _build_text_tower, embed_dim, sizes, {"quick_gelu": True})
    fill_tower(tower, tensors, WeightsSource(label, "", None), ("",), torch.device("cpu"), torch.float32)
    tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
    return OpenClipTextTower(tower, tokenizer, torch.device("cpu"))


def load_text_tower(
    name: str, *, weights: str | None, device: torch.device, seed: int, expected_sha256: str | None
) -> OpenClipTextTower:
    """Build a model's text tower in float32 and load its weights.

    Args:
        name: An alias, or an open_clip architecture.
        weights: As for `build_backbone`.
        device: Where it runs.
        seed: Of random weights.
        expected_sha256: Refuse weights with another hash.

    Raises:
        WeightsError: If the weights cannot be had, do not fit, or have another hash.
        BackboneError: If its tokenizer cannot be had.
    """
    architecture, _ = resolve_model(name)
    config = read_architecture(architecture)
    if "text_cfg" not in config:
        raise BackboneError(f"{name} has no text tower: its configuration has no text_cfg")
    source = resolve_weights(name, weights, seed)
    if expected_sha256 not in (None, source.sha256):
        raise WeightsError(
            f"the store was made with weights of hash {expected_sha256}, {source.label} has {source.sha256}. "
            "Name the file that the store was made with (--weights)."
        )
    tower = _build(name, config)
    # Custom-text models keep the tower under `text.`, plain CLIP keeps its parts at the top; Side4Video's own
    # checkpoints keep either of them under `clip.`.
    tensors = open_tensors(source)
    if tensors is not None and not any(
        f"{prefix}{own}" in tensors for own in tower.state_dict() for prefix in _PREFIXES
    ):
        raise WeightsError(
            f"no text tower in these weights: {source.label}. They cannot be asked by text; search by --like VIDEO, or "
            "with a trained run that brings a text tower."
        )
    fill_tower(tower, tensors, source, _PREFIXES, device, torch.float32)
    known_words = None if tensors is None else tensors.get(KNOWN_WORDS)
    return OpenClipTextTower(tower, _load_tokenizer(name), device, known_words)
