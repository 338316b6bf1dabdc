"""Sessions over bundles and checkpoints, and writers for what they return."""
