"""Drawing result files: plain dicts in, matplotlib figures out. Nothing here reads or writes files.

Every function that draws raises :class:`VtpruneError` without matplotlib, which is imported when the first figure is
drawn.
"""
