"""Read configs of other trainers and write them as settings files of xtuner.

    old file ──read_mmengine | YAML──► values with lines ──meaning──► Draft ──► settings file

Nothing of the old file is executed. `file.migrate` is the entry.
"""
