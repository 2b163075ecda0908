"""Train tiny-clip, the small world's own CLIP: `python -m s4v.demo.tiny_clip --out FOLDER`.

It learns from captioned stills, as a CLIP does: pictures of single moments, with captions whose motion is drawn at
random, because a still cannot show it. What the pictures cannot teach, a second objective on texts alone keeps apart:
two wordings of one meaning belong together, and the same things in another motion do not.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ..backbone.open_clip_models import read_architecture, resolve_model
from ..backbone.vision_tower import normalise_pixels
from ..backbone.weights import KNOWN_WORDS
from .captions import Meaning, agrees, describe_scene, list_vocabulary, with_article, word_caption
from .renderer import halve_chroma, paint_scene
from .scenes import COLOURS, FRAME_PX, MOTIONS, RELATIONS, SHAPES, draw_scene

_MODEL = "tiny-clip"
_log = logging.getLogger(__name__)
_PATCH_PX = 8
_WINDOW = 4
"""Side of a window, patches: a tip of the largest subject may lie outside."""
_STREAM = 7
"""Ends the seeds of batches: numpy pads seeds with zeros, and the videos of the world have seeds of their own."""
_SOLO_MOTIONS = tuple(motion for motion in MOTIONS if motion not in RELATIONS)
_WHITENING_FLOOR, _WHITENING_GAIN = 0.05, 0.7
"""Variance below which a direction counts as noise, and the size of what is left: of four tried floors the best."""
_POSITION_GAIN, _LONGEST_WAVE = 0.5, 30.0
"""Amplitude, and the last wavelength in the first."""
_LOG_EVERY = 50
_EVALUATE_EVERY = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How tiny-clip is trained."""

    steps: int = 4600
    window_share: float = 0.85
    """In the first part of all steps it sees only a window around the subject: a quarter of the patches and a third of
    the time, where elsewhere there is nothing to learn shapes from. With 0.93 the learning rate that is left (1 % of
    its peak) does not carry what was learned over to whole stills; with 0.84 (6 %) it does in 200 steps."""
    batch_size: int = 64
    """Stills, each with one caption."""
    num_colours: int = 4
    """In one batch: colours are learned at once, so a loss that is not about them is about shapes."""
    learning_rate: float = 3e-4
    """At twice as much shapes are learned half as fast."""
    warmup: float = 0.02
    """Share of all steps."""
    weight_decay: float = 0.05
    wording_weight: float = 0.25
    """Of the objective on texts alone."""
    text_temperature: float = 0.1
    seed: int = 0

    @property
    def window_steps(self) -> int:
        """Steps that see windows only."""
        return round(self.window_share * self.steps)


@dataclass(frozen=True, slots=True)
class Still:
    """One picture and what can be said of it."""

    pixels: np.ndarray
    """(H, W, 3) uint8."""
    meaning: Meaning
    """All but a motion."""
    window: tuple[int, int]
    """First row and column of patches of the window that holds the subject."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from."""

    stills: list[Still]
    captions: list[str]
    """One of each still."""
    is_true: np.ndarray
    """(B, B) bool: all that caption j says, motion aside, is to be seen in still i."""
    wordings: tuple[list[str], list[str]]
    """Two of each motion, of the same things."""


def draw_still(
    rng: np.random.Generator,
    *,
    kind: Literal["known", "novel"] = "known",
    is_plain: bool = False,
    colours: Sequence[str] = tuple(COLOURS),
) -> Still:
    """A random moment of a random scene; every second one with the coarse colours of video files.

    Args:
        rng: The source of chance.
        kind: As in `draw_scene`.
        is_plain: Show the subject alone on a calm ground.
        colours: To choose from.
    """
    motions = _SOLO_MOTIONS if is_plain else MOTIONS
    scene = draw_scene(
        rng,
        motion=motions[rng.integers(len(motions))],
        shape=SHAPES[rng.integers(len(SHAPES))],
        kind=kind,
        num_pebbles=0 if is_plain else 2,
        contrast=0.3 if is_plain else rng.uniform(0.2, 1.0),
        with_landmark=not is_plain,
        colours=colours,
    )
    meaning = dict(describe_scene(scene))
    del meaning["motion"]
    now = rng.uniform(0, 1)
    subject = scene.subject_at(now)
    top, left = (_first_patch(place - subject.radius) for place in (subject.y, subject.x))
    pixels = paint_scene(scene, np.array([now]), rng, noise=rng.uniform(0, 8))[0]
    return Still(halve_chroma(pixels) if rng.random() < 0.5 else pixels, meaning, (top, left))


