"""The weights of a Hugging Face folder, read range by range: a rank touches the bytes of its own shards alone.

    weights = FolderWeights(folder, model, missing=lambda: DrawnWeights(model, seed))
    weights.copy_to(shard, "model.layers.0.mlp.down_proj.weight", offset)

The files are mapped, never read whole, and every value is copied: a shard that were the mapping itself would change
with the file. The kernel takes mapped pages back whenever it needs memory.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elastic_lsopt.checkpoint.huggingface.file_layout import Range, layout_of_files
from elastic_lsopt.checkpoint.huggingface.weights import Weights
from elastic_lsopt.checkpoint.safetensors_file import BY_NAME
from elastic_lsopt.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECE_BYTES = 16 * 2**20
"""Bytes of a file that are copied at once where they cannot be used in place."""
SHOWN = 3


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype's name, its shape, the place of its bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Of its first byte, from the start of the file."""


class FolderWeights:
    """The folder's tensors by the names of `model`, which has shapes and needs no memory.

    What the files do not hold, a new head or a pooler, is taken from `missing()`, called only then. Raises UserError,
    one line, for a folder without safetensors, a file that is missing or cut short, a shape that is not the model's, a
    block or an embedding without weights (another architecture), and a quantised folder.
    """

    def __init__(self, folder: str | Path, model: Any, missing: Callable[[], Weights]) -> None:
        self._folder = folder = Path(folder)
        self._maps: dict[str, mmap.mmap] = {}
        stored = stored_tensors(folder)
        shapes = {name: tuple(t.shape) for name, t in _named(model).items()}
        try:
            layout, self.unused = layout_of_files(model, shapes, stored)
        except LookupError as error:
            raise UserError(
                f"{folder}: {error}, which cannot be read in shards; save it anew by transformers."
            ) from None
        for key, place in layout.items():
            if stored[key].shape != place.shape:
                raise UserError(
                    f"{folder}: {key} has shape {list(stored[key].shape)} in the files and {list(place.shape)} in the "
                    "model that config.json describes; give the config that was saved with them."
                )
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._held: dict[str, list[tuple[Range, Stored]]] = {}
        for key, place in layout.items():
            if stored[key].dtype not in (_FLOATS if place.name in parameters else BY_NAME):
                raise UserError(f"{folder}: {key} is of type {stored[key].dtype}, which is quantised; give the weights "
                                "in bf16, fp16 or fp32.")  # fmt: skip
            self._held.setdefault(place.name, []).append((place, stored[key]))
        self._stand_in = _tied(model, self._held, self._equal)
        self.newly_drawn = [
            name
            for name, p in model.named_parameters()
            if sum(place.numel for place, _ in self._runs(name)) != p.numel()
        ]
        _refuse_missing(folder, model, self.newly_drawn)
        self._missing = missing() if self.newly_drawn else None

    def told(self) -> list[str]:
        """What a user should know of the load, a line each; nothing where every tensor has its place."""
        lines = []
        if self.newly_drawn:
            lines.append(f"{self._folder} holds no {_some(self.newly_drawn)}: drawn from the seed.")
        if self.unused:
            lines.append(f"{self._folder} also holds {_some(self.unused)}, which the model has no place for: left out.")
        return lines

    def holds(self, name: str) -> bool:
        """Whether the files hold this parameter or buffer."""
        return bool(self._runs(name)) and name not in self.newly_drawn

    def copy_to(self, target: Tensor, name: str, offset: int) -> None:
        if not self.holds(name):
            assert self._missing is not None
            self._missing.copy_to(target, name, offset)
            return
        end = offset + target.numel()
        for place, stored in self._runs(name):
            low, high = max(offset, place.offset), min(end, place.offset + place.numel)
            if low < high:
                self._read(target[low - offset : high - offset], stored, low - place.offset)

    def _runs(self, name: str) -> Sequence[tuple[Range, Stored]]:
        return self._held.get(self._stand_in.get(name, name), ())

    def _read(self, target: Tensor, stored: Stored, first: int) -> None:
        """Elements from `first` of a stored tensor; without a copy between where its bytes are aligned."""
        dtype = BY_NAME[stored.dtype]
        begin, file = stored.begin + first * dtype.itemsize, self._mapped(stored.file)
        step = PIECE_BYTES // dtype.itemsize
        for at in range(0, target.numel(), step):
            part = target[at : at + step]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that nobody may write to it
                raw = torch.frombuffer(
                    file, dtype=torch.uint8, count=part.numel() * dtype.itemsize, offset=begin + at * dtype.itemsize
                )
            part.copy_((raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()).view(dtype))

    def _mapped(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            with (self._folder / name).open("rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[name]

    def _equal(self, one: str, other: str) -> bool:
        """Whether two names stand for the same values in the files."""
        numel = self._held[one][0][0].numel
        for at in range(0, numel, PIECE_BYTES // 4):
            pair = torch.empty(2, min(PIECE_BYTES // 4, numel - at))
            for row, name in zip(pair, (one, other), strict=True):
                self._read(row, self._held[name][0][1], at)
            if not torch.equal(pair[0], pair[1]):
                return False
        return True


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


_FLOATS = ("F64", "F32", "BF16", "F16")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files, by its key. Raises UserError for a folder that is not whole."""
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index} is broken: it holds no weight_map; copy the folder again.") from None
    elif (folder / SINGLE).exists():
        names = [SINGLE]
    else:
        raise UserError(f"{folder} holds no {SINGLE} and no {INDEX}; give a folder with safetensors, as "
                        "save_pretrained writes it (weights in pickles are not read).")  # fmt: skip
    out: dict[str, Stored] = {}
    for name in names:
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise UserError(f"{folder} is not whole: {INDEX} names {name}, which is not there; copy the folder again.")
        try:
            with safe_open(path, framework="pt"):  # type: ignore[no-untyped-call]
                pass  # checks that the header is one, and that the file is as long as it says
            out |= _header(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is broken: {' '.join(str(error).split())[:200]}; copy it again.") from None
    return out


def _header(path: Path) -> dict[str, Stored]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        told: Mapping[str, Any] = json.loads(file.read(length))
    return {
        key: Stored(path.name, own["dtype"], tuple(own["shape"]), 8 + length + own["data_offsets"][0])
        for key, own in told.items()
        if key != "__metadata__"
    }


def _named(model: Any) -> dict[str, Tensor]:
    """Parameters and lasting buffers, tied ones under each of their names."""
    return model.state_dict(keep_vars=True)


def _tied(model: Any, held: Mapping[str, Any], equal: Any) -> dict[str, str]:
    """For each name of a tied parameter that the files do not hold, the one that they do.

    Where they hold both with different values the model is untied, as transformers does: its config was wrong.
    """
    out: dict[str, str] = {}
    for target, source in list((getattr(model, "all_tied_weights_keys", None) or {}).items()):
        if target in held and source in held:
            if not equal(target, source):
                owner, _, own = target.rpartition(".")
                tied = model.get_parameter(target)
                setattr(model.get_submodule(owner), own, torch.nn.Parameter(torch.empty_like(tied), tied.requires_grad))
                model.all_tied_weights_keys.pop(target)
                model.config.tie_word_embeddings = False
        elif source in held:
            out[target] = source
        elif target in held:
            out[source] = target
    return out


def _refuse_missing(folder: Path, model: Any, missing: Sequence[str]) -> None:
    """A head or a pooler may be new; a block or the table of embeddings without weights is another architecture."""
    lists = tuple(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    table = next((n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight), None)
    needed = [name for name in missing if name == table or name.startswith(tuple(f"{each}." for each in lists))]
    if needed:
        more = f" and {len(needed) - 1} more" if len(needed) > 1 else ""
        raise UserError(
            f"{folder} holds no weights for {needed[0]}{more} of {type(model).__name__}: it is of another architecture "
            "than its config.json says, or not whole; copy it again."
        )
