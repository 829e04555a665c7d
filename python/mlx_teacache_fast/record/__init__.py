"""What happened: statistics, traces, and what a picture's metadata say."""
