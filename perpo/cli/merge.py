"""`perpo merge`: an adapter added to its base model's weights, as a folder that any program loads as a model.

perpo merge --model runs/boxes --output runs/boxes/merged
"""

from __future__ import annotations

from dataclasses import dataclass, field

from perpo.model.merge import save_merged
from perpo.model.settings import check_place


@dataclass
class MergeConfig:
    """Which adapter, and where the merged model goes."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or hub name with the adapter, which names its base model.", "aliases": ["--model"]}
    )
    output: str = field(metadata={"help": "Folder of the merged model; appears whole or not at all."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the saved weights; 'auto': that of the base model. The sum is in float32 always.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the adapter on the hub."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model. Only for sources that you trust."}
    )


SETTINGS = (MergeConfig,)


def run(config: MergeConfig) -> None:
    check_place(config.model_name_or_path)
    done = save_merged(
        config.model_name_or_path,
        config.output,
        config.dtype,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    kind = "the base model's type" if config.dtype == "auto" else "as asked for"
    whole = f", and {', '.join(done.whole)} taken whole" if done.whole else ""
    print(
        f"adapters on {done.layers} layers added to {done.base} in float32{whole}\n"
        f"written to {config.output} in {done.dtype} ({kind}), with the processor of {done.processor}"
    )
