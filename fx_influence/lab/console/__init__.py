"""Tables and sentences of a finished run for a terminal."""
