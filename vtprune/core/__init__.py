"""Decides and owns: data, recipes, planning, the handle and its ledger."""
