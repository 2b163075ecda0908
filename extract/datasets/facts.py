"""What is known of each public data set before anyone looks at a disk: source, layout, counts, protocols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import ConfigError

_KINETICS_CLIPS = "Side4Video: 8 or 16 frames, short side 256, test with 3 crops x 4 clips"
_SOMETHING_CLIPS = "Side4Video: 8 or 16 frames, frames resized to 256 x 320, test with 3 crops x 2 clips"
_RETRIEVAL_CLIPS = "Side4Video: 12 frames, 32 words, one centre crop"
_SMALL_CLIPS = "top-1 on each of the three splits, and their mean; clips as for Kinetics"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFacts:
    """One public data set."""

    name: str
    title: str
    source: str
    """What to look for: the official page or archive."""
    layout: tuple[str, ...]
    """Expected below the root, one line an entry."""
    annotation_folders: tuple[str, ...] = ()
    """Folders below the root that hold its annotation files, beside `annotations/` and `labels/`."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Official number of rows: protocol ("" where there is only one) -> split -> rows. What is not sure is left out."""
    num_classes: int | None = None
    protocols: tuple[str, ...] = ()
    """Ways to divide the videos that papers report; the first is the default."""
    clip_settings: str = ""
    """How papers take clips of it."""
    frame_fps: float | None = None
    """Rate of its frame folders, where it is distributed as JPEG files."""


def _kinetics(number: int, counts: dict[str, dict[str, int]]) -> DatasetFacts:
    return DatasetFacts(
        name=f"k{number}",
        title=f"Kinetics-{number}",
        source=f"Kinetics-{number} (DeepMind); videos from the mirror cvdfoundation/kinetics-dataset",
        layout=(
            "train.csv, val.csv (or validate.csv), test.csv: here or in annotations/",
            "{train,val,test}/[CLASS/]YOUTUBEID_START_END.mp4, in any folder; or YOUTUBEID.mp4",
        ),
        counts=counts,
        num_classes=number,
        clip_settings=_KINETICS_CLIPS,
    )


