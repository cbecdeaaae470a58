"""The bundled VLM of vtprune: data alone, in the folder ``model``; ``vtprune.load_demo_model()`` loads it."""
