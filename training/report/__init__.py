"""What a run reports: metrics, times, curves, and the trained model on the Hub."""
