"""`make gpu-check`: what a machine with a GPU, torch and nvcc can confirm in nine minutes, without a network.

    python -m benchmarks.gpu_check                      run the steps, write ./gpu-check/ (or $OUT)
    python -m benchmarks.gpu_check --benchmarks         the benchmarks alone, write ./gpu-bench/ (or $OUT)
    python -m benchmarks.gpu_check --record DIRECTORY   take a run's verified kernels into backend_status.json

`plan.py` says which steps there are, in the order of what matters most. Each is a process of its own, with a time limit
(`steps.py`); one that fails, hangs or takes the GPU down with it does not keep the others from running. Written, and
brought up to date after every step: `summary.json` and `summary.md` with the outcome, `log.txt` with all that the steps
printed, and the benchmark results.
"""
