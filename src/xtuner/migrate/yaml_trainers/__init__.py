"""YAML files of LLaMA-Factory and torchtune."""
