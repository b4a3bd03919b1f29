"""METEOR as nltk computes it, with a WordNet of two synsets, against values calculated by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nltk", reason="METEOR is nltk's")

SYNSETS = {"noun": [("n", ["car", "auto"])], "verb": [("v", ["stop", "halt"])], "adj": [], "adv": []}
ASK = """
import json, sys
from perpo.evaluation.text_scores import meteor, why_no_meteor
print(json.dumps([why_no_meteor(), [meteor(*pair) for pair in json.loads(sys.argv[1])]]))
"""


def save_wordnet(folder: Path) -> None:
    """SYNSETS in the files of Princeton's WordNet: a synset is found by the byte that its line begins at."""
    folder.mkdir(parents=True)
    for part, synsets in SYNSETS.items():
        lines, index = "", ""
        for kind, lemmas in synsets:
            words = " ".join(f"{lemma} 0" for lemma in lemmas)
            index += "".join(f"{lemma} {kind} 1 0 1 0 {len(lines):08d}\n" for lemma in lemmas)
            lines += f"{len(lines):08d} 03 {kind} {len(lemmas):02x} {words} 000 | a gloss\n"
        (folder / f"data.{part}").write_text(lines)
        (folder / f"index.{part}").write_text(index)
        (folder / f"{part}.exc").write_text("")
    (folder / "lexnames").write_text("00\tadj.all\t3\n01\tadj.pert\t3\n02\tadv.all\t4\n03\tnoun.Tops\t1\n")
    for name in ("cntlist.rev", "index.sense"):
        (folder / name).write_text("")


def ask(data: Path, pairs: list[tuple[str, str]]) -> tuple[str | None, list[float]]:
    """`why_no_meteor` and scores in a process that knows no other WordNet."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(pairs)],
        env={**os.environ, "NLTK_DATA": str(data), "HOME": str(data)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reason, scores = json.loads(done.stdout)
    return reason, scores


def test_meteor_equals_its_formula(tmp_path: Path) -> None:
    """m matched words in c runs, P = m / written, R = m / true: PR / (0.9 P + 0.1 R) · (1 − 0.5 (c / m)³)."""
    save_wordnet(tmp_path / "corpora" / "wordnet")
    by_hand = {
        ("the cat sat", "the cat sat"): 1 - 0.5 / 27,
        ("The CATS sat", "the cat sat"): 1 - 0.5 / 27,  # letter case, and one stem
        ("the auto sat", "the car sat"): 1 - 0.5 / 27,  # a synonym
        ("the auto halts", "the car stops"): 1 - 0.5 / 27,  # synonyms of stems
        ("the cat", "the black cat sat"): 0.5 / (0.9 + 0.05) * (1 - 0.5),  # P 1, R ½, two runs of two words
        ("sat cat the", "the cat sat"): 0.5,  # three runs of three words
        ("the the the the", "the cat"): (0.25 * 0.5) / (0.9 * 0.25 + 0.1 * 0.5) * 0.5,  # a word is matched once
        ("a dog", "the cat"): 0.0,
        ("", "the cat"): 0.0,
    }
    reason, scores = ask(tmp_path, list(by_hand))
    assert reason is None
    assert dict(zip(by_hand, scores, strict=True)) == pytest.approx(by_hand)


def test_without_wordnet_the_reason_says_how_to_get_it(tmp_path: Path) -> None:
    reason, _ = ask(tmp_path, [])
    assert reason is None or "nltk.downloader wordnet" in reason  # None: it is installed for all users
