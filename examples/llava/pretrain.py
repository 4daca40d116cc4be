# Stage 1: teach a projector to show images to a language model. Nothing else is
# trained. `make quickstart-llava` runs this file. `xtuner explain NAME` explains a setting.

# PART 1  Model and method
llm_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"  # fetched once
tuning = "full"
freeze_llm = True

# PART 1b  Images
data_root = "quickstart-llava"
visual_encoder_name_or_path = "quickstart-llava/clip"  # trained by train_clip.py
freeze_visual_encoder = True
image_folder = "images"

# PART 2  Data: images and one sentence about each
data_path = "pretrain.json"
prompt_template = "chatml"
max_length = 496
dataloader_num_workers = 0  # leave both cores to the training

# PART 3  Schedule and optimizer
batch_size = 1
accumulative_counts = 1
max_epochs = 1
lr = 2e-3
warmup_ratio = 0.05

# PART 4  Sample answers
evaluation_freq = 1000
evaluation_max_new_tokens = 24
evaluation_inputs = ["Describe the image.", "How many digits are there?"]
evaluation_images = "images/test_00000.png"

# PART 5  Runtime
save_total_limit = 1
