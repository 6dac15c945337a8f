"""What needs torch: the base pipeline, its pretraining, and the differentiable scorer."""
