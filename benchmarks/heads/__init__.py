"""Depth heads compared on equal frozen features: `python -m moe3d_deploy.benchmarks.heads`, docs/comparison.md."""
