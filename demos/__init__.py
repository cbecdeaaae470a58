"""The Gradio demo (``vtprune demo``) and the notebooks."""

TRAINED = "dpvr-lf (trained)"  # offered with the bundled model
