"""What is optimised: one file an algorithm, its name is the value of the setting `algorithm`."""
