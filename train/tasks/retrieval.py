"""Retrieval: frames to embeddings beside texts; every caption of a split against every captioned video, both ways."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import torch

from ...errors import EnvironmentFailedError, StoreMismatchError
from ...files import write_json
from ...store.manifest import read_table, write_table
from ...store.reader import StoreReader
from ...store.texts import TextReader, Texts
from ..clips import (
    ClipBatch,
    ClipPlan,
    LabelledRows,
    find_captioned_rows,
    hand_over_texts,
    plan_evaluation,
    require_long_clips,
    resolve_clip_frames,
    take_first_clips,
    warn_of_thinned_clips,
)
from ..networks.contract import FrameNetwork, Outputs
from ..networks.text_interaction import Interaction, MeanInteraction, TextBatch, contrastive_loss
from ..paired import Answers
from ..paper.presets import RETRIEVAL_RECIPE
from ..recipe import Optimisation, Recipe, cosine_under_warmup
from ..run_folder import Run, open_store_of_run
from ..scorer import Scorer, explain_full_device
from .contract import EvaluationOptions, Gather, Task, TextOptions, refuse, require_rows, require_split
from .ranks import find_answers
from .retrieval_metrics import measure_retrieval, rank_videos

if TYPE_CHECKING:
    from ..config import TrainConfig

# Cosines that are compared at once, words and frames counted.
_COSINES_AT_ONCE = 2**25

Compare = Callable[[TextBatch, torch.Tensor], Interaction]

_log = logging.getLogger(__name__)


class TextSource(Protocol):
    """A store's captions, embedded: by the frozen tower (`TextReader`), or by one that a run has brought along."""

    @property
    def num_words(self) -> int:
        """M."""
        ...

    def read(self, captions: np.ndarray, arrays: tuple[str, ...]) -> Texts:
        """Texts by their rows, in the order asked for."""
        ...


@dataclass(frozen=True, slots=True)
class RetrievalEvaluation:
    """Scores of a split's captions and videos."""

    rows: np.ndarray
    """(n,) rows of the store."""
    captions: np.ndarray
    """(q,) rows of the captions."""
    video_of_text: np.ndarray
    """(q,) places in `rows`."""
    scores: np.ndarray
    """(q, n) float32, texts by videos."""

    def describe(self, *, with_dual_softmax: bool = False) -> dict[str, dict[str, float]]:
        """Figures of both directions: queries, r1, r5, r10, median_rank, mean_rank.

        Args:
            with_dual_softmax: Of scores that look at all queries of a direction at once.
        """
        both = measure_retrieval(self.scores, self.video_of_text, with_dual_softmax=with_dual_softmax)
        return {
            direction: {
                "queries": figures.queries,
                **{f"r{k}": share for k, share in figures.recall.items()},
                "median_rank": figures.median_rank,
                "mean_rank": figures.mean_rank,
            }
            for direction, figures in both.items()
        }


