"""Records wait on disk: memory does not grow with their number, and what is read is what was written."""

import dataclasses
import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perpo.data.images import RowImage
from perpo.data.read import ReadSettings, read_records, usable_records
from perpo.data.record import ListRecord, write_records
from perpo.data.spool import Spool

PEAK = """
import resource, sys
from perpo.data.read import ReadSettings, usable_records
records, _ = usable_records(sys.argv[1], ReadSettings(text_only=True), require=(), root=None, show=False)
held = sum(record.k for record in records)
print(held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def record(i: int, **changes: Any) -> ListRecord:
    given: dict[str, Any] = {"id": f"r{i}", "image": None, "prompt": f"Where is {i}?", "columns": {"page": i}}
    given |= {"responses": tuple(f"[0.{i}, 0.{j}]" for j in range(20)), "rewards": tuple(map(float, range(20)))}
    return ListRecord(**(given | changes))


def test_memory_does_not_grow_with_the_number_of_records(tmp_path: Path) -> None:
    peaks = {}
    for n in (500, 8_000):
        write_records(map(record, range(n)), tmp_path / "a.jsonl")
        command = [sys.executable, "-c", PEAK, str(tmp_path / "a.jsonl")]
        held, peaks[n] = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        assert held == 20 * n
    assert (peaks[8_000] - peaks[500]) * 1024 / 7_500 < 1000  # bytes a record; as objects they are above 4000


def test_a_spool_is_the_sequence_that_it_was_made_of() -> None:
    records = [record(i) for i in range(7)]
    spool = Spool(records)
    assert spool == records
    assert spool != records[:-1]
    assert spool[-1] == records[-1]
    assert spool[1::2] == records[1::2]
    assert spool[1:][::-2][1:] == records[1:][::-2][1:]
    assert spool.pick([5, 5, 0])[1:] == [records[5], records[0]]
    assert records[3] in spool
    assert spool[:0] == Spool() == []
    with pytest.raises(IndexError):
        spool[7]
    spool.append(record(7))
    assert (spool[7], len(spool)) == (record(7), 8)
    assert [dataclasses.asdict(one) for one in spool] == [dataclasses.asdict(record(i)) for i in range(8)]


class Dataset(list):
    """As one of `datasets`, which stays where it is."""


Dataset.__module__ = "datasets.arrow_dataset"


def test_images_in_memory_and_what_cannot_be_pickled_stay_as_they_are() -> None:
    image, source = Image.new("RGB", (4, 2), "red"), Dataset([{"image": b"any"}])
    image.info["transparency"] = 3
    made = [record(0, image=image), record(1, image=image), record(2, image=RowImage(source, 0, "image"))]
    made.append(record(3, answer=lambda: 3))
    spool = Spool(made)
    assert spool[0].image is spool[1].image is image
    assert spool[2].image.dataset is source
    assert spool[3] is made[3]
    assert len(spool._file.held) == 3


def _answers(spool: Spool[ListRecord], found: Any) -> None:
    found.put([one.responses for one in spool])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_reads_the_file_of_its_parent(method: Any) -> None:
    context = multiprocessing.get_context(method)
    spool, found = Spool(map(record, range(5))), context.Queue()
    worker = context.Process(target=_answers, args=(spool[1:], found))
    worker.start()
    assert found.get(timeout=60) == [record(i).responses for i in range(1, 5)]
    worker.join()
    assert spool == [record(i) for i in range(5)]


def test_a_full_disk_says_which_folder_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    spool = Spool([record(0)])
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=rf"No space left on device: .* wait in {tmp_path} .* TMPDIR"):
        spool[0]
    monkeypatch.undo()
    assert spool == [record(0)]


def test_what_a_command_reads_keeps_its_places(tmp_path: Path) -> None:
    """A record that is left out after others were names its own line."""
    rows = [record(i, answer="x") for i in range(6)]
    write_records(rows, tmp_path / "a.jsonl")

    class Refuses:
        sees_images = False

        def __call__(self, one: ListRecord, image: Any) -> None:
            if one.id in ("r3", "r5"):
                raise ValueError("refused")

    records, report = usable_records(
        tmp_path / "a.jsonl",
        ReadSettings(skip_bad=True),
        require=(),
        root=None,
        limit=5,
        bad_truths=lambda some: {"r1": "no truth"},
        checks=lambda: [Refuses()],
        show=False,
    )
    assert records == [rows[0], rows[2], rows[4]]
    assert [str(error).partition("a.jsonl:")[2] for error in report.errors] == [
        "2: no truth",
        "4: record 'r3': refused",
    ]
    assert read_records(tmp_path / "a.jsonl", require=())[0] == rows
