"""One paper, one file. The first look-up in the registry imports every method file beside this one
(:data:`vtprune.methods.base.METHODS`); a new file needs no other change."""
