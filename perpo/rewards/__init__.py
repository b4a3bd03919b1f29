"""Perceptual rewards: how well an answer agrees with what is in the image. One file per perception task.

Every reward is a function of TRL's GRPO signature, f(prompts, completions, answer, **columns), that judges the final
answer of a completion and raises a ValueError for a truth that it cannot take. By name, with counts of what could not
be read: `perpo.rewards.scoring`.
"""

from perpo.rewards.completions import RewardFunction, final_answer
from perpo.rewards.counting import counting_reward, exact_match_reward, numeric_reward
from perpo.rewards.formats import FORMATS, Box, box_format, parse_box, parse_boxes, read_boxes, write_boxes
from perpo.rewards.grounding import box_iou, box_reward, giou, iou_reward, matched_score, scaled_giou
from perpo.rewards.numerals import read_count, read_number
from perpo.rewards.ocr import edit_similarity, ocr_reward, word_f1_reward, word_scores

__all__ = [
    "FORMATS",
    "Box",
    "RewardFunction",
    "box_format",
    "box_iou",
    "box_reward",
    "counting_reward",
    "edit_similarity",
    "exact_match_reward",
    "final_answer",
    "giou",
    "iou_reward",
    "matched_score",
    "numeric_reward",
    "ocr_reward",
    "parse_box",
    "parse_boxes",
    "read_boxes",
    "read_count",
    "read_number",
    "scaled_giou",
    "word_f1_reward",
    "word_scores",
    "write_boxes",
]
