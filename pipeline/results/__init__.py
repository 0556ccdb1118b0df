"""What published evaluations and findings say: comparisons, promotion, the summary of a run."""