class Retrieval(Task):
    """Frames to embeddings, near those of their captions and far from those of a step's other captions."""

    name = "retrieval"
    figure = "val_r1"
    shown_figures = ("r1", "r5", "r10")
    default_frames = RETRIEVAL_RECIPE.frames
    reads_first_clips = True
    embeds_frames = True
    optimisation = Optimisation(betas=(0.9, 0.98), eps=1e-6, schedule=cosine_under_warmup)
    of_old_runs: ClassVar[Mapping[str, Any]] = {**Task.of_old_runs, "undecayed": "vectors"}

    def __init__(self, config: TrainConfig, store: StoreReader) -> None:
        super().__init__(config, store)
        self.training, self.validation = self.divide_rows(by_class=False)
        require_rows(store, self.training, config, labels="captions", kind="captioned")
        if len(set(self.training.rows.tolist())) < 2:
            raise StoreMismatchError(
                f"{store.path} has one good training video with captions: retrieval needs two or more"
            )
        self._texts = TextReader(store)  # told before a run's folder is made, where there are none
        captions = store.read_captions()
        # Which video a caption is of, and which captions say the same: such pairs are nobody's negatives.
        owner = np.full(len(captions), -1, dtype=np.int64)
        owner[self.training.labels] = self.training.rows
        texts = captions["text"].combine_chunks().dictionary_encode().indices.to_numpy()
        self._identities = torch.from_numpy(np.stack([owner, texts.astype(np.int64)], axis=1))
        self._logit_scale = torch.tensor(float(store.head["logit_scale"]))
        self._bank: TextBatch | None = None
        self._bank_identities = self._identities[self.training.labels]

    @classmethod
    def fits(cls, store: StoreReader) -> bool:
        """It has captions."""
        return len(store.read_captions()) > 0

    @classmethod
    def find_rows(cls, store: StoreReader, split: str) -> LabelledRows:
        """Each captioned row once for each of its captions."""
        return find_captioned_rows(store, split)

    @classmethod
    def find_recipe(cls, backbone_width: int) -> Recipe:
        """The reference's of its three data sets, whatever the backbone."""
        return RETRIEVAL_RECIPE

    @classmethod
    def describe_outputs(cls, store: StoreReader) -> Outputs:
        """Embeddings of frames, beside those of texts."""
        return Outputs(cls.name, embed_dim=store.layout.embed_dim)

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """The class token is read, and no class is learnt."""
        refuse(
            config.inputs == "pixels",
            "--inputs pixels leaves out the class token that retrieval adds to: take all or tokens",
        )
        refuse(config.label_smoothing is not None, "--label-smoothing has no effect on --task retrieval: leave it out")
        refuse(
            config.negatives == "all" and config.interaction == "wti",
            "--negatives all compares means: word by word, all captions are too many",
        )

    @classmethod
    def leave_out(cls, config: TrainConfig) -> frozenset[str]:
        """A preset's interaction, where all captions are negatives: only means can be compared with all."""
        return frozenset({"interaction"} if config.negatives == "all" else ())

    def check_step(self, num_clips: int) -> None:
        """One pair has no negatives."""
        refuse(num_clips < 2, "a step of one pair has no negatives, and teaches nothing: --batch-size 2 or more")

    def begin(self, network: FrameNetwork) -> None:  # type: ignore[override]
        """Read all captions, where they are all negatives."""
        if self.config.negatives == "all":
            texts = self._texts.read(self.training.labels, network.text_arrays)
            self._bank = hand_over_texts(texts, torch.device("cpu"))

    def compute_loss(
        self, network: FrameNetwork, output: torch.Tensor, batch: ClipBatch, gather: Gather
    ) -> torch.Tensor:
        """CLIP's loss of frames (B, T, E), and what the interaction adds to it."""
        assert batch.texts is not None
        texts = TextBatch(*(None if values is None else gather(values) for values in batch.texts.arrays))
        self._identities = self._identities.to(batch.labels.device)
        identities = gather(self._identities[batch.labels])  # (A, 2)
        is_same = None
        if self.config.negatives != "reference":
            is_same = (identities[:, None] == identities[None]).any(dim=2)
        frames = gather(output.float())
        # Clips planned here have all of their frames; a task that plans shorter ones has a mask in every process.
        masks = () if batch.frame_mask is None else (gather(batch.frame_mask),)
        interaction = network.interaction(texts, frames, *masks)
        choices = None
        if self.config.negatives == "all":
            choices = self._compare_with_all(network, frames, interaction.similarities.diagonal(), identities)
        self._logit_scale = self._logit_scale.to(output.device)  # once: a copy holds up the host
        scale = self._logit_scale if network.logit_scale is None else network.logit_scale
        return contrastive_loss(interaction.similarities, scale, is_same, choices) + interaction.loss

    def _compare_with_all(
        self, network: FrameNetwork, frames: torch.Tensor, own: torch.Tensor, identities: torch.Tensor
    ) -> torch.Tensor:
        """Videos (A, T, E) with their own captions, whose similarities (A,) are there, then with all others."""
        assert self._bank is not None and self._bank.embedding is not None
        if self._bank.embedding.device != frames.device:
            self._bank = TextBatch(None, None, self._bank.embedding.to(frames.device))
            self._bank_identities = self._bank_identities.to(frames.device)
        others = network.interaction(self._bank, frames).similarities.T  # (A, C)
        fits = (identities[:, None] == self._bank_identities[None]).any(dim=2)
        return torch.cat([own[:, None], others.masked_fill(fits, -torch.inf)], dim=1)

    def validate(self, scorer: Scorer) -> dict[str, float]:
        """Recalls and ranks of captions that look for their videos."""
        figures = evaluate_texts(scorer, self.validation).describe()["text_to_video"]
        return {f"val_{name}": figures[name] for name in ("r1", "r5", "r10", "median_rank")}

    @classmethod
    def check_evaluation(cls, options: EvaluationOptions) -> None:
        """A video is seen by its first clip alone."""
        refuse(options.num_clips is not None, "--clips has no effect on a retrieval run: leave it out")
        refuse(
            options.of_texts != TextOptions(),
            "--classes and --zero-shot-average have no effect on a retrieval run: leave them out",
        )

    @classmethod
    def evaluate_run(cls, run: Run, options: EvaluationOptions) -> dict[str, Any]:
        """Evaluate a run on a split of a store, and leave the figures and every query's rank in its folder.

        An imported run has a text tower of its own, which embeds the captions.

        Returns:
            text_to_video and video_to_text of the run; `frozen` with the same of the backbone alone, on the same
            frames; `dual_softmax` with the same of the run where it was asked for; dataset, protocol, split, videos,
            captions, and lost_captions: those whose video failed, which nobody can find.

        Raises:
            StoreMismatchError: If the store does not fit the run, holds no texts, or the split has no captioned video.
        """
        store = open_store_of_run(run, options.features)
        split = options.split
        data = find_captioned_rows(store, split)
        require_split(store, data, split, "captioned")
        resolve_clip_frames(run.frames, data.num_cached_frames, store)
        warn_of_thinned_clips(data, run.frames, store, only_first=True)
        texts: TextSource | None = None
        if run.is_imported:
            from .tuned_texts import TunedTexts  # and with it open_clip

            texts = TunedTexts(run, store)
        with explain_full_device("evaluate with --device cpu"):
            scorer = Scorer.of_run(
                run,
                store,
                checkpoint=options.checkpoint,
                device=options.device,
                is_backwards=options.is_backwards,
                team=options.team,
            )
            result = evaluate_texts(scorer, data, texts)
        network: Any = scorer.network
        lost = _count_captions(store, split) - len(data)
        if lost:
            _log.warning(
                "%d captions of %s have no good video: figures leave them out, published ones do not", lost, split
            )
        figures = {
            "run": str(run.path),
            "store": str(store.path),
            "dataset": store.facts.dataset.name,
            "protocol": store.facts.dataset.protocol,
            "split": split,
            "is_backwards": options.is_backwards,
            "checkpoint": options.checkpoint,
            "videos": len(result.rows),
            "captions": len(data),
            "lost_captions": lost,
            **result.describe(),
            "frozen": evaluate_frozen_retrieval(
                store, data, run.frames, normalises_frames=network.normalises_frames
            ).describe(),
        }
        if options.with_dual_softmax:
            figures["dual_softmax"] = result.describe(with_dual_softmax=True)
        if not options.team.is_first:
            return figures
        write_json(run.path / f"eval_{options.file_stem}.json", figures)
        write_table(run.path / f"ranks_{options.file_stem}.parquet", _rank_table(result, store))
        return figures

    @classmethod
    def read_answers(cls, run: Path, name: str) -> Answers:
        """Of every caption that looks for its video."""
        table = read_table(run / f"ranks_{name}.parquet")
        return Answers("r1", tuple(table["video_id"].to_pylist()), (table["rank"].to_numpy() == 1).astype(float))

    @classmethod
    def render(cls, run: Path, figures: Mapping[str, Any]) -> list[str]:
        """A table of both directions, the frozen backbone's beside it."""
        protocol = f", protocol {figures['protocol']}" if figures["protocol"] else ""
        order = ", played backwards" if figures["is_backwards"] else ""
        tables = {"trained": figures, "frozen": figures["frozen"]}
        if "dual_softmax" in figures:
            tables["trained, dual softmax"] = figures["dual_softmax"]
        lines = [
            f"{run}, {figures['checkpoint']} checkpoint, {figures['dataset']}{protocol}, {figures['videos']} videos "
            f"and {figures['captions']} captions of {figures['split']}{order}",
            f"{'':24}{'':15}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'MdR':>7}{'MnR':>8}",
        ]
        for name, table in tables.items():
            for direction in ("text_to_video", "video_to_text"):
                one = table[direction]
                shares = "".join(f"{100 * one[k]:7.1f}" for k in ("r1", "r5", "r10"))
                ranks = f"{one['median_rank']:7.1f}{one['mean_rank']:8.1f}"
                lines.append(f"{name:24}{direction.replace('_', ' '):15}{shares}{ranks}")
        return lines


