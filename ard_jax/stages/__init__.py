"""The stages of a run: each a function (config, workdir) that reads and writes folders of the workdir."""
