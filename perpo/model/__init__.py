"""Loading a model, its language head, what of it is trained, and whether its prompts may be shared."""
