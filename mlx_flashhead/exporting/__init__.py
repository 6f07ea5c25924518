"""A head's kernels in a file, for apps."""
