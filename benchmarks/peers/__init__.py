"""One program a system, each run in its own environment by `benchmarks/compare.py`: `python -m peers.vllm_cpu FOLDER`."""
