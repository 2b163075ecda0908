"""Weights of a tower: where they come from, and how they get into memory once, in the precision they run in."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import WeightsError
from ..files import hash_file
from .facts import Activation

KNOWN_WORDS = "token_embedding.rows"
"""In weights that hold only some words of a vocabulary: which, as ids of the tokenizer, (R,) integers."""


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """Where a model's weights come from."""

    label: str
    sha256: str
    file: Path | None
    """None for random weights."""
    seed: int = 0
    pretrained_cfg: Mapping[str, Any] | None = None
    activation: Activation | None = None
    """With which they were trained, where the file tells."""


def find_random(weights: str, seed: int, architecture: str, config: Any) -> WeightsSource | None:
    """Random weights, where they are asked for as `random` or `random:SEED`; else None.

    Args:
        weights: As the user wrote it.
        seed: Where none is written.
        architecture: Whose weights they are.
        config: Its sizes, as JSON: the hash is of what the weights are drawn from.

    Raises:
        WeightsError: If the seed is no number.
    """
    if weights != "random" and not weights.startswith("random:"):
        return None
    digits = weights.partition(":")[2]
    if digits and not digits.isdecimal():
        raise WeightsError(f"--weights random takes a seed as random:0; found {weights!r}")
    seed = int(digits or seed)
    recipe = json.dumps([architecture, config, seed], sort_keys=True)
    return WeightsSource(f"random:{seed}", hashlib.sha256(recipe.encode()).hexdigest(), None, seed)


def find_file(weights: str) -> WeightsSource | None:
    """The weights of a local file; None where there is no such file.

    TorchScript is how OpenAI released its models, all of them trained with QuickGELU. No other file tells.
    """
    if not Path(weights).is_file():
        return None
    path = Path(weights).resolve()
    activation: Activation | None = "quick_gelu" if _is_torchscript(path) else None
    return WeightsSource(str(path), hash_file(path), path, activation=activation)


_CHANGING_REGISTRATION = threading.RLock()


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters take no memory, while their buffers are computed as usual.

    Building on the meta device as a whole would lose non-persistent buffers (rope tables, k_bias, attn_mask): no
    checkpoint holds them, so they would stay uninitialised although every key loads.

    It holds for modules of this thread. Another thread that wants the same waits: torch has one way to register
    parameters for all, and of two that change it at once the last would leave it changed.
    """
    with _CHANGING_REGISTRATION:
        register, owner = nn.Module.register_parameter, threading.get_ident()

        def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            register(module, name, parameter)
            if parameter is not None and threading.get_ident() == owner:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

        nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill_tower(
    tower: nn.Module,
    tensors: Mapping[str, torch.Tensor] | None,
    source: WeightsSource,
    prefixes: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    *,
    casts_buffers: bool = True,
) -> None:
    """Give a tower built on meta its memory and its weights, one tensor at a time, frozen and in evaluation mode.

    Args:
        tower: Built with `parameters_on_meta`.
        tensors: By name; None draws random weights.
        source: Where they come from.
        prefixes: Before the tower's names in the file, the more likely one first.
        device: Where it will run.
        dtype: Of its parameters.
        casts_buffers: Whether floating buffers get that dtype too, or stay as they are.

    Raises:
        WeightsError: If the tensors belong to another model.
    """
    names = {} if tensors is None else _match_names(tower, tensors, prefixes, source)
    for module in tower.modules():  # all memory first: taken between the values' it leaves holes, 1.2 GB beside ViT-E
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    for module_name, module in tower.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{module_name}.{name}" if module_name else name
            if tensors is None:
                values = draw_random(full, parameter.shape, source.seed)
            else:
                values = tensors[names[full]]
                if values.shape != parameter.shape:
                    raise WeightsError(
                        f"{source.label}: {names[full]} has shape {tuple(values.shape)}, "
                        f"this model needs {tuple(parameter.shape)}. They belong to another model."
                    )
            parameter.copy_(values)
        for name, buffer in list(module._buffers.items()):
            if buffer is None:
                continue
            full = f"{module_name}.{name}" if module_name else name
            if tensors is not None and full in names:
                buffer.copy_(tensors[names[full]])
            is_cast = casts_buffers and buffer.is_floating_point()
            module._buffers[name] = buffer.to(device, dtype if is_cast else None)
    tower.eval()


def draw_random(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Seeded weights of one parameter, the same whatever other parameters there are, on every device.

    Returns:
        float32: ones for the weights of norms and scales, zeros for biases, else normal with std fan_in^-0.5.
    """
    if len(shape) < 2:
        is_bias = name.endswith("bias")
        if name.endswith(("class_embedding", "cls_token")):
            return _draw_normal(name, shape, seed) * shape[-1] ** -0.5
        return torch.zeros(shape) if is_bias else torch.ones(shape)
    fan_in = shape[-1] if name.endswith(("embedding", "pos_embed", "cls_token")) else math.prod(shape[1:])
    return _draw_normal(name, shape, seed) * fan_in**-0.5


