"""Test that the hash covers all loaded files, and that unsafe checkpoints are rejected."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from sparselogits.errors import SparseLogitsWarning, TeacherError
from sparselogits.teacher import load_teacher
from sparselogits.teacher.checkpoint import find_checkpoint
from sparselogits.teacher.loading import load_language_model, load_tokenizer, weights_fingerprint
from tests.conftest import tiny_llama


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    made = tmp_path / "model"
    tiny_llama(tie_word_embeddings=False).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def fingerprint(folder: Path) -> str:
    return weights_fingerprint(find_checkpoint(str(folder)), load_language_model(str(folder)))


def sharded(folder: Path, names: list[str]) -> None:
    """Divide a folder's weights over files and write the index that names them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {key: names[i % len(names)] for i, key in enumerate(sorted(tensors))}
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        own = {key: tensors[key] for key, other in where.items() if other == name}
        if name.endswith(".safetensors"):
            save_file(own, file, metadata={"format": "pt"})
        else:
            torch.save(own, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_plain_folder_keeps_the_fingerprint_that_old_caches_hold(folder: Path) -> None:
    """Computed by hand, as the first version did."""
    import hashlib

    from sparselogits.identity import canonical_json

    config = load_language_model(str(folder)).config.to_dict()
    volatile = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
    stable = {k: v for k, v in config.items() if k not in (*volatile, "distributed_config")}
    digest = hashlib.sha256(canonical_json(json.loads(json.dumps(stable))))
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(b".safetensors")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    assert fingerprint(folder) == f"sha256:{digest.hexdigest()}"


def test_weights_in_a_subfolder_are_hashed(folder: Path) -> None:
    sharded(folder, ["a.safetensors", "sub/b.safetensors"])
    before = fingerprint(folder)
    tensors = load_file(folder / "sub/b.safetensors")
    changed = {key: value + 1 for key, value in tensors.items()}
    save_file(changed, folder / "sub/b.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != before
    save_file(tensors, folder / "sub/b.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) == before


@pytest.mark.parametrize(
    "name", ["../b.safetensors", "sub/../../b.safetensors", "/tmp/b.safetensors"]
)
def test_an_index_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    sharded(folder, ["a.safetensors", "b.safetensors"])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    changed = {k: v.replace("b.safetensors", name) for k, v in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))
    shutil.move(folder / "b.safetensors", folder.parent / "b.safetensors")
    with pytest.raises(TeacherError, match="outside of the model's folder"):
        load_language_model(str(folder))


def test_an_index_that_names_pickle_is_refused(folder: Path) -> None:
    sharded(folder, ["a.safetensors", "b.bin"])
    with pytest.raises(TeacherError, match=r"points to 'b.bin'; expected safetensors"):
        load_language_model(str(folder))


@pytest.mark.parametrize("weights", ["b.bin", "../model.safetensors", "x.safetensors.index.json"])
def test_a_configuration_that_names_other_weights_is_refused(folder: Path, weights: str) -> None:
    change_config(folder, transformers_weights=weights)
    with pytest.raises(TeacherError, match="weights"):
        load_language_model(str(folder))


def test_links_that_leave_the_folder_are_refused_unless_allowed(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere.safetensors"
    shutil.move(folder / "model.safetensors", elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(TeacherError, match=r"link to .*--allow linked-weights"):
        load_language_model(str(folder))
    with pytest.warns(SparseLogitsWarning, match="link to"):
        load_language_model(str(folder), allow=["linked-weights"])


def test_weights_that_are_no_regular_file_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(TeacherError, match="not a regular file"):
        load_language_model(str(folder))


def test_a_teacher_that_changes_while_it_is_read_is_refused(
    folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparselogits.teacher import loading

    kept = loading.weights_fingerprint

    def written_meanwhile(*given: Any) -> str:
        tiny_llama(seed=1, tie_word_embeddings=False).save_pretrained(folder)
        return kept(*given)

    monkeypatch.setattr(loading, "weights_fingerprint", written_meanwhile)
    with pytest.raises(TeacherError, match="changed while they were read"):
        load_teacher(str(folder), tokenizer=tokenizer)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers=1,000,000"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_hidden_layers": 900, "intermediate_size": 64}, "far larger than its weights"),
        ({"vocab_size": 10**9}, "vocab_size=1,000,000,000"),
        ({"hidden_size": 10**7, "head_dim": 8}, "far larger|could not be loaded"),
        ({"intermediate_size": 10**9}, "far larger"),
        ({"num_attention_heads": 10**7, "head_dim": 64}, "far larger|could not be loaded"),
        ({"model_type": "mixtral", "num_local_experts": 10**7}, "num_local_experts"),
        ({"model_type": "opt", "max_position_embeddings": 10**7}, "far larger"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"block_configs": [[{"num_layers": 10**9}]]}, "num_layers"),
        ({"vocab_size": "many"}, "could not be loaded"),
    ],
)
def test_a_configuration_that_its_weights_do_not_bear_out_is_refused_at_once(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(TeacherError, match=said):
        load_language_model(str(folder))


def test_a_tokenizer_beside_such_a_configuration_is_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=10**9)
    with pytest.raises(TeacherError, match="num_hidden_layers"):
        load_tokenizer(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match="num_hidden_layers"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b"[" * 100_000, b'{"a": ' * 100_000, b"\xff\xfe", b"9" * 5000]
)
def test_a_configuration_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(TeacherError, match=r"config\.json"):
        load_language_model(str(folder))