def _first_patch(place: float) -> int:
    """The row or column of patches where a window begins that holds what begins at a pixel."""
    return int(np.clip(place // _PATCH_PX, 0, FRAME_PX // _PATCH_PX - _WINDOW))


def draw_batch(step: int, recipe: Recipe) -> Batch:
    """The batch of one step: a pure function of the step and the recipe."""
    rng = np.random.default_rng([recipe.seed, step, _STREAM])
    in_window = step < recipe.window_steps
    share = plain_share(step, recipe)
    colours = rng.choice(list(COLOURS), recipe.num_colours, replace=False).tolist()
    stills = [draw_still(rng, is_plain=rng.random() < share, colours=colours) for _ in range(recipe.batch_size)]
    # The landmark is seldom in the window: nothing is said of it.
    seen = [{k: v for k, v in s.meaning.items() if k != "landmark" or not in_window} for s in stills]
    captions, said = zip(*(word_caption(_with_some_motion(m, rng), rng) for m in seen), strict=True)
    is_true = np.array([[agrees(text, one, without=("motion",)) for text in said] for one in seen])
    base = stills[rng.integers(len(stills))].meaning
    first, second = ([word_caption({**base, "motion": m}, rng)[0] for m in MOTIONS] for _ in range(2))
    return Batch(stills, list(captions), is_true, (first, second))


def plain_share(step: int, recipe: Recipe) -> float:
    """How many stills of a step are plain: at first all, when a fifth of the windows are seen a tenth."""
    progress = step / max(1, recipe.window_steps)
    return float(np.clip(1 - 6 * (progress - 0.05), 0.1, 1))


def _with_some_motion(meaning: Meaning, rng: np.random.Generator) -> Meaning:
    """A motion that has nothing to do with the picture; one caption in five names none."""
    return meaning if rng.random() < 0.2 else {**meaning, "motion": MOTIONS[rng.integers(len(MOTIONS))]}


def image_text_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, is_true: torch.Tensor) -> Any:
    """CLIP's symmetric contrastive loss, where every caption that is true of a still counts as its own.

    Args:
        images: (B, E) L2-normalised.
        texts: (B, E) L2-normalised.
        scale: () the inverse temperature.
        is_true: (B, B) bool, images by texts; true on the diagonal.
    """
    logits = scale * images @ texts.T
    targets = is_true.float()
    by_image = F.cross_entropy(logits, targets / targets.sum(1, keepdim=True))
    by_text = F.cross_entropy(logits.T, targets.T / targets.T.sum(1, keepdim=True))
    return (by_image + by_text) / 2


def wording_loss(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Contrastive loss between two wordings of each meaning, (M, E) L2-normalised each."""
    logits = first @ second.T / temperature
    own = torch.arange(len(first))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class TinyClip:
    """The model while it learns, with its tokenizer and its pictures' normalisation."""

    def __init__(self, seed: int) -> None:
        architecture, _ = resolve_model(_MODEL)
        torch.manual_seed(seed)
        self.model = open_clip.CLIP(**read_architecture(architecture))
        self.tokenizer = open_clip.get_tokenizer(architecture)
        self._mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
        self._std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)

    def embed_stills(self, stills: Sequence[Still]) -> torch.Tensor:
        """The whole pictures: (B, E) L2-normalised."""
        images = self.normalise([still.pixels for still in stills])
        return F.normalize(self.model.encode_image(images), dim=-1)

    def embed_windows(self, stills: Sequence[Still]) -> torch.Tensor:
        """Of each picture only the window, its patches at their places in the whole: (B, E) L2-normalised."""
        visual, side = self.model.visual, _WINDOW * _PATCH_PX
        starts = [(top * _PATCH_PX, left * _PATCH_PX) for top, left in (still.window for still in stills)]
        crops = [s.pixels[y : y + side, x : x + side] for s, (y, x) in zip(stills, starts, strict=True)]
        top, left = torch.tensor([still.window for still in stills]).T[:, :, None]
        steps = torch.arange(_WINDOW * _WINDOW)[None]
        places = (top + steps // _WINDOW) * (FRAME_PX // _PATCH_PX) + left + steps % _WINDOW  # (B, 16)
        first, others = visual.positional_embedding.split([1, len(visual.positional_embedding) - 1])
        # Not `others[places]`: several threads add up its gradient, in the order in which they come.
        positions = F.embedding(places, others)
        patches = visual.conv1(self.normalise(crops)).flatten(2).transpose(1, 2) + positions
        cls = (visual.class_embedding + first).expand(len(stills), 1, -1)
        x = visual.transformer(visual.ln_pre(torch.cat([cls, patches], dim=1)))
        return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)

    def normalise(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """B pictures (H, W, 3) uint8 to the tower's input (B, 3, H, W)."""
        return normalise_pixels(torch.from_numpy(np.stack(pictures)), self._mean, self._std)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Texts -> (len(texts), E) L2-normalised; as the tower has it, but without the padding behind the longest."""
        model, tokens = self.model, self.tokenizer(texts)
        length = int((tokens != 0).sum(dim=1).max())
        tokens = tokens[:, :length]
        x = model.token_embedding(tokens) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        ends = tokens.argmax(dim=1)  # the end of a text is the largest of all tokens
        return F.normalize(x[torch.arange(len(texts)), ends] @ model.text_projection, dim=-1)

    @torch.inference_mode()
    def name_stills(self, num_stills: int, seed: int) -> dict[str, float]:
        """Share of fresh stills whose colour, shape, and both are named; one of 40 names is chosen."""
        rng = np.random.default_rng(seed)
        stills = [draw_still(rng) for _ in range(num_stills)]
        names = [(colour, shape) for colour in COLOURS for shape in SHAPES]
        texts = self.embed_texts([with_article(" ".join(name)) for name in names])
        images = torch.cat([self.embed_stills(stills[i : i + 100]) for i in range(0, num_stills, 100)])
        answers = [names[place] for place in (images @ texts.T).argmax(1).tolist()]
        asked = [(still.meaning["colour"], still.meaning["shape"]) for still in stills]
        right = np.array([(a[0] == b[0], a[1] == b[1]) for a, b in zip(answers, asked, strict=True)])
        shares = right[:, 0].mean(), right[:, 1].mean(), right.all(axis=1).mean()
        return dict(zip(("colour", "shape", "both"), map(float, shares), strict=True))

    def weights(self) -> dict[str, torch.Tensor]:
        """All that the model learned, in float16; of the token embedding only the rows that captions use."""
        state = {name: value.detach().half() for name, value in self.model.state_dict().items()}
        rows = torch.unique(self.tokenizer(list_vocabulary()))
        state["token_embedding.weight"] = state["token_embedding.weight"][rows]
        size = torch.tensor(len(self.model.token_embedding.weight))
        return {**state, KNOWN_WORDS: rows.int(), "token_embedding.num_rows": size}


def whiten_patches(clip: TinyClip, num_stills: int = 400) -> None:
    """Start the patch embedding with a whitening of stills' patches.

    Nearly all variance of a patch is its mean colour. Behind the layer norm that follows, edges would all but vanish,
    and with them shapes: whitened, a ViT of this size learns shapes from two thirds of the stills.
    """
    rng = np.random.default_rng([0, _STREAM + 1])
    images = clip.normalise([draw_still(rng).pixels for _ in range(num_stills)])
    patches = F.unfold(images, _PATCH_PX, stride=_PATCH_PX).transpose(1, 2).flatten(0, 1).double()  # (n, 3*p*p)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))
    whitening = (directions / (variances + _WHITENING_FLOOR).sqrt()).T
    weight = clip.model.visual.conv1.weight
    with torch.no_grad():
        weight.copy_(_WHITENING_GAIN * whitening[: len(weight)].reshape(weight.shape))


def lay_out_positions(clip: TinyClip) -> None:
    """Start the position embedding of the patches with sines of their columns and rows.

    At random, a ViT has to find out which patches are neighbours before it can see the outline of a shape.

    Source:
        Beyer et al., "Better plain ViT baselines for ImageNet-1k", arXiv 2205.01580
    """
    embedding = clip.model.visual.positional_embedding  # (1 + patches, D), the class token first
    side, quarter = FRAME_PX // _PATCH_PX, embedding.shape[1] // 4
    angles = torch.arange(side)[:, None] * _LONGEST_WAVE ** (-torch.arange(quarter) / quarter)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    columns, rows = waves.expand(side, -1, -1), waves[:, None].expand(-1, side, -1)
    with torch.no_grad():
        embedding[1:] = _POSITION_GAIN * torch.cat([columns, rows], dim=-1).flatten(0, 1)


def train(recipe: Recipe, report: Callable[[dict[str, Any], TinyClip], None] = lambda *_: None) -> TinyClip:
    """Train from scratch.

    Args:
        recipe: How.
        report: Told of losses every few steps.

    Returns:
        The model, in evaluation mode.
    """
    clip = TinyClip(recipe.seed)
    whiten_patches(clip)
    lay_out_positions(clip)
    model = clip.model.train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.steps, pct_start=recipe.warmup, cycle_momentum=False
    )
    started = time.perf_counter()
    seen_losses: list[float] = []
    said_losses: list[float] = []
    for step, batch in enumerate(_draw_ahead(recipe), start=1):
        embed = clip.embed_windows if step <= recipe.window_steps else clip.embed_stills
        texts = clip.embed_texts([*batch.captions, *chain(*batch.wordings)])
        captions, first, second = texts.split([len(batch.captions), *map(len, batch.wordings)])
        seen = image_text_loss(embed(batch.stills), captions, model.logit_scale.exp(), torch.from_numpy(batch.is_true))
        said = wording_loss(first, second, recipe.text_temperature)
        loss = seen + recipe.wording_weight * said
        seen_losses.append(seen.item())
        said_losses.append(said.item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # 100, as CLIP has it
        if step % _LOG_EVERY == 0 or step == recipe.steps:
            line: dict[str, Any] = {"step": step, "seconds": round(time.perf_counter() - started, 1)}
            for name, values in (("image_text_loss", seen_losses), ("wording_loss", said_losses)):
                line[name] = round(float(np.mean(values)), 4)
                values.clear()
            report(line, clip)
    model.eval()
    return clip


def _draw_ahead(recipe: Recipe) -> Iterator[Batch]:
    """Batches in order, the next one painted while a step runs."""
    with ThreadPoolExecutor(1) as painter:
        following: Future[Batch] = painter.submit(draw_batch, 0, recipe)
        for step in range(1, recipe.steps + 1):
            batch = following.result()
            if step < recipe.steps:
                following = painter.submit(draw_batch, step, recipe)
            yield batch


def main() -> None:
    """Train, and write weights and log; until the end under names of their own, so that nothing shipped is lost."""
    parser = argparse.ArgumentParser(prog="python -m s4v.demo.tiny_clip", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and log")
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="the result depends on their number")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1; found {options.steps}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    recipe = Recipe(steps=options.steps, seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    weights, log = (options.out / f"{_MODEL}.{ending}" for ending in ("safetensors", "jsonl"))
    partial_weights, partial_log = (path.with_name(f"{path.name}.partial") for path in (weights, log))

    def report(line: dict[str, Any], clip: TinyClip) -> None:
        if line["step"] % _EVALUATE_EVERY == 0 or line["step"] == recipe.steps:
            line["named"] = clip.name_stills(300, seed=10_000)
            save_file(clip.weights(), partial_weights, {"recipe": json.dumps(asdict(recipe))})
        _log.info("%s", json.dumps(line))
        file.write(json.dumps(line) + "\n")
        file.flush()

    with partial_log.open("w", encoding="utf-8") as file:
        train(recipe, report)
    partial_weights.replace(weights)
    partial_log.replace(log)


if __name__ == "__main__":
    main()
