"""What two or more methods stand on, and nothing else."""