def _draw_normal(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator)


def open_tensors(source: WeightsSource) -> Mapping[str, torch.Tensor] | None:
    """The tensors of a weights file by name, read one at a time; None for random weights.

    Raises:
        WeightsError: If the file holds anything but plain tensors.
    """
    if source.file is None:
        return None
    try:
        if source.file.suffix == ".safetensors":
            return _spread_words(_LazyTensors(safe_open(source.file, framework="pt")))
        if _is_torchscript(source.file):
            return _open_torchscript(source.file)
        # mmap: tensors are read as they are copied, the file is never held whole. Files from before torch's zip
        # format cannot be mapped.
        state = torch.load(source.file, map_location="cpu", weights_only=True, mmap=_is_zip(source.file))
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, ValueError, EOFError, LookupError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise WeightsError(f"{source.file} is not a safetensors or torch file of plain tensors: {reason}") from error
    for wrapper in ("state_dict", "module"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise WeightsError(f"{source.file} holds no tensors by name")
    named = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name.removeprefix("module."): value for name, value in named.items()}


def _is_torchscript(path: Path) -> bool:
    """Whether a file is a compiled program with its weights, as `torch.jit.save` writes it."""
    if not _is_zip(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False  # told when it is read


def _open_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a compiled program by name; the program itself is not run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there are newer ways to compile
        return dict(torch.jit.load(path, map_location="cpu").state_dict())


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


class _LazyTensors(Mapping[str, torch.Tensor]):
    """A safetensors file as a mapping that reads what is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _spread_words(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Undo the saving of some words only: the others' embeddings are zero.

    A vocabulary of 49,408 words of which a model knows a hundred would be most of its file.
    """
    if KNOWN_WORDS not in tensors:
        return tensors
    rows, num_rows, weight = (tensors[f"token_embedding.{name}"] for name in ("rows", "num_rows", "weight"))
    whole = torch.zeros(int(num_rows), weight.shape[1], dtype=weight.dtype)
    whole[rows.long()] = weight
    return {**tensors, "token_embedding.weight": whole}


def _match_names(
    tower: nn.Module, tensors: Mapping[str, torch.Tensor], prefixes: tuple[str, ...], source: WeightsSource
) -> dict[str, str]:
    """Names in the file for the tower's parameters and persistent buffers.

    open_clip wraps timm towers as `trunk.`; EVA's own checkpoint files do not.
    """
    slots = dict(tower.state_dict(keep_vars=True))
    names, missing = {}, []
    for name in slots:
        candidates = [f"{prefix}{variant}" for prefix in prefixes for variant in (name, name.removeprefix("trunk."))]
        tensor_name = next((candidate for candidate in candidates if candidate in tensors), None)
        if tensor_name is None:
            missing.append(name)
        else:
            names[name] = tensor_name
    # Under the tower's own prefix everything must be used; the other tower's tensors are none of its business.
    unused = sorted({n for n in tensors if prefixes[0] and n.startswith(prefixes[0])} - set(names.values()))
    if missing or unused:
        parts = [
            f"{len(group)} {what} (first: {group[0]})"
            for what, group in (("tensors are missing", missing), ("are not known", unused))
            if group
        ]
        raise WeightsError(f"{source.label} does not fit this model: {'; '.join(parts)}. Are they another model's?")
    return names
