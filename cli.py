"""The `s4v` command: parse, call one function, print, exit code. Heavy imports sit inside the commands."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import S4vError
from .progress import show_progress
from .terminal import print_lines, set_up_output

app = typer.Typer(
    name="s4v",
    help="Run the giant frozen ViT once; train video models from its cached tokens on one modest GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Options that several commands share.
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Dataset = Annotated[str, typer.Option(help="A data set's name (k400, ssv2, ...), folder, lists or table.")]
Root = Annotated[Path | None, typer.Option(help="Folder below which the videos lie. [data/DATASET]")]
Annotations = Annotated[
    Path | None, typer.Option(help="A table, a list, or the folder of the annotation files. [below the root]")
]
Column = Annotated[
    list[str] | None,
    typer.Option(help="For table: ROLE=NAME; roles are path, label, caption, split, id, start, end. Repeatable."),
]
Protocol = Annotated[
    str | None, typer.Option(help="split1 to split3, 1k-A-9k, ...: see s4v datasets. [the data set's first]")
]
Frames = Annotated[str, typer.Option(help="Cached frames: 8, or by split; a bare number is for the rest.")]
Views = Annotated[str, typer.Option(help="centre, flip (with its mirror image), three; by split: test=three,centre.")]
NoClasses = Annotated[
    bool, typer.Option("--no-classes", help="For folder: an archive, whose folders are no classes; paths are ids.")
]
Segment = Annotated[
    float | None,
    typer.Option(help="Cut videos into rows of so many seconds, to search long ones. [one row]"),
]
Layers = Annotated[str, typer.Option(help="paper, all, or 0-based blocks: 1,3,5.")]
Dtype = Annotated[str, typer.Option(help="Of stored patch tokens: int8, float16, float32.")]
Channels = Annotated[int | None, typer.Option(help="Stored channels of a token. [int8: at most 256; else all]")]
NoPixels = Annotated[bool, typer.Option("--no-pixels", help="Do not store frames.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Precision = Annotated[str | None, typer.Option(help="fp32, fp16, bf16. [fp32 on a CPU, fp16 on a GPU]")]
Checkpoint = Annotated[
    str | None, typer.Option(help="Of the run: best (chosen on the validation split) or last. [best]")
]
BatchSize = Annotated[int, typer.Option(help="Frames in one pass through the backbone.")]
Decoder = Annotated[str, typer.Option(help="auto (decord, then PyAV), decord, pyav.")]
Decoders = Annotated[int | None, typer.Option(help="Decoder processes. [one for each core]")]
DecodeTimeout = Annotated[float, typer.Option(help="CPU seconds beyond a video's own length.")]
Sampling = Annotated[
    str, typer.Option(help="Which frames: uniform, reference-k400, reference-sth, reference-retrieval.")
]
Clips = Annotated[str, typer.Option(help="Evaluation clips, which share the frames; by split: test=4,1.")]
Resize = Annotated[
    str, typer.Option(help="256: short side 256, crop 224. 256x320: that size. 224: the backbone's own.")
]
AllowLoss = Annotated[
    float, typer.Option(help="Share of its announced frames that a good video may lack; two may always be missing.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 3 when a video failed.")]

_FRAMES = "train=16,8"

EXIT_STRICT = 3
EXIT_DAMAGE = 4
EXIT_ENVIRONMENT = 5
EXIT_INTERRUPTED = 130

_SHOWN_DAMAGE = 50
_SHOWN_VIDEOS = 20

_LOADING = "loading the libraries"


def main() -> None:
    """Entry of the console script."""
    set_up_output()
    app()


@app.command()
def extract(
    model: Annotated[str, typer.Option(help="vit-e, vit-e-plus, vit-l, vit-b16, vit-b32, or any open_clip ViT.")],
    dataset: Dataset,
    root: Root = None,
    annotations: Annotations = None,
    column: Column = None,
    protocol: Protocol = None,
    no_classes: NoClasses = False,
    out: Annotated[Path | None, typer.Option(help="The store to write. [store/DATASET.zarr]")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Only this split. Repeatable.")] = None,
    frames: Frames = _FRAMES,
    segment: Segment = None,
    sampling: Sampling = "uniform",
    clips: Clips = "1",
    resize: Resize = "256",
    views: Views = "centre",
    layers: Layers = "paper",
    dtype: Dtype = "int8",
    channels: Channels = None,
    keep_bits: Annotated[
        int | None, typer.Option(help="Mantissa bits (1 to 9) of float16 to keep, then compressed. [all, uncompressed]")
    ] = None,
    codec_from: Annotated[
        Path | None, typer.Option(help="Take the codec of this store instead of fitting one.")
    ] = None,
    calibration_videos: Annotated[int, typer.Option(help="Training videos to fit the codec on.")] = 64,
    no_pixels: NoPixels = False,
    weights: Annotated[str | None, typer.Option(help="An open_clip tag, a file, or random. [the model's own]")] = None,
    device: Device = "auto",
    precision: Precision = None,
    batch_size: BatchSize = 16,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the backbone: minutes once.")] = False,
    decoder: Decoder = "auto",
    decoders: Decoders = None,
    decode_timeout: DecodeTimeout = 60.0,
    allow_loss: AllowLoss = 0.02,
    seed: Annotated[int, typer.Option(help="Of split, calibration and random weights.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes on this machine that share the work.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Dask scheduler whose workers share it: tcp://...")] = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Write the empty store with its codec, and stop.")] = False,
    part: Annotated[str | None, typer.Option(help="I/N: only the I-th of N equal parts; then s4v merge.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N pending rows this time.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Decode failed videos anew.")] = False,
    redo_changed: Annotated[
        bool, typer.Option("--redo-changed", help="Do rows anew whose video was replaced since.")
    ] = False,
    brake: Annotated[int, typer.Option(help="Stop when so many videos in a row are lost to the machine.")] = 50,
    repair: Annotated[bool, typer.Option("--repair", help="Verify the store first; do anew what is damaged.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Add videos that are new, at the store's end.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the store.")] = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Run the backbone once over all videos and write their tokens to a store; run again to continue."""
    with _command("extract", as_json) as result:
        from .extract.datasets import default_paths
        from .extract.decode.sampling import parse_clips, parse_frames, parse_views

        parsed_frames = parse_frames(frames)
        parsed_clips, parsed_views = parse_clips(clips), parse_views(views)
        data_root, store_path = default_paths(dataset, root, out)
        columns = _parse_columns(column or [])
        # Cheap checks are done; what follows imports torch.
        with show_progress("extract", _LOADING) as report:
            from .extract.config import ExtractConfig
            from .extract.extraction import extract_dataset

            config = ExtractConfig(
                model=model,
                dataset=dataset,
                out=store_path,
                root=data_root,
                annotations=annotations,
                columns=columns,
                protocol=protocol,
                with_classes=not no_classes,
                splits=tuple(split) if split else None,
                frames=parsed_frames,
                segment_s=segment,
                sampling=sampling,
                clips=parsed_clips,
                resize=resize,
                views=parsed_views,
                layers=layers,
                dtype=dtype,  # type: ignore[arg-type]
                channels=channels,
                keep_bits=keep_bits,
                codec_from=codec_from,
                calibration_videos=calibration_videos,
                with_pixels=not no_pixels,
                weights=weights,
                device=device,
                precision=precision,  # type: ignore[arg-type]
                batch_size=batch_size,
                with_compile=compile_,
                num_decoders=decoders,
                decoder=decoder,  # type: ignore[arg-type]
                decode_timeout_s=decode_timeout,
                allow_loss=allow_loss,
                seed=seed,
                num_workers=workers,
                scheduler=scheduler,
                prepare=prepare,
                part=_parse_part(part),
                limit=limit,
                retry_failed=retry_failed,
                redo_changed=redo_changed,
                brake=brake,
                repair=repair,
                append=append,
                overwrite=overwrite,
            )
            summary = extract_dataset(config, report)
        result.update(store=str(summary.store), videos=summary.videos, files=summary.files, failed=summary.failed)
        result.update(pending_reasons=summary.pending_reasons, changed=summary.changed)
        if not as_json:
            print_lines(f"{summary.store}: {_describe_rows(summary.videos, summary.files)}")
            _print_reasons(summary.failed, f"s4v info {summary.store}")
            if summary.pending:
                print_lines("pending, for the machine failed and not the video:")
                _print_reasons(summary.pending, f"s4v info {summary.store}")
        if summary.pending:
            _say(
                f"s4v extract: {len(summary.pending)} rows are pending with a reason: the same command tries them again"
            )
    if summary.pending:
        raise typer.Exit(EXIT_ENVIRONMENT)
    if strict and (summary.failed or summary.changed):
        raise typer.Exit(EXIT_STRICT)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="As for extract.")],
    videos: Annotated[int | None, typer.Option(help="How many, all for training; or name a --dataset.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A data set that is there: its videos are counted.")] = None,
    root: Root = None,
    annotations: Annotations = None,
    column: Column = None,
    protocol: Protocol = None,
    no_classes: NoClasses = False,
    out: Annotated[Path | None, typer.Option(help="Where the store would lie. [store/DATASET.zarr]")] = None,
    frames: Frames = _FRAMES,
    views: Views = "centre",
    segment: Segment = None,
    layers: Layers = "paper",
    dtype: Dtype = "int8",
    channels: Channels = None,
    no_pixels: NoPixels = False,
    rate: Annotated[float | None, typer.Option(help="Frames per second of the backbone on one device.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure that rate here, with random weights.")] = False,
    device: Device = "auto",
    precision: Precision = None,
    batch_size: BatchSize = 16,
    price: Annotated[float | None, typer.Option(help="Of the device, per hour.")] = None,
    clip_frames: Annotated[int, typer.Option(help="Frames of a training clip.")] = 8,
    epochs: Annotated[int, typer.Option(help="Epochs you mean to train.")] = 30,
    read_rate: Annotated[float, typer.Option(help="MB/s that the disk gives in training.")] = 500.0,
    as_json: Json = False,
) -> None:
    """Say what an extraction takes in bytes, hours and money, and after how many epochs it pays."""
    with _command("plan", as_json) as result:
        from .errors import ConfigError
        from .extract.datasets import default_paths
        from .extract.decode.sampling import parse_frames, parse_views

        parsed_frames, parsed_views = parse_frames(frames), parse_views(views)
        if (videos is None) == (dataset is None):
            raise ConfigError("plan wants one of --videos N and --dataset NAME")
        above_zero = {"--videos": videos, "--rate": rate, "--clip-frames": clip_frames, "--read-rate": read_rate}
        for option, value in above_zero.items():
            if value is not None and value <= 0:
                raise ConfigError(f"{option} must be above 0; found {value:g}")
        if dataset is None:
            data_root, store_path = Path(), out or Path("store")
        else:
            data_root, store_path = default_paths(dataset, root, out)
        from .extract.config import ExtractConfig
        from .extract.plan import plan_command

        config = ExtractConfig(
            model=model,
            dataset=dataset or "folder",
            root=data_root,
            annotations=annotations,
            columns=_parse_columns(column or []),
            protocol=protocol,
            with_classes=not no_classes,
            out=store_path,
            frames=parsed_frames,
            views=parsed_views,
            segment_s=segment,
            layers=layers,
            dtype=dtype,  # type: ignore[arg-type]
            channels=channels,
            with_pixels=not no_pixels,
            device=device,
            precision=precision,  # type: ignore[arg-type]
            batch_size=batch_size,
        )
        facts = plan_command(
            config,
            videos=videos,
            rate=rate,
            with_probe=probe,
            price=price,
            clip_frames=clip_frames,
            read_bytes_per_s=read_rate * 1e6,
        )
        result.update(asdict(facts), total_bytes=facts.total_bytes, fits=facts.fits)
        if not as_json:
            _print_plan(facts, epochs)


