"""Speed, measured or estimated: each kind of benchmark is a file in `kinds`."""
