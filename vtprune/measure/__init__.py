"""Accuracy, cost and time of methods on questions with known answers."""
