"""Static merging in closed form: pure mathematics of task vectors, one tensor at a time."""
