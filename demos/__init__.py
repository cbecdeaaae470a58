"""The Gradio demo (``vtprune demo``) and the notebooks."""
