"""Nothing in a step waits for a GPU: by what torch is asked for on a CPU, and by its own word where there is a GPU."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s4v.train import stack
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.transfer import find_streams

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

HOLDS_UP = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
"""What the host must have an answer to before it goes on."""


class AskedOf(TorchDispatchMode):
    """Writes down what a GPU would hold up the host for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = (
            [one for one in (args[1] if name.startswith("index") and len(args) > 1 else ()) if one is not None]
            if (name in ("index", "index_put", "index_put_", "_index_put_impl_"))
            else []
        )
        if name in HOLDS_UP or any(mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


TRAININGS = {
    "side4video": {},
    "narrow codes again": {"checkpoint_activations": True},
    "wide": {"side_width": 192},
    "groups": {"norm_clips": 2},
    "linear": {"head": "linear", "side_width": None},
    "attentive": {"head": "attentive", "side_width": None},
    "retrieval": {"task": "retrieval"},
    "words": {"task": "retrieval", "interaction": "wti"},
    "decorrelated": {"task": "retrieval", "interaction": "wti", "set": ("decorrelation=0.001",)},
    "the reference's": {"task": "retrieval", "negatives": "reference", "optimizer": "uncorrected-adam"},
    "all captions": {"task": "retrieval", "negatives": "all"},
}
QUICK = ("side4video", "groups", "linear", "words", "the reference's")


def config_for(int8_store, captioned_store, out, name, **changes):
    options = TRAININGS[name]
    store = captioned_store if options.get("task") == "retrieval" else int8_store
    values = dict(features=store, out=out, epochs=2, batch_size=4, side_width=64, device="cpu", warmup_epochs=1.0)
    return TrainConfig(**{**values, **options, **changes})


@contextmanager
def around_steps(monkeypatch, enter, first=0):
    """Open a context around what every batch teaches, from the so-manieth one on; counts them."""
    learn, seen = stack.Stack.learn, []

    def watched(self, *arguments, **options):
        seen.append(None)
        if len(seen) <= first:
            return learn(self, *arguments, **options)
        with enter():
            return learn(self, *arguments, **options)

    monkeypatch.setattr(stack.Stack, "learn", watched)
    yield seen
    monkeypatch.undo()


def test_what_holds_up_the_host_is_seen():
    with AskedOf() as mode:
        x = torch.arange(4.0)
        x.sum().item()
        x[x > 1]
        x[x > 1] = 0
        x[torch.tensor([1, 2])].masked_fill(x[:2] > 0, 1.0).topk(1)
    assert len(mode.asked) == 3


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TRAININGS]
)
def test_a_step_asks_a_gpu_for_nothing(int8_store, captioned_store, tmp_path, monkeypatch, name):
    mode = AskedOf()
    with around_steps(monkeypatch, lambda: mode) as seen:
        train_run(config_for(int8_store, captioned_store, tmp_path / "run", name))
    assert len(seen) >= 2 and mode.asked == []


@contextmanager
def forbidding_waits():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_CUDA
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", TRAININGS)
def test_a_step_on_a_gpu_waits_for_nothing(int8_store, captioned_store, tmp_path, monkeypatch, name, precision):
    """From the second one on: the first moves what stays on the GPU."""
    with around_steps(monkeypatch, forbidding_waits, first=1) as seen:
        changes = {"device": "cuda", "precision": precision}
        train_run(config_for(int8_store, captioned_store, tmp_path / "run", name, **changes))
    assert len(seen) >= 2
    assert find_streams(torch.device("cuda", torch.cuda.current_device())) is not None
