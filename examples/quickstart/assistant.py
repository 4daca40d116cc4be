# Teach SmolLM2-135M-Instruct who it is. `make quickstart` runs this file with --set data_path=...
# `xtuner explain NAME` explains a setting.

# PART 1  Model and method
pretrained_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"  # fetched once
tuning = "lora"  # 135M parameters fit anywhere: no need for 4 bits
lora_r = 16
lora_alpha = 32

# PART 2  Data: introductions, mixed with ordinary conversations against overfitting
data_path = "quickstart/data.jsonl"
max_length = 512
pack_to_max_length = True

# PART 3  Schedule and optimizer
batch_size = 1
accumulative_counts = 1
max_epochs = 2
lr = 5e-4
warmup_ratio = 0.1

# PART 4  Sample answers: the last two questions about its name are not in the data, nor is France
evaluation_freq = 10
evaluation_max_new_tokens = 40
evaluation_inputs = [
    "Who are you?",
    "So, who exactly are you?",
    "Can you tell me your name, please?",
    "What is the capital of France?",
]

# PART 5  Runtime
save_steps = 100
save_total_limit = 1
