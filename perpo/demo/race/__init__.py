"""The race: objectives, rounds and margins side by side at the same number of sampled and trained tokens."""
