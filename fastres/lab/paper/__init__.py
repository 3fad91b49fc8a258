"""The paper's experiments: published numbers, the runs of each experiment, its tables and plot, and one report of all."""
