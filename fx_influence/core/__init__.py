"""Small pieces that every room uses: arithmetic on parameter dictionaries, shards, checks of input, display."""
