"""The correctness contract, and whether it holds with what is installed."""
