"""Reference log-probs are computed once, survive a kill, and are never another model's."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from perpo.data.fingerprints import record_fingerprint
from perpo.storage.fingerprints import weights_fingerprint
from perpo.storage.identity import StaleError, known_identity
from perpo.training.reference_cache import SOURCE, ReferenceCache

from .. import tiny_models, tiny_runs


def test_a_second_run_reads_what_the_first_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny_runs.trainer("llava", tmp_path)
    monkeypatch.setattr("perpo.training.reference.sequence_log_probs", None)  # any use of it fails
    second = tiny_runs.trainer("llava", tmp_path)
    assert [r.ref_log_probs for r in second.train_dataset] == [r.ref_log_probs for r in first.train_dataset]
    fewer = tiny_runs.trainer("llava", tmp_path, data=tiny_runs.records()[1:])
    assert [r.ref_log_probs for r in fewer.train_dataset] == [r.ref_log_probs for r in first.train_dataset[1:]]


def test_full_training_and_adapters_share_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_runs.trainer("llava", tmp_path)
    monkeypatch.setattr("perpo.training.reference.sequence_log_probs", None)
    tiny_runs.trainer("llava", tmp_path, lora=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("weights", "weights"),
        ("template", "chat template"),
        ("length", "response format"),
        ("pixels", "image processor"),
    ],
)
def test_a_stale_cache_is_refused_and_says_why(change: str, named: str, tmp_path: Path, monkeypatch: Any) -> None:
    tiny_runs.trainer("llava", tmp_path)
    build = tiny_models.build
    options: dict[str, Any] = {"max_response_length": 4} if change == "length" else {}

    def changed(family: str) -> Any:
        model, processor = build(family)
        if change == "weights":
            model.model.language_model.layers[1].mlp.down_proj.weight.data *= 1.01
        if change == "template":
            processor.chat_template = processor.chat_template.replace("ASSISTANT:", "BOT:")
        if change == "pixels":
            processor.image_processor.image_mean = [0.0, 0.0, 0.0]
        return model, processor

    monkeypatch.setattr(tiny_models, "build", changed)
    with pytest.raises(StaleError, match=rf"reference_cache_dir: .* different: {named} \(.* there, .* now\)"):
        tiny_runs.trainer("llava", tmp_path, **options)


def test_a_changed_record_is_computed_again_and_the_others_are_not(tmp_path: Path) -> None:
    tiny_runs.trainer("llava", tmp_path)
    part = tmp_path / "reference" / "part-00000.jsonl"
    assert len(part.read_text().splitlines()) == 4
    lists = tiny_runs.records()
    other = dataclasses.replace(lists[0], responses=("[0.7]", *lists[0].responses[1:]))
    runner = tiny_runs.trainer("llava", tmp_path, data=[other, *lists[1:]])
    assert len(part.read_text().splitlines()) == 5
    assert runner.train_dataset[0].responses[0] == "[0.7]"


def test_a_response_that_was_cut_has_a_reference_of_its_own() -> None:
    record = tiny_runs.records()[0]
    whole, cut = (True,) * record.k, (False,) * record.k
    keys = [record_fingerprint(dataclasses.replace(record, complete=ends), SOURCE) for ends in (None, whole, cut)]
    assert len(set(keys)) == 3


def test_a_line_cut_by_a_kill_is_dropped_and_computed_again(tmp_path: Path) -> None:
    whole = tiny_runs.trainer("llava", tmp_path)
    part = tmp_path / "reference" / "part-00000.jsonl"
    text = part.read_text()
    part.write_text(text[: len(text) - 30])
    again = tiny_runs.trainer("llava", tmp_path)
    assert part.read_text() == text
    assert [r.ref_log_probs for r in again.train_dataset] == [r.ref_log_probs for r in whole.train_dataset]


def test_what_another_process_wrote_is_found(tmp_path: Path) -> None:
    record = tiny_runs.records()[0]
    ReferenceCache(tmp_path, {"weights": "a"}, part=1).add(record, [1.0, 2.0, 3.0])
    cache = ReferenceCache(tmp_path, {"weights": "a"}, part=0)
    assert record in cache
    assert cache.attach(record).ref_log_probs == (1.0, 2.0, 3.0)
    assert known_identity(tmp_path)["weights"] == "a"


def test_one_changed_parameter_changes_the_fingerprint() -> None:
    model, _ = tiny_models.build("llava")
    before = weights_fingerprint(model)
    assert weights_fingerprint(tiny_models.build("llava")[0]) == before
    with torch.no_grad():
        model.model.language_model.norm.weight[0] += 1e-3
    assert weights_fingerprint(model) != before


def test_a_replaced_picture_is_computed_again_and_a_moved_one_is_not(tmp_path: Path) -> None:
    """Also where paths are relative to a root, and where the new file has as many bytes and the old time of change."""
    root = tmp_path / "images"
    root.mkdir()
    first, second = (tiny_models.picture((28, 40), seed) for seed in (0, 1))
    first.save(root / "a.bmp")
    record = dataclasses.replace(tiny_runs.records()[0], image="a.bmp")

    def cache(root: Path) -> ReferenceCache:
        return ReferenceCache(tmp_path / "cache", {}, image_root=root)

    cache(root).add(record, [1.0, 2.0, 3.0])
    before = (root / "a.bmp").stat()
    second.save(root / "a.bmp")
    os.utime(root / "a.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (root / "a.bmp").stat().st_size == before.st_size
    assert record not in cache(root)
    (tmp_path / "elsewhere").mkdir()
    first.save(tmp_path / "elsewhere" / "b.bmp")
    os.utime(tmp_path / "elsewhere" / "b.bmp", (1, 1))
    assert dataclasses.replace(record, image="b.bmp") in cache(tmp_path / "elsewhere")


def test_two_runs_share_a_folder_while_both_add_to_it(tmp_path: Path) -> None:
    one, other = ReferenceCache(tmp_path, {}), ReferenceCache(tmp_path, {})
    lists = tiny_runs.records()
    for cache, record in ((one, lists[0]), (other, lists[1]), (one, lists[2])):
        cache.add(record, [0.5] * record.k)
    both = ReferenceCache(tmp_path, {})
    assert [record in both for record in lists] == [True, True, True, False]


def test_a_damaged_line_is_reported_and_its_record_computed_again(tmp_path: Path) -> None:
    cache, lists = ReferenceCache(tmp_path, {}), tiny_runs.records()
    for record in lists[:2]:
        cache.add(record, [0.5] * record.k)
    lines = (tmp_path / "part-00000.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part-00000.jsonl").write_bytes(b"\0\0\0\n" + lines[1])
    with pytest.warns(RuntimeWarning, match=r"part-00000.jsonl:1 cannot be used, damaged .*computed again"):
        again = ReferenceCache(tmp_path, {})
    assert [record in again for record in lists[:2]] == [False, True]


@pytest.mark.parametrize("place", [9, 75, 90, -4])
def test_a_flipped_bit_in_a_number_is_noticed(place: int, tmp_path: Path) -> None:
    cache, lists = ReferenceCache(tmp_path, {}), tiny_runs.records()
    for record in lists[:2]:
        cache.add(record, [-1234.5678] * record.k)
    part = tmp_path / "part-00000.jsonl"
    first, second = part.read_bytes().splitlines(keepends=True)
    damaged = bytearray(second)
    damaged[place % (len(second) - 1)] ^= 1
    part.write_bytes(first + damaged)
    with pytest.warns(RuntimeWarning, match=r"part-00000.jsonl:2 cannot be used, damaged .*computed again"):
        again = ReferenceCache(tmp_path, {})
    assert [record in again for record in lists[:2]] == [True, False]
