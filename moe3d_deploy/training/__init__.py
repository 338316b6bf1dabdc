"""Training on procedural scenes."""
