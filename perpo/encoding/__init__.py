"""From processor, prompt and answers to tokens, batches and packed rows."""
