"""The commands of ``gut-fast`` about experiments, one in each file, and `app`, which holds them all."""
