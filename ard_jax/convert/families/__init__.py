"""One file a family of sources: it recognises its own and passes over everything else."""
