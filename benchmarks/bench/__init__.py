"""`moe3d bench`: what a model costs on this machine, measured; reports, plots and comparisons of them."""
