"""What does a whole training step on a list cost: forward and backward, vision tower and language head included?

Hypothesis. With image and prompt computed once, a step costs what its P + kR tokens cost instead of k (P + R): at
least 0.7 of that ratio is seen against a row for every answer. What is missing of it: the tower (once instead of k
times, in neither count), the head (kR states either way), attention of answers to their prompt, launches and Python.

Peers. All train the same model on the same list, at the same precision.
    the authors' way      image and prompt repeated for every answer, fp32 logits of all positions, pairs in a loop
    TRL, k / 2 pairs      every answer in one pair; a row an answer, log-probs of completions by TRL's chunked function
    TRL, best and worst   one pair: 2 of the k answers are learnt from, so it is another job, and it is in the table
                          because it is what a list becomes in a trainer of pairs
    … , rows              this project with prefix_sharing="off"
    one plain row         the model over one causal row of as many tokens as ours, without a head or a loss: what is
                          left to save in attention, head and loss together

Floor. `extra.ideal_ratio`: k (P + R) / (P + kR), beside the measured `ratio_to_ours`. With long prompts it can be
passed: pairs in attention fall by more than tokens do.

Shapes. `benchmarks.problems.PREFIXES`, one list; a LLaVA and a Qwen2.5-VL (`benchmarks.small_models`), fp32 on the CPU;
on a GPU bf16 with gradient checkpointing, for all alike. On the CPU without `--full` the first prompt and a small page.
What by estimate needs more memory than the machine has free is not run, and its row says how much it would need.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import peers, small_models
from benchmarks.harness import OURS, Case
from benchmarks.problems import Prefix, Setting
from perpo.encoding.batch import ListBatch, candidate_tensors, separate_rows
from perpo.encoding.packed import packed_row
from perpo.encoding.positions import PromptPositions
from perpo.model import sharing
from perpo.model.language_head import LanguageHead, accept_rows, perpo_output


def free_bytes(device: str) -> int:
    """What one case may take."""
    if device == "cuda":
        return round(0.9 * torch.cuda.get_device_properties(0).total_memory)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return next(
            int(line.split()[1]) * 1024 * 9 // 10
            for line in meminfo.read_text().splitlines()
            if line.startswith("MemAvailable")
        )
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class Step:
    """One list of k answers of R tokens, best first, and a model to train on it."""

    def __init__(self, family: str, prefix: Prefix, setting: Setting) -> None:
        self.prefix, self.setting = prefix, setting
        self.shape = small_models.SHAPES[setting.size]
        dtype = setting.dtype
        model, prompt = small_models.build(family, setting.size, prefix.n_prompt, setting.device, dtype)
        if setting.size == "gpu":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        accept_rows(model)
        self.model, self.prompt = model, prompt
        self.trained = [x for x in model.parameters() if x.requires_grad]
        ids = torch.randint(small_models.FIRST_WORD, self.shape.n_vocab, (prefix.k, prefix.n_response))
        self.responses = [ids.tolist()]
        rewards = torch.rand(prefix.k).sort(descending=True).values.tolist()
        ref = torch.randn(prefix.k).sub(prefix.n_response * 9).tolist()
        self.known = candidate_tensors(self.responses, [rewards], [ref])

    def packed(self) -> ListBatch:
        inputs, rows, layout = packed_row([self.prompt], self.responses, PromptPositions(self.model))
        batch = ListBatch(inputs, rows, **self.known, layout=layout, n_tokens=layout.n_tokens)
        return batch.to(self.setting.device)

    def rows(self, answers: list[int] | None = None) -> ListBatch:
        """A row for every answer, or for these."""
        chosen = self.responses if answers is None else [[self.responses[0][i] for i in answers]]
        inputs, rows, n_tokens = separate_rows([self.prompt], chosen, pad_id=0)
        if answers is None:
            known = self.known
        else:
            pick = torch.tensor(answers)
            known = candidate_tensors(
                chosen, [self.known["rewards"][pick].tolist()], [self.known["ref_log_probs"][pick].tolist()]
            )
        return ListBatch(inputs, rows, **known, n_tokens=n_tokens).to(self.setting.device)

    def gradients(self, loss: Tensor) -> object:
        return loss.detach(), torch.autograd.grad(loss, self.trained)

    def ours(self, batch: ListBatch) -> object:
        def call(hidden: Tensor, head: LanguageHead) -> Any:
            return perpo_output(hidden, head, batch)

        return self.gradients(self.model(**batch.keywords, head_call=call).loss)

    def authors(self, batch: ListBatch) -> object:
        logits = self.model(**batch.inputs, use_cache=False).logits.float()  # [k, P + R − 1, V]
        n_flat = logits.shape[0] * logits.shape[1]
        labels = batch.labels.new_zeros(n_flat)
        labels[batch.response_rows] = batch.labels
        mask = torch.zeros(n_flat, device=labels.device)
        mask[batch.response_rows] = 1
        tokens = peers.plain_token_log_probs(logits.flatten(0, 1), labels) * mask
        assert batch.ref_log_probs is not None
        sums = tokens.view(1, logits.shape[0], -1).sum(-1)
        return self.gradients(peers.loop_list_loss(sums, batch.rewards[None], batch.ref_log_probs[None]))

    def pairs(self, log_probs: Callable[..., Tensor], batch: ListBatch) -> object:
        """DPO of the first half of the rows against the second."""
        hidden = self.model(**batch.inputs, response_rows=batch.response_rows)
        tokens = log_probs(hidden, self.model.get_output_embeddings().weight, batch.labels)
        assert batch.ref_log_probs is not None
        chosen, rejected = (tokens.view(len(batch.rewards), -1).sum(-1) - batch.ref_log_probs).chunk(2)
        return self.gradients(-F.logsigmoid(0.1 * (chosen - rejected)).mean())

    def plain_row(self, batch: ListBatch) -> object:
        inputs = {name: x for name, x in batch.inputs.items() if name != "position_ids"}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return self.gradients(self.model.model(**inputs, use_cache=False).last_hidden_state.float().square().mean())

    def needed_bytes(self, n_tokens: int, n_logit_rows: int) -> int:
        """About what a forward pass keeps for its backward: states and attention of each layer, logits in fp32 three
        times over (they, their log-softmax and its gradient)."""
        shape, size = self.shape, self.setting.dtype.itemsize
        layer = (12 * shape.hidden + 5 * shape.intermediate) * size
        kept = layer + shape.layers * shape.hidden * size if self.setting.size == "gpu" else shape.layers * layer
        return n_tokens * kept + 3 * 4 * n_logit_rows * shape.n_vocab

    def case(self, name: str, run: Callable[[], object], n_tokens: int, n_logit_rows: int = 0, **extra: Any) -> Case:
        needed, there = self.needed_bytes(n_tokens, n_logit_rows), free_bytes(self.setting.device)
        gib = f"an estimated {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} are free"
        return Case(
            name,
            run,
            extra={"tokens": n_tokens, "estimated_bytes": needed, **extra},
            problem=f"not run: needs {gib}" if needed > there else None,
        )


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_step(benchmark: Any, compare: Any, setting: Setting, prefix: Prefix, family: str) -> None:
    if not small_models.measured(family, setting, prefix):
        pytest.skip("two prompts are measured for this family")
    step = Step(family, prefix, setting)
    rows = step.rows()
    ends = step.rows([0, prefix.k - 1])
    # Measured on the model as it comes; sharing replaces its attention, so ours has a model of its own.
    packing = Step(family, prefix, setting)
    assert sharing.prepare(packing.model, "auto") is not None
    packed = packing.packed()
    ideal: dict[str, Any] = {"ideal_ratio": round(prefix.ideal, 2), "answer_tokens": prefix.k * prefix.n_response}
    cases = [
        packing.case(OURS, partial(packing.ours, packed), packed.n_tokens, answer_tokens=ideal["answer_tokens"]),
        step.case(f"{OURS}, rows", partial(step.ours, rows), rows.n_tokens, **ideal),
        step.case("the authors' way", partial(step.authors, rows), rows.n_tokens, rows.n_tokens, **ideal),
        *_trl(step, rows, "TRL, k / 2 pairs", **ideal),
        *_trl(step, ends, "TRL, best and worst", note="2 of the k answers", answer_tokens=2 * prefix.n_response),
        step.case("one plain row", partial(step.plain_row, packed), packed.n_tokens, note="no head, no loss"),
    ]
    shape = step.shape
    shapes = {**prefix._asdict(), "model": family, "V": shape.n_vocab, "H": shape.hidden, "layers": shape.layers}
    compare("step", f"{family} {prefix}", cases, shapes, long=True, by_host=True)


def _trl(step: Step, batch: ListBatch, name: str, **extra: Any) -> list[Case]:
    peer = next(p for p in peers.for_task("linear_log_probs") if p.name == "TRL chunked log-prob")
    fn, reason = peers.load(peer, step.setting.device)
    if fn is None:
        return [Case(name, lambda: None, problem=reason)]
    return [step.case(name, partial(step.pairs, fn, batch), batch.n_tokens, **extra)]
