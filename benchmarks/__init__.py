"""The benchmark suite: `python -m benchmarks --suite cpu|gpu|smoke`, `python -m benchmarks report`.

Every figure in the documentation comes from a JSON file that this package wrote; see `harness` for how time is taken,
`memory` for bytes, `peers` for what ours is compared with and `limits` for the floor each figure is read against.
"""
