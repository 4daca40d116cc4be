"""The parts of `benchmarks/gpu_check.py`.

    parent (runner, report) ──name──► worker (parts) ──rows──► parent ──after each part──► files

`plan` names the parts in their order, `correct` and `runs` check numbers, `speed` and `answers`
measure, `shapes` says what models are made of.
"""
