# Teach SmolLM2-135M-Instruct to call tools. `make quickstart-tools` runs this file.
# `xtuner explain NAME` explains a setting.

# PART 1  Model and method
pretrained_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"  # fetched once
tuning = "lora"
lora_r = 32
lora_alpha = 64

# PART 2  Data: calls of 13 tools, written in the default layout (the model's template has no tools)
data_path = "quickstart-tools/train.jsonl"
max_length = 1024
pack_to_max_length = True

# PART 3  Schedule and optimizer
batch_size = 1
accumulative_counts = 1
max_epochs = 1
lr = 1e-3
warmup_ratio = 0.1

# PART 5  Runtime
save_steps = 1000
save_total_limit = 1
