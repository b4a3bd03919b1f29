"""Attention over a shared prompt. Knows no trainer and no record."""
