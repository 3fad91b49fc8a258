"""`make gpu`: everything that needs a GPU in one command: build, tests, sanitizer, convolutions, tuning, benchmarks.

It lies beside the benchmarks because most of what it runs and all of what it keeps are theirs: cases, timing, roofline,
result schema, `results/`. The runner (`__main__`, `needs`, `checkout`, `run`, `phases`, `record`) imports the standard
library alone, so that it can say at once what a machine lacks; `convs`, `tune` and `bench` are programs of their own
that it starts, and `keep` is `make gpu-import`.

    make gpu [PYTHON=python3] [RESULTS=build/gpu/results] [PHASES=tests,bench] [ARGS="--seconds 300"]
    make gpu-dry-run                                       the same on a CPU, tiny; no figure is kept
    make gpu-import DIR=build/gpu/results                  files the results and what choices follow from

`checkout` makes `import fastres` work from the sources, with no install: neither pip nor a network is needed.
"""
