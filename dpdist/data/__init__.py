"""Examples by index, and the padded chunks that a step is fed with."""
