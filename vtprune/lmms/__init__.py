"""vtprune and lmms-eval."""
