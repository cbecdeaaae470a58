"""The lmms-eval plugin: the model, local tasks, suites, and the command around them. Imported only with the extra
``lmms-eval``."""
