"""Pruned inference outside this process: images encoded once, asked anywhere."""
