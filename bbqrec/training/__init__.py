"""Training: the two Lightning modules, the run folder, and `fit`, which goes from a data set to a finished run."""