@app.command()
def scan(
    dataset: Dataset,
    root: Root = None,
    annotations: Annotations = None,
    column: Column = None,
    protocol: Protocol = None,
    no_classes: NoClasses = False,
    out: Annotated[Path | None, typer.Option(help="Table of all videos. [scan-DATASET.parquet]")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Only this split. Repeatable.")] = None,
    frames: Frames = _FRAMES,
    segment: Segment = None,
    sampling: Sampling = "uniform",
    clips: Clips = "1",
    resize: Resize = "256",
    views: Views = "centre",
    decoder: Decoder = "auto",
    decoders: Decoders = None,
    decode_timeout: DecodeTimeout = 60.0,
    allow_loss: AllowLoss = 0.02,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Decode what an extraction would decode, and say of each file what its row would say."""
    with _command("scan", as_json) as result:
        from .extract.datasets import default_paths
        from .extract.decode.sampling import parse_clips, parse_frames, parse_views

        parsed_frames = parse_frames(frames)
        parsed_clips, parsed_views = parse_clips(clips), parse_views(views)
        data_root, _ = default_paths(dataset, root, None)
        with show_progress("scan", _LOADING) as report:
            from .extract.config import ExtractConfig
            from .extract.scan import scan_dataset

            config = ExtractConfig(
                model="none",
                dataset=dataset,
                root=data_root,
                out=Path(),
                annotations=annotations,
                columns=_parse_columns(column or []),
                protocol=protocol,
                with_classes=not no_classes,
                splits=tuple(split) if split else None,
                frames=parsed_frames,
                segment_s=segment,
                sampling=sampling,
                clips=parsed_clips,
                resize=resize,
                views=parsed_views,
                decoder=decoder,  # type: ignore[arg-type]
                num_decoders=decoders,
                decode_timeout_s=decode_timeout,
                allow_loss=allow_loss,
            )
            path = out or Path(f"scan-{data_root.resolve().name}.parquet")
            summary = scan_dataset(config, path, report)
        result.update(summary)
        if not as_json:
            print_lines(f"{path}: {summary['videos']['ok']} videos decode, {summary['videos']['failed']} do not")
            for code, count in summary["reasons"].items():
                print_lines(f"  {count} {code}")
            if summary["pending"]:
                print_lines(f"{len(summary['pending'])} could not be read now: the machine's trouble, not theirs")
            _print_reasons([*summary["pending"], *summary["failed"]], str(path))
    if summary["pending"]:
        raise typer.Exit(EXIT_ENVIRONMENT)
    if strict and summary["failed"]:
        raise typer.Exit(EXIT_STRICT)


@app.command()
def datasets(
    name: Annotated[str | None, typer.Argument(help="One data set. [a list of all]")] = None,
    root: Annotated[Path | None, typer.Option(help="Check this folder against what is known.")] = None,
    annotations: Annotations = None,
    protocol: Protocol = None,
    as_json: Json = False,
) -> None:
    """Say what is known of each data set, or what of one is in a folder and what is missing."""
    with _command("datasets", as_json) as result:
        from dataclasses import asdict

        from .extract.datasets import FACTS, check_dataset_name, check_folder

        if name is None:
            result.update(datasets=[asdict(facts) for facts in FACTS.values()])
            if not as_json:
                for facts in FACTS.values():
                    print_lines(f"{facts.name:8} {facts.title:24} {', '.join(facts.protocols)}".rstrip())
            return
        check_dataset_name(name)
        if root is not None:
            result.update(check_folder(name, root, annotations=annotations, protocol=protocol))
        elif name in FACTS:
            result.update(asdict(FACTS[name]))
        else:
            from .errors import ConfigError

            raise ConfigError(f"{name} is no public data set: s4v datasets knows {', '.join(FACTS)}")
        if not as_json:
            _print_check(result) if root is not None else _print_dataset(result)


@app.command()
def info(store: Annotated[Path, typer.Argument(help="The store.")], as_json: Json = False) -> None:
    """Say what a store holds."""
    with _command("info", as_json) as result:
        from .store.info import describe_store
        from .store.reader import open_store

        facts = describe_store(open_store(store))
        result.update(facts)
        if not as_json:
            _print_info(facts)


@app.command()
def merge(
    stores: Annotated[list[Path], typer.Argument(help="Stores that were made with --part from one skeleton.")],
    out: Annotated[Path, typer.Option(help="The store to write.")],
    as_json: Json = False,
) -> None:
    """Join the parts that machines made of one store."""
    with _command("merge", as_json) as result:
        with show_progress("merge", "checking the stores") as report:
            from .store.info import count_rows
            from .store.merge import merge_stores
            from .store.reader import open_store

            merge_stores(stores, out, report)
            counts = count_rows(open_store(out))
        result.update(store=str(out), videos=counts.rows, files=counts.files)
        if not as_json:
            print_lines(f"{out}: {_describe_rows(counts.rows, counts.files)}")
            _say_unfinished(out, counts.rows)


@app.command()
def verify(
    store: Annotated[Path, typer.Argument(help="The store.")],
    sources: Annotated[
        bool, typer.Option("--sources", help="Compare rows with the videos they were made of, by their bytes.")
    ] = False,
    root: Annotated[Path | None, typer.Option(help="Where those videos lie. [where they lay at extraction]")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="With --sources: note what lies there for rows that know no source.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when a video was replaced.")] = False,
    as_json: Json = False,
) -> None:
    """Read a whole store back against its checksums and its manifest; exits with 4 when damage is found."""
    changed: list[int] = []
    with _command("verify", as_json) as result:
        from .errors import ConfigError

        if not sources and (record or root is not None):
            raise ConfigError("--root and --record are for --sources: add it, or leave them out")
        with show_progress("verify", "checking the hashes") as report:
            from .store.info import try_count_rows
            from .store.reader import open_store
            from .store.verify import verify_store

            opened = open_store(store)
            damage = verify_store(opened, report)
            counts = try_count_rows(opened)
            if sources:
                facts = _verify_sources(opened, root, record, report)
                changed = facts["changed"]
                result.update(sources=facts)
        result.update(store=str(store), damage=[asdict(one) for one in damage])
        if counts is not None:
            result.update(videos=counts.rows, files=counts.files)
        if not as_json:
            for one in damage[:_SHOWN_DAMAGE]:
                video = "" if one.video_id is None else f" (video {one.video_id})"
                print_lines(f"{one.where}: {one.what}{video}")
            if len(damage) > _SHOWN_DAMAGE:
                print_lines(f"and {len(damage) - _SHOWN_DAMAGE} more: see --json")
            shards = sorted({one.shard for one in damage if one.shard is not None})
            if not damage:
                rows = "" if counts is None else f"; {_describe_rows(counts.rows, counts.files)}"
                print_lines(f"{store}: no damage{rows}")
            else:
                where = f"shards {', '.join(map(str, shards))}" if shards else "what belongs to the whole store"
                mend = "The command that wrote it mends it, with --repair."
                print_lines(f"{store}: {_count(len(damage), 'damage')} in {where}. {mend}")
            if sources:
                _print_sources(store, result["sources"])
        if counts is not None:
            _say_unfinished(store, counts.rows)
    if damage:
        raise typer.Exit(EXIT_DAMAGE)
    if strict and changed:
        raise typer.Exit(EXIT_STRICT)


def _verify_sources(store: Any, root: Path | None, record: bool, report: Callable[..., None]) -> dict[str, Any]:
    """Compare rows with their videos; ids of the rows that were replaced, counts of the others."""
    from .errors import DataNotFoundError
    from .extract.changed_rows import compare_sources, record_sources

    root = root or Path(store.attributes["dataset"]["root"])
    if not root.is_dir():
        raise DataNotFoundError(
            f"the videos of {store.path} were in {root}: no such folder. Say where they are (--root)"
        )
    report("comparing videos", 0, 0)
    found = compare_sources(store, root)
    recorded = record_sources(store, root, found.unknown) if record and found.unknown else 0
    ids = store.input_columns()["video_id"].take(found.changed).to_pylist() if found.changed else []
    return {
        "root": str(root),
        "same": len(found.same),
        "changed": ids,
        "gone": len(found.gone),
        "unknown": len(found.unknown) - recorded,
        "recorded": recorded,
        "split": found.split,
    }


def _print_sources(store: Path, facts: dict[str, Any]) -> None:
    print_lines(
        f"{store}: of the good rows {facts['same']} are of the videos in {facts['root']}, {len(facts['changed'])} of "
        f"others than lie there now, {facts['gone']} of videos that are not there, {facts['unknown']} know no source"
    )
    for video_id in facts["changed"][:_SHOWN_DAMAGE]:
        print_lines(f"  replaced: {video_id}")
    if len(facts["changed"]) > _SHOWN_DAMAGE:
        print_lines(f"  and {len(facts['changed']) - _SHOWN_DAMAGE} more: see --json")
    for path in facts["split"][:_SHOWN_DAMAGE]:
        print_lines(f"  made of two versions of one file: {path}")
    if facts["changed"]:
        print_lines("`s4v extract ... --redo-changed` does replaced rows anew; without it they keep what they have")
    if facts["recorded"]:
        print_lines(f"{facts['recorded']} rows know their source now")
    elif facts["unknown"]:
        print_lines("--record notes what lies there now as the source of rows that know none")


@app.command()
def train(
    features: Annotated[Path, typer.Option(help="The store.")],
    task: Annotated[str, typer.Option(help="recognition (of classes) or retrieval (by captions).")] = "recognition",
    head: Annotated[
        str, typer.Option(help="side4video; attentive or linear probe (linear is blind to order).")
    ] = "side4video",
    interaction: Annotated[
        str, typer.Option(help="Retrieval: compare means, or words with frames, weighted (wti).")
    ] = "mean",
    negatives: Annotated[
        str, typer.Option(help="Retrieval: tell a video from the captions of its step, or from all.")
    ] = "step",
    out: Annotated[Path | None, typer.Option(help="The run's folder. [runs/STORE-HEAD, runs/STORE-retrieval]")] = None,
    init: Annotated[Path | None, typer.Option(help="A run whose side network to begin with.")] = None,
    preset: Annotated[
        str, typer.Option(help="The paper's size and recipe: auto, none, or such as b16-light-ssv2, e14-k400.")
    ] = "auto",
    layers: Annotated[str | None, typer.Option(help="Backbone blocks to use: 1,3,5. [preset, or all]")] = None,
    side_width: Annotated[int | None, typer.Option(help="Width of the side network. [the paper's]")] = None,
    inputs: Annotated[str, typer.Option(help="What the side network sees: all, tokens, pixels.")] = "all",
    frames: Annotated[int | None, typer.Option(help="Frames of a clip. [8; retrieval 12; auto: or fewer]")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training videos (or captions). [preset, or 30; retrieval 5]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Clips in a step of each process. [preset, or 32; retrieval 128 in all]")
    ] = None,
    views_per_video: Annotated[
        int | None, typer.Option(help="Views of a video side by side in a step. [preset where rows hold them, or 1]")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[preset, or the reference's for the backbone]")] = None,
    warmup_epochs: Annotated[
        float | None, typer.Option(help="The rate rises over these. [preset, or 4; retrieval a tenth]")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[preset, or 0.15; retrieval 0.2]")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="In the cross-entropy. [preset, or 0.1]")] = None,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Less memory, a third more time.")
    ] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the head.")] = False,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16, bf16. [bf16 where a GPU has it]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    accumulate: Annotated[int, typer.Option(help="Batches in one step of the optimiser.")] = 1,
    clip_norm: Annotated[
        float | None, typer.Option(help="Cut the gradient's norm down to this. [not at all; retrieval 1]")
    ] = None,
    validate_every: Annotated[int, typer.Option(help="Epochs between validations.")] = 1,
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without a better one.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out where it was killed.")] = False,
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between the states to resume from.")] = 5.0,
    wandb: Annotated[str | None, typer.Option(help="Log to this Weights & Biases project too.")] = None,
    train_split: Annotated[str, typer.Option(help="Split to learn from.")] = "train",
    val_split: Annotated[str, typer.Option(help="Split to validate on after each epoch.")] = "val",
    seed: Annotated[int, typer.Option(help="Of weights, order and frames.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a side network (or a baseline) from a store alone: no backbone, no video."""
    # Of several processes under torchrun the first one speaks.
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:
        logging.getLogger("s4v").setLevel(logging.ERROR)
    with _command("train", as_json and is_first) as result:
        from .train.config import TrainConfig

        chosen = _parse_numbers("--layers", layers)
        config = TrainConfig(
            features=features,
            out=out or Path(),
            task=task,
            head=head,
            interaction=interaction,  # type: ignore[arg-type]
            negatives=negatives,  # type: ignore[arg-type]
            init=init,
            preset=preset,
            layers=chosen,
            side_width=side_width,
            inputs=inputs,  # type: ignore[arg-type]
            frames=frames,
            epochs=epochs,
            batch_size=batch_size,
            views_per_video=views_per_video,
            learning_rate=learning_rate,
            warmup_epochs=warmup_epochs,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            checkpoint_activations=checkpoint_activations,
            with_compile=compile_,
            precision=precision,  # type: ignore[arg-type]
            device=device,
            seed=seed,
            accumulate=accumulate,
            clip_norm=clip_norm,
            validate_every=validate_every,
            patience=patience,
            resume=resume,
            checkpoint_minutes=checkpoint_minutes,
            wandb=wandb,
            train_split=train_split,
            val_split=val_split,
        )
        from .store.reader import open_store

        open_store(features)  # a wrong path is told before torch is imported
        from dataclasses import replace

        from .train.allocator import keep_freed_memory
        from .train.loop import default_run_path, train_run

        keep_freed_memory()
        path = out or default_run_path(
            features, head if task == TrainConfig.__dataclass_fields__["task"].default else task, resume=resume
        )
        summary = train_run(replace(config, out=path), _report_epoch)
        result.update(summary)
        if is_first and not as_json:
            counts = summary["videos"]
            videos = f"({counts['train']} training videos, {counts['val']} validation videos)"
            shares = _percentages(summary["last"])
            print_lines(f"{summary['run']}: {shares} after {summary['epochs']} epochs {videos}")


@app.command(name="eval")
def evaluate(
    run: Annotated[Path | None, typer.Option(help="The run. [the newest in runs/]")] = None,
    features: Annotated[Path | None, typer.Option(help="The store. [the run's own]")] = None,
    split: Annotated[str, typer.Option(help="Which videos.")] = "val",
    clips: Annotated[int | None, typer.Option(help="Clips of a video, of recognition. [as the store recorded]")] = None,
    dual_softmax: Annotated[
        bool, typer.Option("--dual-softmax", help="Retrieval: also with scores that look at all queries at once.")
    ] = False,
    checkpoint: Annotated[str, typer.Option(help="best (chosen on the validation split) or last.")] = "best",
    backwards: Annotated[
        bool, typer.Option("--backwards", help="Play every clip backwards: what is order worth?")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    as_json: Json = False,
) -> None:
    """Evaluate a run on a split; figures and predictions are left in the run's folder."""
    with _command("eval", as_json) as result:
        from .train.run_folder import find_newest_run, open_run

        path = run or find_newest_run()
        from .device import find_device
        from .train.evaluate import evaluate_run
        from .train.tasks import find_task

        figures = evaluate_run(
            path,
            features=features,
            split=split,
            num_clips=clips,
            checkpoint=checkpoint,
            is_backwards=backwards,
            with_dual_softmax=dual_softmax,
            device=find_device(device),
            with_page=True,
        )
        result.update(figures)
        if not as_json:
            print_lines(*find_task(open_run(path).shape.task).render(path, figures))


@app.command()
def compare(
    features: Annotated[Path, typer.Option(help="The store.")],
    out: Annotated[Path | None, typer.Option(help="Folder of all its runs. [runs/compare-STORE]")] = None,
    methods: Annotated[
        str, typer.Option(help="Of side4video, linear, attentive, zero-shot.")
    ] = "side4video,attentive,linear,zero-shot",
    seeds: Annotated[int, typer.Option(help="Trainings of each.")] = 1,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip. [8]")] = None,
    epochs: Annotated[int | None, typer.Option(help="As for train.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="As for train.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="As for train, the same for all.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    prompt: Annotated[str, typer.Option(help="Of zero-shot; {} is a class's name.")] = "a video of {}",
    weights: Annotated[str | None, typer.Option(help="Of zero-shot: the backbone's. [as recorded]")] = None,
    as_json: Json = False,
) -> None:
    """Train the side network and its baselines from one store, and put them into one table."""
    with _command("compare", as_json) as result:
        from .store.reader import open_store

        open_store(features)
        from .train.allocator import keep_freed_memory
        from .train.compare import compare_methods, render_table
        from .train.config import TrainConfig

        keep_freed_memory()
        base = TrainConfig(
            features=features,
            out=out or Path("runs") / f"compare-{features.name.removesuffix('.zarr')}",
            frames=frames,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            device=device,
        )
        chosen = [name.strip() for name in methods.split(",")]
        untrained = {"prompt": prompt, "weights": weights}
        lines = compare_methods(base, methods=chosen, seeds=seeds, untrained=untrained, say=_say)
        result.update(out=str(base.out), methods=[asdict(line) for line in lines])
        if not as_json:
            print_lines(*render_table(lines))


@app.command(name="import")
def import_official(
    checkpoint: Annotated[Path, typer.Argument(help="A released checkpoint of Side4Video (.pt).")],
    out: Annotated[Path, typer.Option(help="The run's folder.")],
    layers: Annotated[str | None, typer.Option(help="Backbone blocks it reads: 1,3,5. [as the file tells]")] = None,
    frames: Annotated[int, typer.Option(help="Frames of a clip; the file does not say.")] = 8,
    features: Annotated[Path | None, typer.Option(help="A store of its backbone, to check it against.")] = None,
    as_json: Json = False,
) -> None:
    """Make a run from a checkpoint that the paper's authors released."""
    with _command("import", as_json) as result:
        chosen = _parse_numbers("--layers", layers)
        from .train.paper.checkpoint_names import describe_unused
        from .train.paper.import_checkpoint import import_checkpoint

        summary = import_checkpoint(checkpoint, out, layers=chosen, frames=frames, features=features)
        result.update(summary)
        if not as_json:
            variant, checked = summary["variant"], ", ".join(summary["checked"]) or "nothing: no --features"
            print_lines(f"{out}: {variant['task']} beside {variant['family'].upper()}, layers {summary['layers']}")
            print_lines(f"checked against the store: {checked}")
            print_lines(f"not used: {describe_unused(summary['unused'])}")


@app.command()
def retrieve(
    query: Annotated[str | None, typer.Option(help="What to look for, in words.")] = None,
    queries: Annotated[Path | None, typer.Option(help="A text file of queries, one a line.")] = None,
    like: Annotated[str | None, typer.Option(help="A video's id: find videos like it.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="The store. [the run's; without a run the newest in store/]")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="A retrieval run. [without --features the newest in runs/, if there is one]")
    ] = None,
    where: Annotated[str | None, typer.Option(help="Only rows such as \"split = 'val' and duration_s < 30\".")] = None,
    top: Annotated[int, typer.Option(help="Answers wanted.")] = 10,
    index_path: Annotated[
        Path | None,
        typer.Option("--index", help="Folder of the index. [beside the store or in the run, made at first use]"),
    ] = None,
    checkpoint: Checkpoint = None,
    device: Annotated[str, typer.Option(help="Where the towers compute: auto, cpu, cuda, mps.")] = "auto",
    page: Annotated[Path | None, typer.Option("--html", help="Write a gallery with frame strips.")] = None,
    weights: Annotated[str | None, typer.Option(help="Where the backbone's weights are. [as recorded]")] = None,
    as_json: Json = False,
) -> None:
    """Search a store's videos by text, or by a video."""
    with _command("retrieve", as_json) as result:
        from .errors import ConfigError

        if sum(option is not None for option in (query, queries, like)) != 1:
            raise ConfigError("retrieve wants one of --query TEXT, --queries FILE and --like VIDEO")
        run = run or (_find_newest_retrieval_run() if features is None else None)
        _require_run_of(checkpoint, run)
        store = _open_searched_store(run, features)
        from .device import find_device
        from .retrieve.search import Searcher
        from .store.info import count_statuses

        # What is no UTF-8 in an argument arrives as halves of characters, which no file and no tokenizer takes.
        query, like, where = (text and text.encode(errors="replace").decode() for text in (query, like, where))
        with (
            show_progress("retrieve") as report,
            Searcher(
                store,
                index=index_path,
                run=run,
                checkpoint=checkpoint or "best",
                where=where,
                weights=weights,
                device=find_device(device),
                report=report,
            ) as searcher,
        ):
            if like is not None:
                found = {f"like {like}": searcher.find_like(like, top)}
            else:
                asked = [query] if query is not None else _read_queries(queries)  # type: ignore[arg-type]
                found = {text: searcher.find_text(text, top) for text in asked}
        answers = {text: [asdict(answer) for answer in one] for text, one in found.items()}
        seconds = searcher.text_tower_seconds
        result.update(store=str(store.path), run=None if run is None else str(run), text_tower_seconds=seconds)
        loaded = "" if seconds is None else f"; text tower loaded in {seconds:.1f} s"
        _say(f"{store.path}, {'the frozen backbone alone' if run is None else f'as {run} sees it'}{loaded}")
        rows = count_statuses(store)
        result.update(rows=rows)
        _say_unfinished(store.path, rows)
        left_out = {text: searcher.left_out[text] for text in answers if searcher.left_out.get(text)}
        result.update(left_out=left_out)
        if queries is not None:
            result.update(queries=[{"query": text, "answers": one} for text, one in answers.items()])
        else:
            result.update(query=query, like=like, answers=next(iter(answers.values())))
        if like is None and store.attributes["backbone"]["weights"].startswith("random"):
            _say("the backbone of this store has random weights: its ranking says nothing about the videos")
        if page is not None:
            from .retrieve.gallery import write_gallery

            write_gallery(page, store, found, left_out=left_out)
            result.update(html=str(page))
        if not as_json:
            for text, one in answers.items():
                if queries is not None:
                    print_lines(text)
                _print_answers(one)


@app.command()
def index(
    features: Annotated[Path | None, typer.Option(help="The store. [the run's]")] = None,
    run: Annotated[Path | None, typer.Option(help="A retrieval run. [none: the frozen backbone alone]")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the index. [STORE.index beside the store, or in the run]")
    ] = None,
    checkpoint: Checkpoint = None,
    device: Annotated[str, typer.Option(help="Where the run's network computes: auto, cpu, cuda.")] = "auto",
    export: Annotated[
        Path | None, typer.Option(help="Also write vectors as clip-retrieval's index reads them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build what `s4v retrieve` searches, ahead of the first query; an index that is up to date stays."""
    with _command("index", as_json) as result:
        from .errors import ConfigError

        if features is None and run is None:
            raise ConfigError("index wants --features STORE, --run RUN, or both")
        _require_run_of(checkpoint, run)
        with show_progress("index", _LOADING) as report:
            store = _open_searched_store(run, features)
            from .device import find_device
            from .retrieve.index_reader import open_index
            from .retrieve.trained_frames import TrainedFrames
            from .store.info import count_rows

            trained = None if run is None else TrainedFrames(run, store.path, find_device(device), checkpoint or "best")
            report("opening the index", 0, 0)
            built = open_index(store, out, report, trained=trained)
        counts = count_rows(store)
        result.update(index=str(built.path), videos=built.facts.videos, rows=counts.rows)
        _say_unfinished(store.path, counts.rows)
        if export is not None:
            from .retrieve.export import export_vectors

            result.update(export=str(export), exported=export_vectors(store, built, export))
        if not as_json:
            print_lines(f"{built.path}: {_name_rows(built.facts.videos, counts.files['ok'])}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for videos, store, runs and report.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(help="Train each kind this often, for error bars.")] = 1,
    full: Annotated[bool, typer.Option("--full", help="Tokens only and zero-shot, too.")] = False,
    as_json: Json = False,
) -> None:
    """Try the whole pipeline on generated videos, without any download; writes a report."""
    with _command("demo", as_json) as result:
        from .demo.pipeline import run_demo
        from .train.allocator import keep_freed_memory

        keep_freed_memory()
        figures = run_demo(out, _say, seeds=seeds, full=full)
        result.update(figures)
        if not as_json:
            for name, method in figures["methods"].items():
                by_seed = method["top1_by_seed"]
                print_lines(f"{name:13} {sum(by_seed) / len(by_seed):.1%}")
            print_lines(f"{'chance':13} {figures['chance']:.1%}", f"report: {figures['report']}")


@app.command()
def world(
    out: Annotated[Path, typer.Option(help="Folder for videos and annotations.")],
    train: Annotated[int, typer.Option(help="Training videos.")] = 2400,
    val: Annotated[int, typer.Option(help="Held-out videos.")] = 240,
    novel: Annotated[int, typer.Option(help="Videos of combinations that training never shows.")] = 120,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    codec: Annotated[str, typer.Option(help="h264 (mp4), vp9 (webm), mpeg4 (avi).")] = "h264",
    pebbles: Annotated[int, typer.Option(help="Distractors in each video.")] = 1,
    contrast: Annotated[float, typer.Option(help="Of the grounds' textures.")] = 0.4,
    shake: Annotated[float, typer.Option(help="Of the camera, pixels.")] = 0.3,
    noise: Annotated[float, typer.Option(help="Of the sensor, of 255.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Write the small world that the demo runs on: generated videos, labels and captions."""
    with _command("world", as_json) as result:
        from .demo.world import ANNOTATIONS_NAME, WorldConfig, write_world

        config = WorldConfig(
            num_train=train,
            num_val=val,
            num_novel=novel,
            seed=seed,
            codec=codec,
            num_pebbles=pebbles,
            contrast=contrast,
            shake_px=shake,
            noise=noise,
        )
        with show_progress("world", "writing videos") as report:
            videos = write_world(out, config, report)
        result.update(out=str(out), videos=videos)
        if not as_json:
            print_lines(f"{out}: {', '.join(f'{count} {split}' for split, count in videos.items())}")
            print_lines(
                f"read them with: s4v extract --model tiny-clip --dataset table --root {out} "
                f"--annotations {out / ANNOTATIONS_NAME} --column label=shape_motion --resize 224"
            )


@contextmanager
def _command(name: str, as_json: bool) -> Iterator[dict[str, Any]]:
    """Run a command's body; turn its outcome into output and an exit code."""
    start = time.perf_counter()
    result: dict[str, Any] = {}
    try:
        yield result
    except S4vError as error:
        _fail(name, as_json, error, type(error).__name__, error.exit_code)
    except KeyboardInterrupt:
        hints = {
            "extract": "; finished shards are kept, the same command continues",
            "train": "; the same command with --resume continues",
            "compare": "; the same command continues",
        }
        hint = hints.get(name, "")
        _fail(name, as_json, f"interrupted{hint}", "Interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (`head`, say) has what it wanted: nothing to tell, and nowhere to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        # What the file system says of a path the user named: full, read-only, no folder, name too long.
        is_machine = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
        where = f": {error.filename}" if error.filename else ""
        code = EXIT_ENVIRONMENT if is_machine else S4vError.exit_code
        _fail(name, as_json, f"{error.strerror or error}{where}. Nothing finished is lost.", "OSError", code)
    if as_json:
        seconds = round(time.perf_counter() - start, 3)
        print_lines(json.dumps({"command": name, "ok": True, **result, "seconds": seconds}))


def _fail(name: str, as_json: bool, message: object, kind: str, code: int) -> None:
    _say(f"s4v {name}: {message}")
    if as_json:
        print_lines(json.dumps({"command": name, "ok": False, "error": {"type": kind, "message": str(message)}}))
    raise typer.Exit(code)


def _say(message: str) -> None:
    print_lines(message, to=sys.stderr)


def _report_epoch(metrics: dict[str, Any], epochs: int) -> None:
    wait = f"{metrics['data_wait_share']:.1%} waiting for data"
    _say(f"epoch {metrics['epoch']}/{epochs}: loss {metrics['train_loss']:.4f}, {_percentages(metrics)}, {wait}")


def _percentages(metrics: dict[str, Any]) -> str:
    names = [name for name in metrics if name.removeprefix("val_") in ("top1", "top5", "r1", "r5", "r10")]
    return ", ".join(f"{name} {metrics[name]:.1%}" for name in names) or "no validation videos"


def _find_newest_retrieval_run() -> Path | None:
    from .errors import RunNotFoundError
    from .train.run_folder import find_newest_run
    from .train.tasks import find_task

    try:
        return find_newest_run(accept=lambda run: find_task(run.shape.task).embeds_frames and not run.is_imported)
    except RunNotFoundError:
        return None


def _require_run_of(checkpoint: str | None, run: Path | None) -> None:
    from .errors import ConfigError

    if checkpoint is not None and run is None:
        raise ConfigError("--checkpoint has no effect without a run: name one with --run, or leave it out")


def _open_searched_store(run: Path | None, features: Path | None) -> Any:
    """The store that was named, the run's own, or the newest."""
    from .store.reader import open_store

    if run is not None:
        from .errors import StoreNotFoundError
        from .train.run_folder import open_run, open_store_of_run

        try:
            return open_store_of_run(open_run(run), features)
        except StoreNotFoundError as error:
            # --features alone would search another way, without the run.
            raise StoreNotFoundError(f"{error} Together with it, name the run: --run {run}.") from error
    from .retrieve.search import find_newest_store

    return open_store(features or find_newest_store())


def _read_queries(path: Path) -> list[str]:
    from .errors import ConfigError

    try:
        queries = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} (--queries) is not UTF-8 text: {error}") from error
    if not any(queries):
        raise ConfigError(f"{path} (--queries) holds no query: expected one a line")
    return list(dict.fromkeys(query for query in queries if query))


def _parse_columns(pairs: list[str]) -> dict[str, str]:
    from .errors import ConfigError

    columns = {}
    for pair in pairs:
        role, equals, name = pair.partition("=")
        if not (role and equals and name):
            raise ConfigError(f"--column takes ROLE=NAME, such as path=video_file; found {pair!r}")
        columns[role] = name
    return columns


def _parse_part(text: str | None) -> tuple[int, int] | None:
    from .errors import ConfigError

    if text is None:
        return None
    part, slash, count = text.partition("/")
    if not (slash and part.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--part takes I/N such as 2/8; found {text!r}")
    return int(part), int(count)


def _parse_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    from .errors import ConfigError

    if text is None:
        return None
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigError(f"{option} takes numbers such as 1,3,5; found {text!r}") from None


def _print_plan(plan: Any, epochs: int) -> None:
    from .files import describe_bytes

    print_lines(f"{'videos':13} {plan.videos:,}, {plan.frames:,} cached frames")
    for name, size in plan.bytes_by_array.items():
        print_lines(f"  {name:11} {describe_bytes(size)}")
    tokens = plan.bytes_by_array["patches"] + plan.bytes_by_array["cls"]
    pixels = plan.bytes_by_array.get("pixels")
    with_pixels = "" if pixels is None else f", {describe_bytes(tokens + pixels)} with pixels"
    print_lines(f"{'tokens':13} {describe_bytes(tokens)} of patches and class tokens{with_pixels}")
    free = "" if plan.free_bytes is None else f"; {describe_bytes(plan.free_bytes)} free there"
    print_lines(
        f"{'in all':13} {describe_bytes(plan.total_bytes)}{free}{'' if plan.fits is not False else ': it does not fit'}"
    )
    if plan.hours is None:
        print_lines(f"{'time':13} not known: state --rate FRAMES_PER_SECOND, or measure it here with --probe")
        return
    price = "" if plan.price is None else f", {plan.price:,.2f} at that price"
    print_lines(f"{'time':13} {_duration(plan.hours)} on one device at {plan.frames_per_second:,.1f} frames/s{price}")
    read, forward = (_duration(s / 3600) for s in (plan.read_seconds_per_epoch, plan.forward_seconds_per_epoch))
    print_lines(f"{'each epoch':13} {read} of reading, or {forward} of running the backbone")
    if plan.break_even_epochs == float("inf"):
        print_lines(
            f"{'the cache':13} does not pay: reading its tokens takes longer than making them. Store fewer bytes"
        )
    else:
        verdict = (
            "it pays" if plan.break_even_epochs < epochs else f"it does not pay for {epochs} epochs in one training"
        )
        print_lines(f"{'the cache':13} breaks even after {plan.break_even_epochs:.1f} epochs: {verdict}")


def _print_dataset(facts: dict[str, Any]) -> None:
    print_lines(f"{facts['name']}: {facts['title']}", f"source     {facts['source']}")
    first, *others = facts["layout"]
    print_lines(f"layout     {first}", *(f"           {line}" for line in others))
    for protocol, counts in facts["counts"].items():
        print_lines(f"expected   {protocol + ': ' if protocol else ''}{_counts(counts)}")
    if facts["num_classes"]:
        print_lines(f"classes    {facts['num_classes']}")
    if facts["protocols"]:
        print_lines(f"protocols  {', '.join(facts['protocols'])} (--protocol; the first is the default)")
    print_lines(f"clips      {facts['clip_settings']}")


def _print_check(found: dict[str, Any]) -> None:
    print_lines(f"{found['dataset']} in {found['root']}" + (f", {found['protocol']}" if found["protocol"] else ""))
    for split, counts in found["splits"].items():
        expected = "" if counts["expected"] is None else f", {counts['expected']} expected"
        print_lines(f"{split:8} {counts['listed']} listed{expected}, {counts['missing']} not on the disk")
    if found["expected_classes"]:
        print_lines(f"classes  {found['classes']} found, {found['expected_classes']} expected")
    if found["unlisted"]:
        print_lines(f"{found['unlisted']} videos below the root are in no row")
    for path in found["missing"][:20]:
        print_lines(f"  missing: {path}")
    if len(found["missing"]) > 20:
        print_lines(f"  and {len(found['missing']) - 20} more: --json lists them all")


def _describe_rows(rows: dict[str, int], files: dict[str, int]) -> str:
    """`55 rows of 23 files ok, 1 failed, 0 pending`; videos, where each is a row of its own."""
    good = f"{_name_rows(rows['ok'], files['ok'])} ok"
    return ", ".join([good, *(f"{count} {status}" for status, count in rows.items() if status != "ok")])


def _name_rows(num_rows: int, num_files: int) -> str:
    return f"{num_rows} videos" if num_rows == num_files else f"{num_rows} rows of {num_files} files"


def _say_unfinished(store: Path, rows: dict[str, int]) -> None:
    """What a store lacks, in one line; nothing where it lacks nothing."""
    total, parts = sum(rows.values()), []
    if rows["pending"]:
        parts.append(f"{rows['pending']} of {total} rows are pending: the same extract command finishes them")
    if rows["failed"]:
        parts.append(f"{rows['failed']} of {total} rows failed: see s4v info {store}")
    if parts:
        _say(f"{store}: {'; '.join(parts)}")


def _print_reasons(rows: list[dict[str, str]], elsewhere: str) -> None:
    """The first videos with their reasons."""
    for row in rows[:_SHOWN_VIDEOS]:
        print_lines(f"  {row['video_id']}: {row['reason']}")
    if len(rows) > _SHOWN_VIDEOS:
        print_lines(f"  and {len(rows) - _SHOWN_VIDEOS} more: see {elsewhere}")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _duration(hours: float) -> str:
    """With the unit that suits it: `3.2 hours`, `4.0 minutes`, `0.5 seconds`."""
    units = ((1.0, "hours"), (60.0, "minutes"), (3600.0, "seconds"))
    factor, unit = next((one for one in units if hours * one[0] >= 1), units[-1])
    return f"{hours * factor:,.1f} {unit}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{split} {count}" for split, count in counts.items())


def _print_info(facts: dict[str, Any]) -> None:
    from .files import describe_bytes

    backbone, codec = facts["backbone"], facts["codec"]
    videos = facts["videos"]
    lines = {
        "store": f"{facts['store']} (format {facts['format_version']}, {facts['created']})",
        "videos": _describe_counts(videos, facts["files"]),
        "splits": "; ".join(
            f"{name}: {sum(counts.values())} (frames {facts['frames'].get(name, facts['frames'].get(''))})"
            for name, counts in sorted(facts["splits"].items())
        ),
        "failures": _describe_reasons(facts["failures"]) or "none",
        "pending": _describe_reasons(facts["pending_reasons"]),
        "classes": f"{facts['classes']}, captions {facts['captions']}",
        "backbone": f"{backbone['name']} ({backbone['architecture']}), weights {backbone['weights']}, "
        f"{backbone['precision']} on {backbone['device_type']}",
        "layers": f"{','.join(map(str, facts['layers']))} of {backbone['depth']}, width {backbone['width']}",
        "codec": _describe_codec(codec),
        "frames": f"{facts['cached_frames']} cached, {facts['sampling']} sampling, resize {facts['resize']}",
        "a frame": ", ".join(f"{name} {describe_bytes(size)}" for name, size in facts["bytes_per_frame"].items()),
        "on disk": describe_bytes(facts["bytes"]),
    }
    for name, text in lines.items():
        if text or name != "pending":
            print_lines(f"{name:9} {text}")
    for name, array in facts["arrays"].items():
        print_lines(f"  {name:10} {array['dtype']:8} {tuple(array['shape'])}  {describe_bytes(array['bytes'])}")
    if facts["fidelity"] is not None:
        _print_fidelity(facts["fidelity"])


def _describe_counts(rows: dict[str, int], files: dict[str, int]) -> str:
    """`10 ok, 1 failed, 0 pending`, and the files where rows are parts of them."""
    counts = ", ".join(f"{count} {status}" for status, count in rows.items())
    if rows == files:
        return counts
    return f"{counts} rows; files with such rows: {', '.join(f'{count} {status}' for status, count in files.items())}"


def _describe_reasons(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {code}" for code, count in reasons.items())


def _describe_codec(codec: dict[str, Any]) -> str:
    bits = f", {codec['keep_bits']} mantissa bits" if codec["keep_bits"] else ""
    return f"{codec['dtype']}{bits}, {codec['channels']} of {codec['width']} channels, sha256 {codec['sha256'][:12]}"


def _print_fidelity(fidelity: dict[str, Any]) -> None:
    """What coding cost, layer by layer; those that lost much named."""
    from .store.fidelity import NOTABLE_LOSS

    kind = (
        "that the codec was not fitted on"
        if fidelity["is_held_out"]
        else "that the codec was fitted on: there are no others"
    )
    print_lines(f"after decoding, on {fidelity['videos']} videos {kind}:")
    heads = ("layer", "variance", "error: median", "worst", "normed: median", "worst", "cosine")
    print_lines("  " + "  ".join(heads))
    for one in fidelity["layers"]:
        errors = f"{one['error_median']:13.2%}  {one['error_worst']:5.1%}"
        normed = f"{one['normed_error_median']:14.2%}  {one['normed_error_worst']:5.1%}"
        print_lines(f"  {one['layer']:5}  {one['variance_kept']:8.2%}  {errors}  {normed}  {one['cosine_median']:6.4f}")
    poor = [one["layer"] for one in fidelity["layers"] if 1 - one["variance_kept"] > NOTABLE_LOSS]
    if poor:
        _say(
            f"layers {','.join(map(str, poor))} lost more than {NOTABLE_LOSS:.0%} of their variance: "
            "keep more --channels if accuracy suffers"
        )


def _print_answers(rows: list[dict[str, Any]]) -> None:
    print_lines(f"{'rank':>4}  {'score':>7}  {'best frame':>10}  {'moment':>14}  path")
    for row in rows:
        time_s = moment = "not known"
        if row["time_s"] is not None:
            time_s, moment = f"{row['time_s']:.2f} s", f"{row['start_s']:.1f} to {row['end_s']:.1f} s"
        print_lines(f"{row['rank']:>4}  {row['score']:>7.4f}  {time_s:>10}  {moment:>14}  {row['path']}")
