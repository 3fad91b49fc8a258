"""The experiments: data, training loop, timing, figures, and the demo built of them, shown on a given console."""
