"""Drawing candidate answers from a model and scoring them into lists."""
