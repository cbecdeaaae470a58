"""Adapters: one model family, one file. They are imported when the first model is attached, so that importing vtprune
loads no model library."""
