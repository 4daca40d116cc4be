"""The parts of `benchmarks/gpu_check.py`.

    parent (runner, report) ──name──► worker (parts) ──rows──► parent ──after each part──► files

`plan` lists the parts in order, `correct` and `runs` check results, `speed` and `answering`
measure, `shapes` defines small models.
"""