_ALL = (
    DatasetFacts(
        name="hmdb51",
        title="HMDB51",
        source="HMDB: a large human motion database (Serre lab): hmdb51_org.rar, test_train_splits.rar",
        layout=(
            "testTrainMulti_7030_splits/CLASS_test_split{1,2,3}.txt (or here, or in annotations/, splits/)",
            "CLASS/NAME.avi, in any folder",
        ),
        annotation_folders=("testTrainMulti_7030_splits", "test_train_splits", "splits"),
        counts={f"split{n}": {"train": 3570, "val": 1530} for n in (1, 2, 3)},
        num_classes=51,
        protocols=("split1", "split2", "split3"),
        clip_settings=_SMALL_CLIPS,
    ),
    _kinetics(400, {"": {"train": 246_535, "val": 19_907}}),
    _kinetics(600, {}),
    _kinetics(700, {}),
    DatasetFacts(
        name="msrvtt",
        title="MSR-VTT",
        source="MSR-VTT (Microsoft Research, 2016); the 1k-A lists are in CLIP4Clip's msrvtt_data.zip",
        layout=(
            "MSRVTT_data.json, or train_val_videodatainfo.json with test_videodatainfo.json",
            "for 1k-A: MSRVTT_train.9k.csv or MSRVTT_train.7k.csv, and MSRVTT_JSFUSION_test.csv "
            "(or msrvtt_ret_train9k.json, msrvtt_ret_train7k.json, msrvtt_ret_test1k.json)",
            "videoN.mp4, in any folder",
        ),
        annotation_folders=("msrvtt_data",),
        counts={
            "1k-A-9k": {"train": 9000, "test": 1000},
            "1k-A-7k": {"train": 7010, "test": 1000},
            "full": {"train": 6513, "val": 497, "test": 2990},
        },
        protocols=("1k-A-9k", "1k-A-7k", "full"),
        clip_settings=_RETRIEVAL_CLIPS,
    ),
    DatasetFacts(
        name="msvd",
        title="MSVD",
        source="Microsoft Research Video Description Corpus: YouTubeClips.tar; lists in CLIP4Clip's msvd_data.zip",
        layout=(
            "train_list.txt, val_list.txt, test_list.txt",
            "raw-captions.pkl or AllVideoDescriptions.txt",
            "YouTubeClips/ID.avi, in any folder",
        ),
        annotation_folders=("msvd_data",),
        counts={"": {"train": 1200, "val": 100, "test": 670}},
        clip_settings=_RETRIEVAL_CLIPS,
    ),
    DatasetFacts(
        name="ssv1",
        title="Something-Something V1",
        source="20BN-SOMETHING-SOMETHING-V1: frames as JPEG files in 20bn-something-something-v1-??",
        layout=(
            "something-something-v1-{train,validation,test,labels}.csv",
            "ID/00001.jpg, in any folder",
        ),
        counts={"": {"train": 86_017, "val": 11_522, "test": 10_960}},
        num_classes=174,
        clip_settings=_SOMETHING_CLIPS,
        frame_fps=12.0,
    ),
    DatasetFacts(
        name="ssv2",
        title="Something-Something V2",
        source="Something-Something V2 (Qualcomm AI datasets): 20bn-something-something-v2-?? and the labels archive",
        layout=(
            "something-something-v2-{train,validation,test,labels}.json, or labels/{train,validation,test,labels}.json",
            "ID.webm (or .mp4, or ID/00001.jpg), in any folder",
        ),
        counts={"": {"train": 168_913, "val": 24_777, "test": 27_157}},
        num_classes=174,
        clip_settings=_SOMETHING_CLIPS,
    ),
    DatasetFacts(
        name="ucf101",
        title="UCF101",
        source="UCF101 (University of Central Florida): UCF101.rar, UCF101TrainTestSplits-RecognitionTask.zip",
        layout=(
            "ucfTrainTestlist/{classInd,trainlist01,testlist01,..03}.txt (or here, or in annotations/)",
            "CLASS/v_CLASS_gNN_cNN.avi, in any folder",
        ),
        annotation_folders=("ucfTrainTestlist",),
        counts={
            "split1": {"train": 9537, "val": 3783},
            "split2": {"train": 9586, "val": 3734},
            "split3": {"train": 9624, "val": 3696},
        },
        num_classes=101,
        protocols=("split1", "split2", "split3"),
        clip_settings=_SMALL_CLIPS,
    ),
    DatasetFacts(
        name="vatex",
        title="VATEX",
        source="VATEX (UC Santa Barbara and ByteDance): captions; the videos are clips of Kinetics-600",
        layout=(
            "vatex_training_v1.0.json, vatex_validation_v1.0.json, vatex_public_test_english_v1.1.json",
            "for hgr: vatex_data.json with train_list.txt, val_list.txt, test_list.txt",
            "YOUTUBEID_START_END.mp4, in any folder",
        ),
        annotation_folders=("vatex_data",),
        counts={"official": {"train": 25_991, "val": 3000, "test": 6000}},
        protocols=("official", "hgr"),
        clip_settings=_RETRIEVAL_CLIPS,
    ),
)

FACTS = {facts.name: facts for facts in _ALL}
"""Public data sets by the name that `--dataset` takes."""


def resolve_protocol(name: str, protocol: str | None) -> str | None:
    """The protocol that is meant: the data set's first where none is named, None where there are none.

    Raises:
        ConfigError: If the data set has no such protocol.
    """
    known = FACTS[name].protocols if name in FACTS else ()
    if protocol is None:
        return known[0] if known else None
    if protocol not in known:
        choices = f"takes {', '.join(known)} for {name}" if known else f"has no effect on --dataset {name}"
        raise ConfigError(f"--protocol {choices}; found {protocol!r}")
    return protocol


def frame_rate(name: str) -> float | None:
    """Frames per second of a data set's JPEG folders; None where it is not known."""
    return FACTS[name].frame_fps if name in FACTS else None
