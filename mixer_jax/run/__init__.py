"""What one config becomes: its checks, its program, its loop."""
