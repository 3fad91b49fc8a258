"""The paper's experiments: published numbers, each one's runs, tables and plot, and one report of all."""
