"""What a refactor must leave as it is, kept in the tree: losses of short training runs, and the kernels' code."""
