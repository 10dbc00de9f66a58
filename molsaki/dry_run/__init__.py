"""``--dry_run``: what a command would do, and about how much time and memory it would take, without doing it.

The models are loaded, all texts are tokenized and counted, and one or two batches run as in the command, the longest
first. Nothing is written into the output folders. The results hold for this machine and for the numbers of processes
and threads with which the dry run was started.

One file per command, with a function ``dry_run_COMMAND`` of the command's config.
"""
