"""Small configs in the form of XTuner 0.x, written for these tests."""

SFT = """
import torch
from datasets import load_dataset
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from xtuner.dataset import process_hf_dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.map_fns import openai_map_fn, template_map_fn_factory
from xtuner.engine.hooks import DatasetInfoHook, EvaluateChatHook, VarlenAttnArgsToMessageHubHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE

path = 'some/model'
varlen = False
rows = 'data/rows.jsonl'
template = PROMPT_TEMPLATE.internlm2_chat
longest = 512
counts = 16
counts *= 1
epochs = 2
lr = 2e-4
warmup = 0.03
every = 300
SYSTEM = ''

tokenizer = dict(
    type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=path, padding_side='right')

model = dict(
    type=SupervisedFinetune,
    use_varlen_attn=varlen,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=path,
        torch_dtype=torch.float16,
        quantization_config=dict(
            type=BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float16, bnb_4bit_quant_type='nf4')),
    lora=dict(type=LoraConfig, r=64, lora_alpha=16, lora_dropout=0.1, bias='none',
              task_type='CAUSAL_LM'))

train_dataset = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path='json', data_files=dict(train=rows)),
    tokenizer=tokenizer,
    max_length=longest,
    dataset_map_fn=openai_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=template),
    remove_unused_columns=True,
    shuffle_before_pack=True,
    pack_to_max_length=True,
    use_varlen_attn=varlen)

train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=train_dataset,
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate_fn, use_varlen_attn=varlen))

optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=0),
    clip_grad=dict(max_norm=1, error_if_nonfinite=False),
    accumulative_counts=counts,
    loss_scale='dynamic',
    dtype='float16')

param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=True, begin=0, end=warmup * epochs,
         convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, begin=warmup * epochs, end=epochs,
         convert_to_iter_based=True)]

train_cfg = dict(type=TrainLoop, max_epochs=epochs)

custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(type=EvaluateChatHook, tokenizer=tokenizer, every_n_iters=every,
         evaluation_inputs=['Who are you?'], system=SYSTEM, prompt_template=template)]
if varlen:
    custom_hooks += [dict(type=VarlenAttnArgsToMessageHubHook)]

default_hooks = dict(
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=10),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=every, max_keep_ckpts=3))

env_cfg = dict(cudnn_benchmark=False, dist_cfg=dict(backend='nccl'))
visualizer = None
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
log_processor = dict(by_epoch=False)
"""

LLAVA = """
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel
from xtuner.dataset import LLaVADataset
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.dataset.samplers import LengthGroupedSampler
from xtuner.engine.runner import TrainLoop
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

llm = 'some/llm'
clip = 'some/clip'
root = './data/'
size = 8
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=llm)
processor = dict(type=CLIPImageProcessor.from_pretrained, pretrained_model_name_or_path=clip)
model = dict(
    type=LLaVAModel, freeze_llm=True, freeze_visual_encoder=True,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=llm),
    visual_encoder=dict(type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path=clip))
train_dataloader = dict(
    batch_size=size,
    dataset=dict(
        type=LLaVADataset, data_path=root + 'rows.json', image_folder=root + 'images',
        tokenizer=tokenizer, image_processor=processor, dataset_map_fn=llava_map_fn,
        template_map_fn=dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.vicuna),
        max_length=int(2048 - (336 / 14) ** 2), pad_image_to_square=False),
    sampler=dict(type=LengthGroupedSampler, length_property='modality_length',
                 per_device_batch_size=size * 2))
optim_wrapper = dict(
    type=AmpOptimWrapper, optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0),
    clip_grad=dict(max_norm=1), accumulative_counts=2, dtype='bfloat16')
param_scheduler = [dict(type=CosineAnnealingLR, eta_min=1e-4, by_epoch=True, begin=0, end=1,
                        convert_to_iter_based=True)]
train_cfg = dict(type=TrainLoop, max_epochs=1)
"""
