"""The command line: Hydra composes, errors are one line, help shows the comments of conf/."""
