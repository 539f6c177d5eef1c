"""Measurements: each figure beside a limit or a simpler program measured in the same run.

One module a name (`bench.ingest`, `bench.decisions`, …), each with `run(options) -> list[Row]`.
`bellwether bench NAME` prints the table and, with `--keep`, writes it to `bench/results/`.
Benchmarks measure; tests check: nothing here asserts a time.
"""