def embed_clips(scorer: Scorer, data: LabelledRows) -> np.ndarray:
    """Embed the first evaluation clip of each video, its centre view.

    Args:
        scorer: With a network that embeds frames.
        data: Which videos.

    Returns:
        (n, T, E) float32, not normalised, in the order of `data`.

    Raises:
        EnvironmentFailedError: If a number is not finite.
        StoreMismatchError: If a clip holds fewer than T frames.
    """
    require_long_clips(data, scorer.num_frames, scorer.store, only_first=True)
    frames = scorer.run(_plan_first_clips(data, scorer.num_frames, scorer.batch_size))
    if not np.isfinite(frames).all():
        raise EnvironmentFailedError("the head's output is not finite: its weights or its input hold NaN or infinity")
    return frames


def read_frozen_clips(store: StoreReader, data: LabelledRows, num_frames: int) -> np.ndarray:
    """What `embed_clips` gives for a network that was never trained: the backbone's own embeddings, (n, T, E)."""
    (plan,) = _plan_first_clips(data, num_frames, max(1, len(data)))
    frames = np.empty((len(data), num_frames, store.layout.embed_dim), dtype=np.float32)
    for shard in range(store.layout.num_shards):
        span = store.layout.shard_rows(shard)
        own = np.flatnonzero((data.rows >= span.start) & (data.rows < span.stop))
        if len(own):
            embeddings = store.read_embeddings(span)  # (rows, A, F, E)
            rows, views = data.rows[own, None] - span.start, plan.views[own, None]
            frames[own] = embeddings[rows, views, plan.places[own]]
    return frames


