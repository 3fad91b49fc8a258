"""`make gpu`: build, test, sanitize, measure convolutions, tune and benchmark on a GPU, in one command.

Most of what it runs belongs to the benchmarks, and so do all of its results: cases, timing, roofline, result schema,
`results/`. The runner (`__main__`, `needs`, `checkout`, `run`, `phases`, `tests`, `files`) imports only the standard
library, so it can report at once what a machine lacks. `convs`, `tune` and `bench` are programs that it starts, and
`import_results` is `make gpu-import`.

    make gpu [PYTHON=python3] [RESULTS=build/gpu/results] [PHASES=tests,bench] [ARGS="--seconds 300"]
    make gpu-dry-run                                       the same on a CPU, tiny; no figure is kept
    make gpu-import DIR=build/gpu/results                  stores the results and the tables that choices follow from

`checkout` makes `import fastres` work from the sources: neither pip nor a network is needed.
"""
