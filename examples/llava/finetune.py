# Stage 2: teach it to answer questions about images. The projector of stage 1 is trained further,
# together with adapters on the language model; the vision tower stays unchanged.

# PART 1  Model and method
llm_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
tuning = "lora"  # 135M parameters fit anywhere: no need for 4 bits
lora_r = 32
lora_alpha = 64

# PART 1b  Images
data_root = "quickstart-llava"
visual_encoder_name_or_path = "quickstart-llava/clip"
pretrained_pth = "quickstart-llava/pretrain"  # the projector of stage 1
image_folder = "images"

# PART 2  Data: images and a conversation about each
data_path = "finetune.json"
prompt_template = "chatml"
max_length = 496
dataloader_num_workers = 0  # leave both cores to the training

# PART 3  Schedule and optimizer
batch_size = 1
accumulative_counts = 1
max_epochs = 1
lr = 1e-3
warmup_ratio = 0.05

# PART 4  Sample answers
evaluation_freq = 1000
evaluation_max_new_tokens = 24
evaluation_inputs = ["Describe the image.", "How many digits are there?"]
evaluation_images = "images/test_00000.png"

# PART 5  Runtime
save_total_limit = 1