@torch.inference_mode()
def score_texts(
    compare: Compare,
    text_arrays: tuple[str, ...],
    texts: TextSource,
    captions: np.ndarray,
    frames: np.ndarray,
    device: torch.device,
) -> np.ndarray:
    """Compare captions with videos.

    Args:
        compare: A module of train/networks/text_interaction.py on `device`.
        text_arrays: What it reads of a text.
        texts: Of the store's captions.
        captions: (q,) rows.
        frames: (n, T, E), not normalised.
        device: Where to compute.

    Returns:
        (q, n) float32.
    """
    videos = torch.from_numpy(frames).to(device)
    per_text = max(1, videos.shape[0] * videos.shape[1] * (texts.num_words if "tokens" in text_arrays else 1))
    size = max(1, _COSINES_AT_ONCE // per_text)
    scores = [
        compare(hand_over_texts(texts.read(captions[first : first + size], text_arrays), device), videos).similarities
        for first in range(0, len(captions), size)
    ]
    return torch.cat(scores).float().cpu().numpy()


def evaluate_texts(scorer: Scorer, data: LabelledRows, texts: TextSource | None = None) -> RetrievalEvaluation:
    """Score captions against videos.

    Args:
        scorer: With a network that embeds frames.
        data: Captioned rows, as `find_captioned_rows` gives them.
        texts: Captions as the network knows them; None takes those in the store.

    Raises:
        EnvironmentFailedError: If a number is not finite.
        StoreMismatchError: If the store holds no texts of its captions, or a clip holds fewer than T frames.
    """
    videos, video_of_text = _unique_videos(data)
    frames = embed_clips(scorer, videos)
    interaction: Any = scorer.network.interaction
    texts = texts or TextReader(scorer.store)
    scores = score_texts(interaction, interaction.text_arrays, texts, data.labels, frames, scorer.device)
    return RetrievalEvaluation(videos.rows, data.labels, video_of_text, scores)


def evaluate_frozen_retrieval(
    store: StoreReader, data: LabelledRows, num_frames: int, *, normalises_frames: bool = True
) -> RetrievalEvaluation:
    """Score captions against videos with the backbone's own embeddings, averaged over the same frames."""
    videos, video_of_text = _unique_videos(data)
    frames = read_frozen_clips(store, videos, num_frames)
    compare = MeanInteraction(normalises_frames=normalises_frames)
    scores = score_texts(compare, compare.text_arrays, TextReader(store), data.labels, frames, torch.device("cpu"))
    return RetrievalEvaluation(videos.rows, data.labels, video_of_text, scores)


def _plan_first_clips(data: LabelledRows, num_frames: int, batch_size: int) -> list[ClipPlan]:
    plans, _ = plan_evaluation(take_first_clips(data), num_frames=num_frames, batch_size=batch_size)
    return plans


def _unique_videos(data: LabelledRows) -> tuple[LabelledRows, np.ndarray]:
    """Each video once, and the place of each caption's video among them."""
    _, first, video_of_text = np.unique(data.rows, return_index=True, return_inverse=True)
    return data.take(first), video_of_text


def _count_captions(store: StoreReader, split: str) -> int:
    """Captions of a split, whatever became of their videos."""
    inputs = store.input_columns()
    of_split = inputs.filter(pa.compute.equal(inputs["split"], split))["video_id"]
    return int(pa.compute.sum(pa.compute.is_in(store.read_captions()["video_id"], of_split.combine_chunks())).as_py())


def _rank_table(result: RetrievalEvaluation, store: StoreReader) -> pa.Table:
    """One row a caption: its text, its video, that video's rank and the video that was found first."""
    captions = store.read_captions().take(result.captions)
    ids = store.read_manifest(["video_id"])["video_id"].take(result.rows)
    best = find_answers(result.scores, result.video_of_text)
    return pa.table(
        {
            **{name: captions[name] for name in ("caption_id", "text", "video_id")},
            "rank": rank_videos(result.scores, result.video_of_text),
            "first": ids.take(best),
            "score": np.take_along_axis(result.scores, result.video_of_text[:, None], axis=1)[:, 0],
            "first_score": result.scores.max(axis=1),
        }
    )
