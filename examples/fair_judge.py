"""Rewards where there is no ground truth: a vision-language model compares answers, asked in the fairest words (ZEPO).

    python examples/fair_judge.py --model Qwen/Qwen2.5-VL-7B-Instruct --records lists.jsonl --output judged.jsonl
    perpo train … --train_file judged.jsonl

Every two answers of a list are shown in both orders, and the judge says A or B. Wordings of the question differ in how
much they make it prefer a place. ZEPO (arXiv 2406.11370) takes the wording whose preferences are most evenly
distributed over the choices, without any label; here

    fairness of a wording = −|share of comparisons that the answer shown first wins − 1/2|

over the first lists. The chosen wording then judges all lists. With p_ij the probability that i wins when it is shown
first, the reward of answer i is its win rate, in which what is left of the preference for a place cancels:

    r_i = mean over j ≠ i of (p_ij + 1 − p_ji) / 2

Left out: the paper lets a language model paraphrase the best wording again and again; here wordings are a list, yours
with --wordings. Chosen: a comparison at exactly 1/2 is half won; of equally fair wordings, the first. Fair is not
right: a judge that tosses coins is fair too, so compare some of its choices with your own before you train on them.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from string import Formatter

import torch
from torch import Tensor
from transformers.utils import logging

import perpo
from perpo.data.record import ListRecord
from perpo.encoding.collator import ListCollator
from perpo.model.language_head import sequence_log_probs

WORDINGS = (
    'Question: {question}\nAnswer A: {first}\nAnswer B: {second}\nWhich answer is better? Reply with "A" or "B" only.',
    "Look at the image. Two people answered the question {question!r}.\nA: {first}\nB: {second}\n"
    "Who describes what is there more truthfully? Reply with A or B only.",
    "Question: {question}\nA: {first}\nB: {second}\nEither may be right, and their order is random. Reply with the "
    "letter of the answer that fits the image better.",
    "Compare two answers to: {question}\n[A] {first}\n[B] {second}\nCheck each against the image, then name the one "
    "with fewer errors: A or B.",
)
CHOICES = ("A", "B")

Compare = Callable[[Sequence[ListRecord]], Tensor]  # questions to the judge [n] -> P("A") of each, [n]


def model_judge(model: torch.nn.Module, processor: object, image_root: str | None, batch_size: int = 8) -> Compare:
    """P("A") from the log-probs of the two letters, as a language model's reply to each question."""
    collate = ListCollator(perpo.Encoder.for_model(processor, model), image_root)
    device = next(model.parameters()).device
    model.eval()

    def compare(questions: Sequence[ListRecord]) -> Tensor:
        parts = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
        scores = [sequence_log_probs(model, collate(part).to(device)).view(-1, 2) for part in parts]
        return torch.cat(scores).softmax(1)[:, 0].double().cpu()

    return compare


def comparisons(record: ListRecord, wording: str) -> list[ListRecord]:
    """A question to the judge for each ordered pair of answers, in the order of `permutations`."""
    if not isinstance(record.prompt, str):
        raise ValueError(f"record {record.id!r}: the judge is shown a question that is a text, and this one is a chat")
    return [
        ListRecord(
            f"{record.id}#{i}-{j}",
            record.image,
            wording.format(question=record.prompt, first=record.responses[i], second=record.responses[j]),
            responses=CHOICES,
            complete=(False, False),  # the letter alone, whatever comes after it
        )
        for i, j in permutations(range(record.k), 2)
    ]


def first_wins(record: ListRecord, wording: str, compare: Compare) -> Tensor:  # [k, k]
    """p_ij, and 1/2 on the diagonal."""
    wins = torch.full((record.k, record.k), 0.5, dtype=torch.float64)
    pairs = torch.tensor(list(permutations(range(record.k), 2))).T
    wins[pairs[0], pairs[1]] = compare(comparisons(record, wording)).double()
    return wins


def fairness(wins: Sequence[Tensor]) -> float:
    """Of one wording, from the p_ij of some lists."""
    decisions = torch.cat([p[~torch.eye(len(p), dtype=torch.bool)] for p in wins])
    return -abs(((decisions > 0.5).double() + 0.5 * (decisions == 0.5).double()).mean().item() - 0.5)


def win_rates(wins: Tensor) -> tuple[float, ...]:
    """r_i of a list, from its p_ij."""
    both = (wins + 1 - wins.T) / 2
    both.fill_diagonal_(0)
    return tuple((both.sum(1) / (len(wins) - 1)).tolist())


def judge(
    records: Sequence[ListRecord], compare: Compare, wordings: Sequence[str] = WORDINGS, n_choose: int = 20
) -> tuple[list[ListRecord], str, list[float]]:
    """The records with win rates as rewards, the wording that was taken, and the fairness of each."""
    for wording in wordings:
        places = [name for _, name, _, _ in Formatter().parse(wording) if name is not None]
        if sorted(places) != ["first", "question", "second"]:
            raise ValueError(f"wordings: {wording!r} must have {{question}}, {{first}} and {{second}}, once each")
    for record in records:
        if record.k < 2 or record.rewards is not None:
            what = f"{record.k} answers" if record.k < 2 else "rewards already"
            raise ValueError(f"record {record.id!r} has {what}; give lists of two answers or more without rewards")
    some = records[:n_choose]
    values = [fairness([first_wins(record, wording, compare) for record in some]) for wording in wordings]
    best = wordings[values.index(max(values))]
    judged = [replace(record, rewards=win_rates(first_wins(record, best, compare))) for record in records]
    return judged, best, values


def main(arguments: Sequence[str] | None = None) -> list[ListRecord]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="The judge: a folder or hub name.")
    parser.add_argument("--records", required=True, help="Lists with responses and without rewards.")
    parser.add_argument("--output", required=True, help="Where the same lists with rewards go.")
    parser.add_argument("--image_root", help="Folder that image paths are under.")
    parser.add_argument("--wordings", help="A file with a wording a line, with {question}, {first} and {second}.")
    parser.add_argument("--n_choose", type=int, default=20, help="Lists that the wording is chosen on.")
    args = parser.parse_args(arguments)
    if Path(args.output).exists():
        parser.error(f"--output: {args.output} is there already; name another file")
    logging.set_verbosity_error()
    records, _ = perpo.read_records(args.records, require=("responses",), root=args.image_root)
    model = perpo.load_model(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    lines = Path(args.wordings).read_text().splitlines() if args.wordings else []
    wordings = [line.replace("\\n", "\n") for line in lines if line.strip()] or WORDINGS
    compare = model_judge(model, perpo.load_processor(args.model), args.image_root)
    judged, best, values = judge(list(records), compare, wordings, args.n_choose)
    for wording, value in sorted(zip(wordings, values, strict=True), key=lambda pair: -pair[1]):
        print(f"fairness {value:+.3f}  {'taken  ' if wording == best else '       '}{wording.splitlines()[0][:60]} …")
    n_active = sum(record.has_preference for record in judged)
    perpo.write_records(judged, args.output)
    print(f"{len(judged)} lists, {n_active} of them with a preference -> {args.output}")
    return judged


if __name__ == "__main__":
    main()
