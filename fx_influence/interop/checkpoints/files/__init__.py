"""Files of checkpoint directories: their names, what damages them, and readers that run no code of theirs."""
