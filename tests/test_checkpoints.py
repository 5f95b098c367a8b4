"""What a checkpoint is: what loading reads counts, nothing else does, and nothing is read twice."""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants
from prefdyn.lab import checkpoints, policy
from prefdyn.lab.checkpoints import hub_revision, identity, tokenizer_identity, unchanged
from toys.models import tiny_policy

IDENTITIES = (identity, tokenizer_identity)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved checkpoint."""
    policy.save(*tiny_policy(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the files that are opened for hashing, as it happens."""
    names, opened = [], Path.open

    def noting(self, *args, **kwargs):
        names.append(self.name)
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", noting)
    checkpoints._hash.cache_clear()
    checkpoints._json.cache_clear()
    return names


def put(folder: Path, name: str, text: str = "{}") -> None:
    """Write a file with its folders; a change is seen whatever the clock of the file system is like."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(before + 10**9, before + 10**9))


# what is written, and which identities it changes: of the model, of the tokenizer
READ = {
    "config.json": (True, True),
    "generation_config.json": (True, True),  # which may name the end of text
    "model.safetensors": (True, False),
    "tokenizer.json": (True, True),
    "tokenizer_config.json": (True, True),
    "special_tokens_map.json": (True, True),
    "added_tokens.json": (True, True),
    "vocab.json": (True, True),
    "vocab.txt": (True, True),
    "merges.txt": (True, True),
    "spiece.model": (True, True),
    "tokenizer.model": (True, True),
    "tekken.json": (True, True),
    "chat_template.jinja": (True, True),
    "chat_template.json": (True, True),
    "additional_chat_templates/tools.jinja": (True, True),
    "adapter_config.json": (True, False),
    "README.md": (False, False),
    ".gitattributes": (False, False),
    ".git/HEAD": (False, False),
    ".cache/huggingface/download/model.safetensors.metadata": (False, False),
    "optimizer.pt": (False, False),
    "optimizer.safetensors": (False, False),
    "model-00001-of-00002.safetensors": (False, False),  # no index that is read names it
    "model.safetensors.index.json": (False, False),  # beside one whole file it is not read
    "pytorch_model.bin": (False, False),
    "trainer_state.json": (False, False),
    "checkpoint-8/model.safetensors": (False, False),
}


@pytest.mark.parametrize("name", READ)
def test_what_loading_reads_counts_and_nothing_else(folder, name):
    before = [identify(folder) for identify in IDENTITIES]
    put(folder, name, '{"model_type": "gpt2", "another": 1}')
    after = [identify(folder) for identify in IDENTITIES]
    assert tuple(a != b for a, b in zip(after, before, strict=True)) == READ[name]


def test_a_copy_is_the_same_and_a_file_that_is_gone_counts(folder, tmp_path):
    policy.save(*tiny_policy(), tmp_path / "elsewhere")
    assert [identify(tmp_path / "elsewhere") for identify in IDENTITIES] == [
        identify(folder) for identify in IDENTITIES
    ]
    before = identity(folder)
    (folder / "generation_config.json").unlink()
    assert identity(folder) != before


@pytest.fixture
def sharded(folder) -> Path:
    """The same in two shards."""
    (folder / "model.safetensors").unlink()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    put(folder, "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": shards}))
    for name in shards.values():
        put(folder, name, name)
    return folder


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model-00002-of-00002.safetensors", True),
        ("model-00003-of-00003.safetensors", False),
        ("model.safetensors", True),  # read instead of the shards
    ],
)
def test_of_shards_those_count_that_the_index_names(sharded, name, counts):
    before = identity(sharded)
    put(sharded, name, "other")
    assert (identity(sharded) != before) == counts


def test_the_index_counts_too(sharded):
    before = identity(sharded)
    index = sharded / "model.safetensors.index.json"
    put(sharded, index.name, index.read_text().replace('"a"', '"c"'))
    assert identity(sharded) != before


def test_a_configuration_may_name_the_weights(folder):
    known = json.loads((folder / "config.json").read_text())
    put(folder, "config.json", json.dumps(known | {"transformers_weights": "other.safetensors"}))
    put(folder, "other.safetensors", "a")
    before = identity(folder)
    put(folder, "model.safetensors", "not read")
    assert identity(folder) == before
    put(folder, "other.safetensors", "b")
    assert identity(folder) != before


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(folder, read):
    """However often runs are planned; and only the file that has changed."""
    first = {(identity(folder), tokenizer_identity(folder)) for _ in range(15)}
    assert len(first) == 1 and read.count("model.safetensors") == 1 and len(read) == len(set(read)) + 1
    assert sorted(name for name in read if read.count(name) > 1) == ["config.json"] * 2  # as JSON, and to be hashed
    put(folder, "generation_config.json")
    read.clear()
    assert identity(folder) not in {whole for whole, _ in first} and read == ["generation_config.json"]
    put(folder, "model.safetensors", "changed")
    read.clear()
    assert identity(folder) and read == ["model.safetensors"]


def test_a_file_of_the_same_size_and_time_in_its_place_is_seen(folder):
    before, path = identity(folder), folder / "tokenizer.json"
    known = path.stat()
    other = folder / "new"
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(known.st_atime_ns, known.st_mtime_ns))
    os.replace(other, path)
    assert path.stat().st_size == known.st_size and identity(folder) != before


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: put(f, "config.json", "{"), "config.json: cannot be read as JSON"),
        (lambda f: put(f, "config.json", "[]"), "config.json: is no JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights; needed: model.safetensors or model.safe"),
        (
            lambda f: [(f / "model.safetensors").unlink(), put(f, "model.safetensors.index.json")],
            "model.safetensors.index.json: names no shards",
        ),
    ],
)
def test_what_is_no_checkpoint_is_said(folder, spoil, said):
    spoil(folder)
    with pytest.raises(ValueError, match=said):
        identity(folder)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks weights that its index names: model-00002-of-00002.safetensors"):
        identity(sharded)


def test_a_folder_that_changed_after_planning_is_refused(folder):
    content, tokenizer = identity(folder), tokenizer_identity(folder)
    unchanged(folder, content)
    put(folder, "model.safetensors", "trained further")
    with pytest.raises(ValueError, match="its files have changed since the runs that need it were planned"):
        unchanged(folder, content)
    unchanged(folder, tokenizer, tokenizer_identity)
    put(folder, "tokenizer.json")
    with pytest.raises(ValueError, match="have changed"):
        unchanged(folder, tokenizer, tokenizer_identity)


def move(cache: Path, name: str, commit: str) -> None:
    """Let a name of the hub stand for a commit, in a cache as a download leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    put(repository, f"snapshots/{commit}/config.json", '{"model_type": "gpt2"}')
    put(repository, "refs/main", commit)


def test_a_name_on_the_hub_stands_for_a_commit_that_may_change(tmp_path, monkeypatch):
    """Without a network, as all tests are: what the local cache says."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for commit in ("a" * 40, "b" * 40):
        move(tmp_path, "some/model", commit)
        assert hub_revision("some/model") == commit
    with pytest.raises(ValueError, match=r"model='some/other': neither a folder nor known to the hub .*offline"):
        hub_revision("some/other")
    with pytest.raises(ValueError, match=r"model='no name!': neither a folder nor known"):
        hub_revision("no name!")


def test_the_hub_is_asked_once_and_goes_before_the_cache(tmp_path, monkeypatch):
    asked = []

    class Hub:
        def model_info(self, name, timeout):
            asked.append(name)
            return type("Info", (), {"sha": "c" * 40})

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(checkpoints, "HfApi", Hub)
    move(tmp_path, "asked/model", "a" * 40)
    assert {hub_revision("asked/model") for _ in range(3)} == {"c" * 40} and asked == ["asked/model"]
