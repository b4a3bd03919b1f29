"""PerPO on real handwritten digits, end to end, on a processor: `python -m perpo.demo`.

A tiny vision-language model has learnt to answer "where is the 7?" from cheap, loose boxes. It is then aligned on the
IoU of its own answers with exact boxes, by PerPO and by what PerPO is compared with, under one budget.
"""

import argparse
import time
from pathlib import Path

from perpo.demo.align import Recipe
from perpo.demo.compare import compare
from perpo.demo.model import SHIPPED
from perpo.demo.report import draw_boxes, draw_chart, table, write_json
from perpo.demo.train_sft import save_model, train_sft

HELD_OUT = 2000  # scenes a seed; the standard error of AP@50 is then 1 point
QUICK = Recipe(rounds=1, lists=32, k=4, batch=16)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    recipe = Recipe()
    parser = argparse.ArgumentParser("python -m perpo.demo", description=__doc__.split("\n\n")[1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--rounds", type=int, default=recipe.rounds, help="sample, score, train: so many times (%(default)s)"
    )
    parser.add_argument("--lists", type=int, default=recipe.lists, help="scenes a round (%(default)s)")
    parser.add_argument("--beta", type=float, default=recipe.beta, help="sharpness of the preference (%(default)s)")
    parser.add_argument("--gamma", type=float, default=recipe.gamma, help="power of the reward margin (%(default)s)")
    parser.add_argument("--lr", type=float, default=recipe.learning_rate, help="learning rate (%(default)s)")
    parser.add_argument("--from-scratch", action="store_true", help="train the SFT model too (some 6 minutes more)")
    parser.add_argument("--quick", action="store_true", help="a few seconds' run that shows nothing but that it runs")
    parser.add_argument("--workers", type=int, help="processes; default: one a core")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder for pictures and figures (%(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    started = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    seeds, held_out = list(dict.fromkeys(options.seeds)), HELD_OUT
    recipe = Recipe(
        rounds=options.rounds, lists=options.lists, beta=options.beta, gamma=options.gamma, learning_rate=options.lr
    )
    if options.quick:
        recipe, seeds, held_out = QUICK, seeds[:1], 64

    checkpoint = SHIPPED
    if options.from_scratch:
        checkpoint = options.output / "sft.safetensors"
        save_model(train_sft(2, 2) if options.quick else train_sft(), checkpoint)
    results = compare(seeds, recipe, checkpoint, held_out, 1 if options.quick else options.workers)
    seconds = time.perf_counter() - started

    print(
        f"\n{len(seeds)} seeds, {held_out} held-out scenes each; {recipe.rounds} × {recipe.lists} lists,",
        end=" ",
    )
    print(f"{recipe.k} answers each; β {recipe.beta:g}, γ {recipe.gamma:g}, learning rate {recipe.learning_rate:g}\n")
    print(table(results))
    boxes, chart, figures = (options.output / name for name in ("boxes.png", "methods.png", "results.json"))
    draw_boxes(boxes, results, held_out)
    draw_chart(chart, results)
    write_json(figures, results, recipe, held_out, seconds)
    print(f"\n{seconds:.0f} s. Boxes before and after: {boxes}; the methods: {chart}; the figures: {figures}")


if __name__ == "__main__":
    main()
