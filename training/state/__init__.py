"""What a run needs to survive: checkpoints, signs of life between its processes, and requests to stop."""
