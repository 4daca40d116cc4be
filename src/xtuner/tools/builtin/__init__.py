"""Tools that come with xtuner, one file each; a file defines ``TOOL``, the function."""
