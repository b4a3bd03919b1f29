"""The demo model's words and its processor: 329 tokens; a box takes four of them, a number one per digit.

A token of a box holds its punctuation too, as merged tokens of real vocabularies do: "[0.12, ", "0.34, ", "0.56, "
and "0.78]" put together are the text that the reward reads.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from perpo.demo.digits import CANVAS

PATCH = 8
PATCHES = (CANVAS // PATCH) ** 2
MEAN, DEVIATION = 0.89, 0.19  # of the pixels of pictures

PAD, IMAGE, END, UNKNOWN = "<pad>", "<image>", "<end>", "<unknown>"
SPECIAL = [PAD, IMAGE, END, UNKNOWN]
WORDS = ["USER:", "ASSISTANT:", "where", "is", "the", "read", "digits", "?", "[", "]", ",", "."]
DIGITS = [str(digit) for digit in range(10)]
STEPS = [f"{hundredth / 100:.2f}" for hundredth in range(101)]
OPENING, MIDDLE, CLOSING = [f"[{x}, " for x in STEPS], [f"{x}, " for x in STEPS], [f"{x}]" for x in STEPS]
TOKENS = [*SPECIAL, *WORDS, *DIGITS, *OPENING, *MIDDLE, *CLOSING]
FIRST_DIGIT = TOKENS.index("0")
FIRST_STEPS = [TOKENS.index(kind[0]) for kind in (OPENING, MIDDLE, MIDDLE, CLOSING)]  # of x1, y1, x2, y2

PATTERN = r"\[[01]\.\d\d, |[01]\.\d\d, |[01]\.\d\d\]|[A-Za-z]+:?|\d|[^\sA-Za-z\d]"  # what matches nothing is left out
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}<end>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)
    core.decoder = decoders.Fuse()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def build_processor() -> LlavaProcessor:
    size = {"height": CANVAS, "width": CANVAS}
    images = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3)
    return LlavaProcessor(
        images,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
