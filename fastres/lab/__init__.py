"""The experiments: data, training loop, timing, figures, and the demo built of them. It draws, but never prints."""
