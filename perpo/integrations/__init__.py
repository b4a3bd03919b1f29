"""The loss in trainers that are not ours: any loop, `transformers.Trainer`, Lightning, TRL."""
