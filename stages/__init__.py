"""Stages: each does one thing on the accelerator, given a job and a directory. They know no Prefect and no registry."""
