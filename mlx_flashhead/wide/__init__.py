"""Several tokens of one text a step, with the bits of single steps."""
