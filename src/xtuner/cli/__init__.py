"""The commands, one file each; `app` finds them."""
