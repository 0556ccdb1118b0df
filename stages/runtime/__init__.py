"""The process around a stage: worker, server, process tree, ranks, disk, checkpoints, metrics. It knows no kind of
stage."""
