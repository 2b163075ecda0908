"""`s4v plan`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..extract.config import ExtractConfig
from ..extract.datasets import default_paths
from ..terminal import print_lines
from ._extraction import DATA_FIELDS, SPELLINGS, Purpose, spellings_of, take_purpose
from ._options import Options, takes_options
from .front import Json, run_command, say

_FIELDS = (
    *(
        "model",
        *DATA_FIELDS,
        "out",
        "frames",
        "sampling",
        "views",
        "segment_s",
        "layers",
        "dtype",
        "channels",
        "with_pixels",
    ),
    *("input_size", "pixel_offsets", "pixel_format", "text_layers", "text_words", "class_template"),
    *("cls", "cls_dtype", "cls_channels", "device", "precision", "batch_size"),
)


_OUT = replace(SPELLINGS["out"], help="Where the store would lie. [store/DATASET.zarr]")


@takes_options(ExtractConfig, only=_FIELDS, spellings={**spellings_of(*_FIELDS), "out": _OUT})
def plan(
    options: Options,
    videos: Annotated[int | None, typer.Option(help="How many, all for training; or name a --dataset.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A data set that is there: its videos are counted.")] = None,
    rate: Annotated[float | None, typer.Option(help="Frames per second of the backbone on one device.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure that rate here, with random weights.")] = False,
    price: Annotated[float | None, typer.Option(help="Of the device, per hour.")] = None,
    clip_frames: Annotated[int, typer.Option(help="Frames of a training clip.")] = 8,
    epochs: Annotated[int, typer.Option(help="Epochs you mean to train.")] = 30,
    read_rate: Annotated[float, typer.Option(help="MB/s that the disk gives in training.")] = 500.0,
    purpose: Purpose = None,
    as_json: Json = False,
) -> None:
    """Say what an extraction takes in bytes, hours and money, and after how many epochs it pays."""
    with run_command("plan", as_json) as result:
        values = options.parse()
        if (videos is None) == (dataset is None):
            raise ConfigError("plan wants one of --videos N and --dataset NAME")
        above_zero = {"--videos": videos, "--rate": rate, "--clip-frames": clip_frames, "--read-rate": read_rate}
        for option, value in above_zero.items():
            if value is not None and value <= 0:
                raise ConfigError(f"{option} must be above 0; found {value:g}")
        if dataset is None:
            values["root"], values["out"] = Path(), values["out"] or Path("store")
        else:
            values["root"], values["out"] = default_paths(dataset, values["root"], values["out"])
        values["dataset"] = dataset or "folder"
        if needed := take_purpose(purpose, options, values):
            say(f"s4v plan: {needed}")
        config = ExtractConfig(**values)
        from ..extract.plan import plan_command, render_plan

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
            print_lines(*render_plan(facts, epochs))
