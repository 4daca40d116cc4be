"""Convert configs of other trainers to xtuner settings files.

    old file ──mmengine | YAML reader──► values with lines ──translate──► Draft ──► settings file

The old file is never executed. The entry point is `file.migrate`.
"""