def test_a_hub_name_is_known_by_its_commit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A repository in the hub's cache: snapshots are links to blobs, refs name the commit."""
    cache, commits = folder.parent / "hub", ["a" * 40, "b" * 40]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--someone--tiny"
    for number, commit in enumerate(commits):
        made = folder.parent / commit
        tiny_llama(seed=number).save_pretrained(made)
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        (repository / "snapshots" / commit).mkdir(parents=True)
        for file in made.iterdir():
            blob = repository / "blobs" / f"{commit[0]}{file.name}"
            shutil.copy(file, blob)
            link = repository / "snapshots" / commit / file.name
            link.symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs").mkdir()
    found = []
    for commit in commits:
        (repository / "refs" / "main").write_text(commit)
        teacher = load_teacher("someone/tiny", tokenizer=tokenizer)
        found.append(teacher.identity["weights"])
    assert found == [f"hub:someone/tiny@{commit}" for commit in commits]
    snapshot = repository / "snapshots" / commits[0]
    by_folder = load_teacher(str(snapshot), tokenizer=tokenizer)
    assert by_folder.identity["weights"].startswith("sha256:")


def test_a_hub_that_cannot_be_reached_is_reported_without_repeating_the_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waits: list[float] = []
    url = "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"  # nothing listens there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("no-such/model", "config.json")
    assert sum(waits) > 20
    waits.clear()
    for read in (load_tokenizer, find_checkpoint):
        with pytest.raises(TeacherError, match="cannot be reached"):
            read("no-such/other")
    assert not waits


def test_a_path_that_is_no_hub_name_is_a_missing_folder() -> None:
    for read in (load_tokenizer, find_checkpoint):
        with pytest.raises(TeacherError, match="there is no folder 'runs/one/model'"):
            read("runs/one/model")


def test_code_that_comes_with_a_model_is_part_of_its_identity(folder: Path) -> None:
    code = "from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM):\n    pass\n"
    (folder / "modeling_own.py").write_text(code)
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert type(load_language_model(str(folder))).__name__ == "LlamaForCausalLM"
    found = []
    for text in (code, code + "    scale = 2\n"):
        (folder / "modeling_own.py").write_text(text)
        model = load_language_model(str(folder), trust_remote_code=True)
        assert type(model).__name__ == "Own"
        found.append(weights_fingerprint(find_checkpoint(str(folder)), model))
    assert found[0] != found[1]
