"""Perceptual rewards: how well an answer agrees with what is in the image. One file a perception task."""

from perpo.rewards.grounding import box_iou, iou_reward, parse_box

__all__ = ["box_iou", "iou_reward", "parse_box"]
