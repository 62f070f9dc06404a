"""Record windows of a live training's optimizer steps on disk, and attribute each at its last step."""
