"""The Prefect flow and its server: the only place that imports prefect."""
