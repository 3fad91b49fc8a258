"""The experiments: data, training loop, timing, figures, the demo, and the commands of the command line."""
