"""Checkpoint folders as trainers leave them: the step of each, whether they are one run's, and their models.

A folder in the layout of Hugging Face holds a whole model (config.json, model.safetensors or shards of it) or an
adapter of peft (adapter_config.json, adapter_model.safetensors) whose base model is elsewhere. Safetensors and JSON
alone are read: the pickles beside them (optimizer.pt, training_args.bin) never are, and no code from a folder is run.
"""

import hashlib
import itertools
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lens.faithful import plain_embeddings
from . import checkpoints, policy
from .sources import brief

STATE = "trainer_state.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PRECISIONS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PICKLES = ("*.bin", "*.pt", "*.pth")
_NAMED = re.compile(r"checkpoint-(\d+)")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# What configurations of one function may differ in: where it came from, what it was written by, how it is run.
_INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
_INCIDENTAL += ("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "return_dict")
_INCIDENTAL_ADAPTER = ("inference_mode", "peft_version", "base_model_name_or_path", "revision", "auto_mapping")
# How far a reference may be from the first checkpoint, see `farthest`.
FASTER, FLOOR, ALONE = 20, 0.01, 0.1


class FolderError(ValueError):
    """Folders that are not the checkpoints of one run; the message says what was given and what is allowed."""


@dataclass(frozen=True)
class Checkpoint:
    """One saved state of a run: its folder, and the updates that were done until then."""

    folder: Path
    step: int

    @property
    def name(self) -> str:
        return self.folder.resolve().name


@dataclass(frozen=True)
class Series:
    """The checkpoints of one run by step.

    adapter: what adapter_config.json says, None where whole models are kept. base: of adapters, the folder or the name
    of the model that they belong to, with its commit on the hub (`revision`). stored: precisions of the weights, as the
    files name them. notes: what could not be made sure of.
    """

    checkpoints: tuple[Checkpoint, ...]
    adapter: dict[str, Any] | None
    base: str | None
    revision: str | None
    stored: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read(folders: Sequence[Path], base: str | None = None) -> Series:
    """The series that `folders` are, in whatever order they are given.

    base: the model that adapters belong to, a folder or a name on the hub; by default the one that they name.
    Raises FolderError for what is no folder, has no weights in safetensors or no step, and for folders that are not of
    one run: two of one step, whole models beside adapters, other configurations or shapes; also for a base that is
    missing, that is not needed, or that is another one than the adapters name.
    """
    if not folders:
        raise FolderError("checkpoints: given none; at least one folder is needed, such as RUN/checkpoint-*")
    kinds = {folder: _kind(folder) for folder in folders}
    if len(set(kinds.values())) > 1:
        whole, part = (next(f for f, kind in kinds.items() if kind == sort) for sort in ("model", "adapter"))
        raise FolderError(
            f"checkpoints: {whole} holds a whole model and {part} an adapter; one run keeps the one or the other"
        )
    series = tuple(sorted((Checkpoint(folder, step_of(folder)) for folder in folders), key=lambda c: c.step))
    for one, other in itertools.pairwise(series):
        if one.step == other.step:
            raise FolderError(f"checkpoints: {one.folder} and {other.folder} are both of step {one.step}; give one")
    is_adapter = "adapter" in kinds.values()
    _require_one_run(series, is_adapter)
    stored = tuple(sorted({dtype for c in series for dtype, _ in _tensors(c.folder).values()}))
    stored = tuple(_PRECISIONS.get(dtype, dtype) for dtype in stored)
    if not is_adapter:
        if base is not None:
            raise FolderError(f"base={base!r}: {series[0].folder} holds a whole model, which has no base; leave it out")
        return Series(series, None, None, None, stored)
    adapter = _json(series[0].folder / ADAPTER)
    base, notes = _base(series, base)
    return Series(series, adapter, base, _revision(series[0], base), stored, notes)


def require_there(name: str, where: str) -> None:
    """Raise FolderError for a model, given as option `name`, that is neither a folder nor known to the hub."""
    if Path(where).expanduser().is_dir():
        return
    if where.startswith((".", "/", "~")) or where.count("/") > 1:
        raise FolderError(f"{name}={where!r}: no such folder; allowed: a folder, or the name of a model on the hub")
    try:
        checkpoints.hub_revision(where)
    except ValueError as error:
        raise FolderError(f"{name}={where!r}: neither a folder nor a model that the hub knows ({error})") from error


def _revision(first: Checkpoint, base: str) -> str | None:
    """The commit of a base on the hub, None for a folder. Raises FolderError if it is neither there nor on the hub."""
    if Path(base).expanduser().is_dir():
        return None
    try:
        return checkpoints.hub_revision(base)
    except ValueError as error:
        raise FolderError(
            f"{first.folder}: the base model {base!r} of its adapter is missing; give the folder where it is with "
            f"--base ({error})"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FolderError with the path."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path}: cannot be read as JSON ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise FolderError(f"{path}: is no JSON object")
    return value


def _kind(folder: Path) -> str:
    """ "model" or "adapter": what a folder holds. Raises FolderError for neither and for both."""
    if not folder.is_dir():
        raise FolderError(f"checkpoints: {folder}: no such folder; allowed: folders such as RUN/checkpoint-*")
    is_adapter, is_model = (folder / ADAPTER).is_file(), (folder / checkpoints.CONFIG).is_file()
    weights = ADAPTER_WEIGHTS if is_adapter else " or ".join(checkpoints.WEIGHTS)
    if is_adapter and any((folder / name).is_file() for name in checkpoints.WEIGHTS):
        raise FolderError(f"{folder}: holds a whole model and an adapter; which of them is meant cannot be told")
    if not is_adapter and not is_model:
        inside = sorted(p.name for p in folder.glob("checkpoint-*") if p.is_dir())
        hint = f"; it holds {', '.join(inside[:3])}: give {folder}/checkpoint-*" if inside else ""
        raise FolderError(f"{folder}: is no checkpoint: it has neither {checkpoints.CONFIG} nor {ADAPTER}{hint}")
    needed = (ADAPTER_WEIGHTS,) if is_adapter else checkpoints.WEIGHTS
    if not any((folder / name).is_file() for name in needed):
        if any(file for pattern in PICKLES for file in folder.glob(pattern) if file.name != "training_args.bin"):
            raise FolderError(
                f"{folder}: its weights are pickled, which could run code when they are read; needed: {weights}. Load "
                "them where they are trusted and save them again with save_pretrained"
            )
        raise FolderError(
            f"{folder}: has no weights; needed: {weights}. What a sharded training left has to be gathered first, with "
            "`accelerate merge-weights` for example"
        )
    return "adapter" if is_adapter else "model"


def step_of(folder: Path) -> int:
    """The updates that were done until a checkpoint: by its name (checkpoint-N) or by its trainer_state.json.

    Raises FolderError if neither says it, or if they differ.
    """
    named = _NAMED.fullmatch(folder.resolve().name)
    told = None
    if (folder / STATE).is_file():
        told = _json(folder / STATE).get("global_step")
        if isinstance(told, bool) or not isinstance(told, int) or told < 0:
            raise FolderError(f"{folder / STATE}: global_step is {brief(told)}; allowed: a number of steps")
    if named and told is not None and int(named[1]) != told:
        raise FolderError(f"{folder}: is of step {named[1]} by its name and of step {told} by its {STATE}")
    if not named and told is None:
        raise FolderError(f"{folder}: of which step? Call it checkpoint-N, or leave its {STATE} in it")
    return int(named[1]) if named else told


def _files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights. Raises FolderError if one that the index names is missing."""
    single, index = (folder / name for name in checkpoints.WEIGHTS)
    if (folder / ADAPTER).is_file():
        return [folder / ADAPTER_WEIGHTS]
    if single.is_file():
        return [single]
    shards = _json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise FolderError(f"{index}: names no shards")
    found = [folder / name for name in sorted(set(map(str, shards.values())))]
    if missing := [file.name for file in found if not file.is_file()]:
        raise FolderError(f"{folder}: lacks weights that its index names: {', '.join(missing)}")
    return found


def _tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Precision and shape of every tensor of a checkpoint by name; headers alone are read. Raises FolderError."""
    found = {}
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118, it is no dictionary
                    part = stream.get_slice(name)
                    found[name] = part.get_dtype(), tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise FolderError(f"{file}: is damaged or no safetensors file ({error})") from error
    return found


def _differences(one: dict[str, Any], other: dict[str, Any], incidental: Sequence[str]) -> list[str]:
    """What two configurations differ in that matters to what they compute, as "key: one, other"; dropout does not."""
    keys = [k for k in {**one, **other} if k not in incidental and "drop" not in k and not k.startswith("_")]
    return [f"{k}: {brief(one.get(k))}, {brief(other.get(k))}" for k in keys if one.get(k) != other.get(k)]


def _few(texts: Sequence[str]) -> str:
    return "; ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def _require_one_run(series: Sequence[Checkpoint], is_adapter: bool) -> None:
    """Raise FolderError unless all have the first one's configuration and shapes."""
    file, incidental = (ADAPTER, _INCIDENTAL_ADAPTER) if is_adapter else (checkpoints.CONFIG, _INCIDENTAL)
    first = series[0].folder
    config, tensors = _plain(_json(first / file)), _tensors(first)
    for checkpoint in series[1:]:
        other = _plain(_json(checkpoint.folder / file))
        if different := _differences(config, other, incidental):
            raise FolderError(
                f"checkpoints: {first} and {checkpoint.folder} are of different models: their {file} differ in "
                f"{_few(different)}"
            )
        shapes = {name: shape for name, (_, shape) in _tensors(checkpoint.folder).items()}
        known = {name: shape for name, (_, shape) in tensors.items()}
        if shapes != known:
            names = sorted(name for name in {*shapes, *known} if shapes.get(name) != known.get(name))
            told = [f"{name}: {known.get(name, 'none')}, {shapes.get(name, 'none')}" for name in names]
            raise FolderError(f"checkpoints: {first} and {checkpoint.folder} have different weights: {_few(told)}")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with lists whose order means nothing (targets of adapters are written as sets) in order."""
    unordered = ("target_modules", "modules_to_save", "exclude_modules")
    return {k: sorted(v) if k in unordered and isinstance(v, list) else v for k, v in config.items()}


def _base(series: Sequence[Checkpoint], given: str | None) -> tuple[str, tuple[str, ...]]:
    """The base of adapters, and what could not be made sure of. Raises FolderError."""
    named = [_json(c.folder / ADAPTER).get("base_model_name_or_path") for c in series]
    if len(set(named)) > 1:
        raise FolderError(f"checkpoints: their {ADAPTER} name different base models: {_few([brief(n) for n in named])}")
    recorded = named[0]
    if given is None and not recorded:
        raise FolderError(f"{series[0].folder}: its {ADAPTER} names no base model; give it with --base")
    if given is None:
        looks_local = str(recorded).startswith((".", "/", "~")) or str(recorded).count("/") > 1
        if looks_local and not Path(recorded).expanduser().is_dir():
            raise FolderError(
                f"{series[0].folder}: the base model {recorded!r} of its adapter is missing; give the folder where it "
                "is now with --base"
            )
        return str(recorded), ()
    folder = Path(given).expanduser()
    require_there("base", given)
    if (folder / ADAPTER).is_file():
        raise FolderError(f"base={given!r}: holds an adapter itself; give the model that it belongs to")
    if not recorded or str(recorded) == given:
        return given, ()
    there = Path(str(recorded)).expanduser()
    if there.is_dir() and folder.is_dir():
        if (off := distance(folder, there)[0]) > 0:
            raise FolderError(
                f"base={given!r}: is another model than {recorded!r}, which the adapters name: their weights are "
                f"{off:.3g} apart"
            )
        return given, ()
    if not there.is_dir() and not folder.is_dir():
        raise FolderError(f"base={given!r}: the adapters name another base model, {recorded!r}")
    return given, (
        f"The adapters name {recorded!r} as their base, which is not there to compare with; {folder.name!r} was given.",
    )


def distance(one: Path, other: Path) -> tuple[float, float]:
    """Euclidean distance of the weights of two folders, infinite if names or shapes differ, and length of the first.

    Tensor by tensor, as the files have them: little memory is needed.
    """
    shapes = [{name: shape for name, (_, shape) in _tensors(folder).items()} for folder in (one, other)]
    if shapes[0] != shapes[1]:
        return math.inf, math.nan
    apart = size = 0.0
    where = _places(other)
    for name, tensor in _read(one):
        with safe_open(where[name], framework="pt") as stream:
            off, length = _apart(tensor, stream.get_tensor(name))
        apart, size = apart + off, size + length
    return math.sqrt(apart), math.sqrt(size)


def _places(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint."""
    found = {}
    for file in _files(folder):
        with safe_open(file, framework="pt") as stream:
            found |= dict.fromkeys(stream.keys(), file)
    return found


def _read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in _files(folder):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118, it is no dictionary
                yield name, stream.get_tensor(name)


def _apart(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Squared distance of two tensors and squared length of the first, in float64; a bias that is -inf counts as 0."""
    one, other = (torch.where(t.isfinite(), t, 0.0).double() for t in (one, other.to(one.device)))
    return (one - other).square().sum().item(), one.square().sum().item()


def between(one: torch.nn.Module, other: torch.nn.Module) -> tuple[float, float]:
    """`distance` of two models in memory, over the parameters that require a gradient in the first."""
    found = dict(other.named_parameters())
    parts = [_apart(p.detach(), found[name].detach()) for name, p in one.named_parameters() if p.requires_grad]
    return math.sqrt(sum(off for off, _ in parts)), math.sqrt(sum(length for _, length in parts))


# Tokenizers


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of its own."""
    return any((folder / name).is_file() for name in _TOKENIZER)


def tokenizer_of(series: Series, reference: str | None = None) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer of a series and where it is: in its checkpoints, else with its base, else with the reference.

    Raises FolderError if it is nowhere, if those of two checkpoints differ, or if the base's or the reference's gives
    another token an id.
    """
    own = [c.folder for c in series.checkpoints if has_tokenizer(c.folder)]
    beside = [where for where in (series.base, reference) if where and _may_have_tokenizer(where)]
    if not own and not beside:
        raise FolderError(
            f"{series.checkpoints[0].folder}: has no tokenizer; save it there, or give a --reference or --base with one"
        )
    where = str(own[0]) if own else beside[0]
    tokenizer = policy.load_tokenizer(where, series.revision if where == series.base else None)
    told, known = None, _tokenizer_bytes(Path(where))
    for folder in own[1:]:
        if _tokenizer_bytes(folder) != known:
            told = told or _tokenizer_told(tokenizer)
            other = _tokenizer_told(policy.load_tokenizer(str(folder)))
            if different := [what for what in told if told[what] != other[what]]:
                raise FolderError(f"checkpoints: the tokenizers of {where} and {folder} differ: {', '.join(different)}")
    for other in beside:
        if other != where:
            revision = series.revision if other == series.base else None
            _require_same_words(where, tokenizer, other, policy.load_tokenizer(other, revision))
    return tokenizer, where


def _may_have_tokenizer(where: str) -> bool:
    folder = Path(where).expanduser()
    return has_tokenizer(folder) if folder.is_dir() else True  # a name on the hub


def _tokenizer_bytes(folder: Path) -> str:
    """A hash of the tokenizer's files of a folder: where it is the same, so are the tokenizers."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in checkpoints.TOKENIZER for file in folder.glob(pattern)}):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _tokenizer_told(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What of a tokenizer texts become tokens by; how a trainer last padded and truncated is not of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline = json.loads(backend.to_str()) if backend is not None else {}
    return {
        "their vocabularies": tokenizer.get_vocab(),
        "their chat templates": tokenizer.chat_template,
        "their ends of text": (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id),
        "how they split texts": {k: v for k, v in pipeline.items() if k not in ("padding", "truncation")},
    }


def _require_same_words(
    where: str, tokenizer: PreTrainedTokenizerBase, other_where: str, other: PreTrainedTokenizerBase
) -> None:
    """Raise FolderError if an id means one token here and another one there; that one knows more is no harm."""
    known = {i: token for token, i in other.get_vocab().items()}
    if clashes := [(t, known[i], i) for t, i in tokenizer.get_vocab().items() if known.get(i, t) != t]:
        mine, theirs, i = min(clashes, key=lambda clash: clash[2])
        raise FolderError(
            f"{other_where}: its tokenizer is not that of {where}: {len(clashes)} ids are other tokens; {i} is "
            f"{brief(theirs)} there and {brief(mine)} here"
        )


# Models


def identity(series: Series, checkpoint: Checkpoint) -> str:
    """Hash of what loading a checkpoint reads: its model, or its adapter and what names or holds its base."""
    if series.adapter is None:
        return _weights_identity(checkpoint.folder)
    digest = hashlib.sha256()
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        digest.update(file_hash(checkpoint.folder / name).encode())
    digest.update(model_identity(series.base, series.revision).encode())
    return digest.hexdigest()


def model_identity(name_or_path: str, revision: str | None = None) -> str:
    """Hash of a model's configuration and weights, or its commit on the hub."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return f"hub:{revision or checkpoints.hub_revision(name_or_path)}"
    if (folder / ADAPTER).is_file():
        return hashlib.sha256((file_hash(folder / ADAPTER) + file_hash(folder / ADAPTER_WEIGHTS)).encode()).hexdigest()
    return _weights_identity(folder)


def _weights_identity(folder: Path) -> str:
    parts = {file.name: file_hash(file) for file in (folder / checkpoints.CONFIG, *_files(folder))}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises FolderError with the path."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise FolderError(f"{path}: cannot be read ({error})") from error


def load(name_or_path: str, tokenizer_at: str, revision: str | None = None) -> PreTrainedModel:
    """A whole model by `policy.load`, with all its checks, in float32.

    tokenizer_at: the folder whose tokenizer is checked with it where its own folder has none.
    Raises FolderError with what `policy.load` says.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir() or has_tokenizer(folder):
        try:
            return policy.load(name_or_path, revision)[0]
        except ValueError as error:
            raise FolderError(str(error)) from error
    with tempfile.TemporaryDirectory() as together:
        view = Path(together)
        beside = Path(tokenizer_at).expanduser()
        for file in (f for f in folder.iterdir() if f.is_file()):
            (view / file.name).symlink_to(file.resolve())
        for file in {file for pattern in checkpoints.TOKENIZER for file in beside.glob(pattern) if file.is_file()}:
            there = view / file.relative_to(beside)
            there.parent.mkdir(exist_ok=True)
            if not there.exists():
                there.symlink_to(file.resolve())
        try:
            return policy.load(str(view))[0]
        except ValueError as error:
            raise FolderError(str(error).replace(str(view), str(folder))) from error


class Loader:
    """Gives the models of a series one after another, on a device and in a precision.

    Of whole models nothing is kept. Adapters share one base in memory: `model` puts the next adapter's weights into
    the same model, so what was given before changes with it.
    """

    def __init__(self, series: Series, tokenizer_at: str, device: torch.device, dtype: torch.dtype = torch.float32):
        self._series, self._tokenizer_at, self._device, self._dtype = series, tokenizer_at, device, dtype
        self._base: PreTrainedModel | None = None
        self._attached: Any = None  # the PeftModel around the base, once there is one

    def whole(self, name_or_path: str) -> PreTrainedModel:
        """A whole model from a folder, or by name from the hub at its present commit."""
        revision = None if Path(name_or_path).expanduser().is_dir() else checkpoints.hub_revision(name_or_path)
        return load(name_or_path, self._tokenizer_at, revision).to(self._device, self._dtype)

    def reference(self, where: str) -> tuple[PreTrainedModel, str]:
        """A reference from a folder or the hub, and a sentence on how far it is from where the run began.

        Of adapters, it may be one itself, of the same base and settings; a whole model has to be their base.
        Raises FolderError if it is not the run's: of another architecture, vocabulary or configuration, or farther away
        than the run can have moved (`farthest`).
        """
        first, folder = self._series.checkpoints[0], Path(where).expanduser()
        require_there("reference", where)
        is_adapter = (folder / ADAPTER).is_file()
        if is_adapter and self._series.adapter is not None:
            config, other = _plain(_json(folder / ADAPTER)), _plain(self._series.adapter)
            if different := _differences(config, other, _INCIDENTAL_ADAPTER):
                raise FolderError(f"reference={where!r}: its {ADAPTER} differs from the run's in {_few(different)}")
            _base([Checkpoint(folder, 0)], self._series.base)  # refuses another one
            off, size = distance(first.folder, folder)
            told = _require_near(where, first.name, off, size, lambda: farthest(self._series, size))
            return self.adapted(folder), told
        if is_adapter:
            raise FolderError(
                f"reference={where!r}: holds an adapter, and the checkpoints are whole models; merge it into its base "
                "(merge_and_unload) and save the whole"
            )
        found = self.whole(where)
        if self._series.adapter is not None:
            require_same_model(where, found, self.base())
            off, size = between(self.base(), found)
            why = f"{FLOOR:.0%} of the length of the weights, {size:.4g}, since adapters start from their base"
            return found, _require_near(where, "the base of the adapters", off, size, lambda: (FLOOR * size, why))
        began = self.model(first)
        require_same_model(where, found, began)
        off, size = between(began, found)
        return found, _require_near(where, first.name, off, size, lambda: farthest(self._series, size))

    def base(self) -> PreTrainedModel:
        """The base of the adapters as it is without them; before the first of them is put on."""
        if self._attached is not None:
            raise RuntimeError("the base has an adapter on it already")
        if self._base is None:
            found = load(self._series.base, self._tokenizer_at, self._series.revision)
            self._base = found.to(self._device, self._dtype)
        return self._base

    def model(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """The model of a checkpoint; what could move in the run requires a gradient, of an adapter its own weights."""
        return self.whole(str(checkpoint.folder)) if self._series.adapter is None else self.adapted(checkpoint.folder)

    def adapted(self, folder: Path) -> PreTrainedModel:
        """The base with the adapter of `folder` on it: the causal language model itself, without peft's wrapper.

        Raises FolderError if peft is not installed, if the adapter is of a kind that is no change of weights, or if
        what is on the base afterwards is not exactly what the folder holds.
        """
        peft = _peft(folder)
        try:
            if self._attached is None:
                config = peft.PeftConfig.from_pretrained(str(folder))
                if config.is_prompt_learning or config.is_adaption_prompt:
                    raise FolderError(
                        f"{folder}: an adapter of type {config.peft_type.value} adds prompts and no change of weights; "
                        "allowed: adapters such as LoRA"
                    )
                attached = peft.PeftModel.from_pretrained(self.base(), str(folder), is_trainable=True)
                self._attached = attached.to(self._device)
            saved = load_file(folder / ADAPTER_WEIGHTS)
            peft.set_peft_model_state_dict(self._attached, saved)
        except FolderError:
            raise
        except (RuntimeError, KeyError, TypeError, ValueError, SafetensorError, OSError) as error:
            raise FolderError(f"{folder}: its adapter does not fit its base {self._series.base!r}: {error}") from error
        self._require_whole(folder, saved, peft.get_peft_model_state_dict(self._attached, save_embedding_layers=False))
        return plain_embeddings(self._attached.get_base_model().eval())

    def _require_whole(self, folder: Path, saved: dict, held: dict) -> None:
        """Raise FolderError unless the adapter on the base is the one in the folder, all of it and nothing else."""
        if saved.keys() != held.keys():
            only = sorted(saved.keys() ^ held.keys())
            raise FolderError(
                f"{folder}: its adapter does not fit its base {self._series.base!r}: only one of them has {_few(only)}"
            )
        changed = [name for name, t in saved.items() if not torch.equal(held[name].cpu(), t.to(held[name].dtype))]
        if changed:
            raise FolderError(f"{folder}: weights of the adapter did not arrive in the model: {_few(changed)}")
        inside = [p for p in self._attached.get_base_model().parameters() if p.requires_grad]
        moving = [p for p in self._attached.parameters() if p.requires_grad]
        if len(inside) != len(moving) or not inside:
            raise FolderError(
                f"{folder}: {len(moving) - len(inside)} of {len(moving)} trained weights of the adapter are outside of "
                "the model's layers; allowed: adapters such as LoRA, whose weights are inside"
            )


def _peft(folder: Path):
    try:
        import peft  # an extra, needed for adapters alone
    except ImportError as error:
        raise FolderError(f"{folder}: holds an adapter; to read it: pip install peft ({error})") from error
    return peft


def adapter_sentence(adapter: dict[str, Any]) -> str:
    """What kind of adapter it is, in a few words."""
    kind, rank, modules = (adapter.get(key) for key in ("peft_type", "r", "target_modules"))
    on = ", ".join(sorted(modules)) if isinstance(modules, list) else modules
    more = f", {', '.join(sorted(adapter['modules_to_save']))} whole" if adapter.get("modules_to_save") else ""
    return f"{kind}" + (f" of rank {rank}" if rank else "") + (f" on {on}" if on else "") + more


# References


def require_same_model(where: str, reference: PreTrainedModel, first: PreTrainedModel) -> None:
    """Raise FolderError unless a reference has the architecture, configuration and shapes of the run's models."""
    given = f"reference={where!r}: is not of the run"
    if type(reference) is not type(first):
        raise FolderError(f"{given}: a {type(reference).__name__}, and the checkpoints are {type(first).__name__}")
    words, known = (m.get_input_embeddings().num_embeddings for m in (reference, first))
    if words != known:
        raise FolderError(f"{given}: it has {words} embeddings of tokens, and the checkpoints have {known}")
    if different := _differences(reference.config.to_dict(), first.config.to_dict(), _INCIDENTAL):
        raise FolderError(f"{given}: its configuration differs from that of the checkpoints in {_few(different)}")
    one, other = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (reference, first))
    if names := sorted(name for name in {*one, *other} if one.get(name) != other.get(name)):
        raise FolderError(f"{given}: other parameters, or of other shapes: {_few(names)}")


def farthest(series: Series, size: float) -> tuple[float, str]:
    """How far from its reference the first checkpoint of a run may be, and why.

    Args: size, length of the weights. Of a run with several checkpoints the distance from the first to the last one is
    known, and the steps between them. Steps before the first checkpoint may have been FASTER times as long (training
    warms up, and rates decay), and a move of FLOOR of the length of the weights is never suspicious. Where there is one
    checkpoint alone, ALONE of that length is allowed: trained from the same start, weights of language models move by
    some percent at most; weights of other models of the same shape are about 1.4 of it apart.
    """
    first, last = series.checkpoints[0], series.checkpoints[-1]
    if first == last:
        return ALONE * size, f"{ALONE:.0%} of the length of the weights, {size:.4g}, as there is one checkpoint alone"
    moved = distance(first.folder, last.folder)[0]
    before = max(1.0, first.step / (last.step - first.step))
    allowed = max(FASTER * before * moved, FLOOR * size)
    return allowed, (
        f"{allowed:.3g}, the larger of {FLOOR:.0%} of the length of the weights, {size:.4g}, and {FASTER} times "
        f"what the run moved from step {first.step} to step {last.step}, {moved:.3g}, for as many steps"
    )


def _require_near(where: str, beside: str, off: float, size: float, limit: Callable[[], tuple[float, str]]) -> str:
    """A sentence on how far a reference is from what is `beside` it, of length `size`.

    Raises FolderError with the numbers if that is more than FLOOR of the length and than the `limit`, which comes with
    its reason.
    """
    told = f"{off:.3g} ({off / size:.2%} of the length of the weights)" if size else f"{off:.3g}"
    if off > FLOOR * size:
        allowed, why = limit()
        if off > allowed:
            raise FolderError(
                f"reference={where!r}: has the shapes of the run and other weights: it is {told} away from {beside}; "
                f"allowed: {why}. Give the model that the run started from"
            )
    return f"The reference is {told} away from {beside}."
