"""Training, resuming, chat and merging on the fake CUDA device (`xtuner.testing.fake_cuda`):
tensors report a CUDA device and are computed by the CPU. Kernels and speed of a real GPU are not
covered."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xtuner.cli.app import main
from xtuner.models.run_info import RunInfo
from xtuner.testing.fake_cuda import device as fake_cuda
from xtuner.testing.tiny import tiny_model_folder
from xtuner.testing.vision import tiny_llava_data, tiny_vision_tower_folder

pytestmark = [
    pytest.mark.skipif(fake_cuda.find_compiler() is None, reason="it has to be compiled"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch knows real ones"),
]
MB = 2**20
TEXT = """
pretrained_model_name_or_path = "model"
data_path = "rows.json"
prompt_template = "chatml"
max_length = 192
pack_to_max_length = True
batch_size = 1
accumulative_counts = 2
max_epochs = 9
max_steps = 6
save_steps = 3
logging_steps = 1
lr = 1e-3
dtype = "bfloat16"
tuning = "lora"
lora_r = 8
"""
IMAGES = """
llm_name_or_path = "model"
visual_encoder_name_or_path = "clip"
data_path = "data.json"
image_folder = "images"
prompt_template = "chatml"
max_length = 96
accumulative_counts = 1
max_epochs = 9
max_steps = 4
save_steps = 4
logging_steps = 1
dtype = "bfloat16"
"""
RUNS = {
    "lora": "",
    "windows": 'pretrained_model_name_or_path = "mistral"\n',
    "qlora": 'tuning = "qlora"\ngradient_checkpointing = True\n',
    "full": 'tuning = "full"\n',
    "projector": IMAGES + 'tuning = "full"\nfreeze_llm = True\nlr = 3e-2\n',
    "vision": IMAGES + 'tuning = "lora"\nlr = 1e-3\nlora_r = 4\nvisual_encoder_lora_r = 2\n',
    "moved": 'tuning = "qlora"\nembedding_on_cpu = True\n',
}
"""Settings of runs that the CPU takes as well."""
# Matrices of 100,000 numbers or more are paged.
PAGED = 'tuning = "qlora"\noptim_type = "PagedAdamW32bit"\npaged_optimizer = True\nlora_r = 1600\n'


class FakeCudaProcess:
    """A process with the fake CUDA device, which starts with its first command and takes many.

    Args:
        folder: The folder in which its commands run.
        words: Arguments of the driver.
    """

    def __init__(self, folder, *words):
        self.folder, self.arguments, self.process = folder, list(words), None

    def __call__(self, *commands):
        """The results of xtuner commands."""
        if self.process is None:
            driver = Path(__file__).parents[1] / "helpers" / "fake_cuda_driver.py"
            pipe, self.said = (
                subprocess.PIPE,
                (self.folder / f"said{''.join(self.arguments)}").open("w+"),
            )
            self.process = subprocess.Popen(
                [sys.executable, str(driver), *self.arguments],
                cwd=self.folder, stdin=pipe, stdout=pipe, stderr=self.said, text=True,
            )  # fmt: skip
        return [self.answer(c if isinstance(c, dict) else {"arguments": c}) for c in commands]

    def answer(self, command):
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(command), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith('{"code"'):
                return json.loads(line)
        self.said.seek(0)
        raise AssertionError(f"{command} ended the process: {self.said.read()[-3000:]}")

    def close(self):
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.said.close()


def train(name, work_dir, *options, device="cuda", **more):
    """The command that trains with the settings `name`."""
    set_ = [f"device={device}", *(f"{key}={value}" for key, value in more.items())]
    return ["train", f"{name}.py", "--work-dir", work_dir, *options, "--cfg-options", *set_]


def losses(work_dir):
    """The losses of all steps of all starts."""
    files = sorted(Path(work_dir).glob("*/scalars.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, compiled, fake_cuda_ready):
    folder = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("cache").mkdir()
        Path("cache/fake_cuda").symlink_to(compiled / "fake_cuda", target_is_directory=True)
        patch.setenv("XTUNER_CACHE", str(folder / "cache"))
        sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        tiny_model_folder("model", **sizes, initializer_range=0.1)
        tiny_model_folder("mistral", "mistral", **sizes, sliding_window=2, initializer_range=0.3)
        tiny_vision_tower_folder("clip", initializer_range=0.5)
        tiny_llava_data(folder / "data.json", folder / "images", count=12)
        rows = [
            {"instruction": f"What comes after {n}?", "input": "", "output": f"{n + 1} it is." * 3}
            for n in range(40)
        ]
        Path("rows.json").write_text(json.dumps(rows))
        for name, changes in {**RUNS, "paged": PAGED}.items():
            text = changes if changes.startswith(IMAGES) else TEXT + changes
            Path(f"{name}.py").write_text(text)
        yield folder


@pytest.fixture(autouse=True)
def inside(workshop, monkeypatch):
    monkeypatch.chdir(workshop)


@pytest.fixture(scope="module")
def on_fake_cuda(workshop):
    """Runs commands on the fake device."""
    runner = FakeCudaProcess(workshop)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def turing(workshop):
    """A process with a card that has no bfloat16."""
    with contextlib.closing(FakeCudaProcess(workshop, "turing")) as process:
        yield process


@pytest.fixture(scope="module")
def finished(on_fake_cuda):
    """All runs on the card, by name."""
    found = on_fake_cuda(*[train(name, f"gpu_{name}") for name in RUNS])
    return dict(zip(RUNS, found, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_it_learns_as_on_a_cpu(finished, name):
    assert finished[name]["code"] == 0, finished[name]["text"]
    assert "Attention    varlen flash attention (torch)\n" in finished[name]["text"]
    assert finished[name]["plans"] == 0  # its attention, sample answers and images
    assert main(train(name, f"cpu_{name}", "--overwrite", device="cpu")) == 0
    found, wanted = losses(f"gpu_{name}"), losses(f"cpu_{name}")
    assert len(found) == len(wanted) >= 4
    assert found == pytest.approx(wanted, rel=0.02)
    idle = train(name, f"idle_{name}", "--overwrite", device="cpu", lr=1e-12)
    assert main(idle) == 0
    assert losses(f"idle_{name}") != pytest.approx(found, rel=0.03)  # guards the comparison


def test_mixing_cpu_and_cuda_tensors_raises():
    code = """if True:
        from xtuner.testing.fake_cuda import device
        card = device.install(2**30)
        import torch
        from xtuner.kernels.attention.packed import without_cudnn
        x = torch.ones(1, 2, 3, 8, dtype=torch.bfloat16, device="cuda")
        with without_cudnn(x.device): torch.nn.functional.scaled_dot_product_attention(x, x, x)
        assert card.cudnn_plans == 0
        from xtuner.kernels.attention.packed import packed_attention, varlen
        varlen.functions_for = lambda device: varlen.Functions((9, 0))
        ends = torch.tensor([0, 1, 3], dtype=torch.int32)
        packed_attention(None, x, x, x, None, cu_seq_lens_q=ends)  # one sample at a time
        assert card.cudnn_plans == 0
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        assert card.cudnn_plans == 1
        table, ids = torch.ones(4, 3, device="cuda"), torch.tensor([0, 2])
        assert torch.cuda.get_device_properties(0).name == torch.cuda.get_device_name()
        print(torch.nn.functional.embedding(ids.cuda(), table).sum().item(), table[ids].device)
        try: torch.nn.functional.embedding(ids, table)
        except RuntimeError as error: print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("6.0 cuda:0\nExpected all tensors to be on the same device"), (
        done.stdout + done.stderr
    )


def test_with_kernels_of_liger_it_learns_the_same(workshop, finished):
    names = ("lora", "windows", "qlora")
    with contextlib.closing(FakeCudaProcess(workshop, "liger")) as with_liger:
        found = with_liger(*[train(name, f"liger_{name}") for name in names])
    for name, report in zip(names, found, strict=True):
        assert report["code"] == 0, report["text"]
        assert report["calls"] == ["rms_norm", "rope", "swiglu"]
        assert losses(f"liger_{name}") == pytest.approx(losses(f"gpu_{name}"), rel=0.02)


def test_gpu_without_bfloat16_trains_with_memory_efficient_attention(finished, turing):
    """A T4 supports neither flash attention nor bfloat16 products."""
    lora, windows, chat, refused = turing(
        train("lora", "t4_lora", dtype="float32"),
        train("windows", "t4_windows", dtype="float32"),
        ["chat", "t4_lora", "--device", "cuda", "--ask", "Who?", "--max-new-tokens", "3"],
        train("lora", "t4_bfloat16"),
    )
    assert (lora["code"], windows["code"], chat["code"]) == (0, 0, 0), lora["text"] + chat["text"]
    assert (
        "Attention    varlen memory-efficient attention (torch), because torch's flash "
        "attention needs compute capability 8.0 (Ampere), not 7.5\n"
    ) in lora["text"]
    assert losses("t4_lora") == pytest.approx(losses("gpu_lora"), rel=0.02)
    assert losses("t4_windows") == pytest.approx(losses("gpu_windows"), rel=0.02)
    assert "bfloat16 needs compute capability 8.0" in str(refused["code"])  # guards the comparison


@pytest.fixture(scope="module")
def counted(workshop, on_fake_cuda):
    """Short runs whose synchronizations are compared, by name."""

    def run(name, settings="lora", *, steps, **more):
        more = {"evaluation_rows": 0, **more}
        return train(settings, f"counted_{name}", max_steps=steps, save_steps=99, **more)

    runs = {
        "short": run("short", steps=2, accumulative_counts=1),
        "long": run("long", steps=6, accumulative_counts=1),
        "many": run("many", steps=6, accumulative_counts=3),
        "short_8bit": run("short_8bit", steps=2, optim_type="AdamW8bit"),
        "long_8bit": run("long_8bit", steps=6, optim_type="AdamW8bit"),
        "fits": run("fits", "paged", steps=1, paged_optimizer="auto"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        return dict(zip(runs, on_fake_cuda(*runs.values()), strict=True))


def test_step_synchronizes_twice(counted):
    """For the loss and the gradient norm, which are needed as numbers, whatever the number of
    micro-batches."""
    assert 0 < counted["long"]["waits"] - counted["short"]["waits"] <= 2 * 4
    assert counted["many"]["waits"] == counted["long"]["waits"]


def test_a_step_of_a_library_that_waits_for_each_matrix_waits_once_more(counted):
    """bitsandbytes' optimizers, over the 28 matrices of these adapters."""
    found = counted["long_8bit"]
    assert found["code"] == 0, found["text"]
    assert "one parameter at a time" not in found["text"]  # it has been verified
    assert 0 < found["waits"] - counted["short_8bit"]["waits"] <= 3 * 4


def test_state_that_fits_is_not_paged(counted):
    assert counted["fits"]["code"] == 0, counted["fits"]["text"]
    assert "fits unpaged: AdamW32bit for PagedAdamW32bit" in counted["fits"]["text"]


def test_gpu_without_bfloat16_trains_in_float16(workshop, turing):
    """LoRA, and QLoRA whose last steps are repeated; chat with the results and merge."""
    names = ("lora", "qlora")
    short = {"max_steps": 3, "save_steps": 2}
    asked = ["--ask", "What comes after 3?", "--max-new-tokens", "5", "--device", "cuda"]
    found = turing(
        *[train(name, f"turing_{name}", dtype="auto", **short) for name in names],
        train("qlora", "turing_qlora", "--resume", "iter_2", dtype="auto", **short),
        ["chat", "turing_qlora", *asked],
        ["convert", "merge", "model", "turing_qlora", "turing_merged", "--device", "cuda"],
    )
    assert [report["code"] for report in found] == [0] * len(found), found[-1]["text"]
    for name, report in zip(names, found, strict=False):
        assert "float16 (trained weights in float32; the loss scale starts" in report["text"]
        exact = train(name, f"exact_{name}", device="cpu", dtype="float32", **short)
        assert main(exact) == 0
        assert losses(f"turing_{name}")[:3] == pytest.approx(losses(f"exact_{name}"), rel=0.02)
        info = RunInfo.read(Path(f"turing_{name}/iter_3"))
        assert (info.settings["dtype"], info.dtype) == ("auto", "float16")
    straight, resumed = losses("turing_qlora")[2:]
    assert resumed == straight


def test_paged_state_survives_a_stop(on_fake_cuda):
    steady = {"lr_schedule": "constant", "warmup_ratio": 0}
    whole, _, rest = on_fake_cuda(
        train("paged", "whole", **steady),
        train("paged", "stopped", max_steps=3, **steady),
        train("paged", "stopped", "--resume", **steady),
    )
    assert (whole["code"], rest["code"]) == (0, 0), rest["text"]
    assert len(losses("whole")) == 6
    assert losses("stopped") == pytest.approx(losses("whole"), rel=1e-3)


def test_what_was_trained_there_is_merged_and_answers(on_fake_cuda, finished):
    asked = ["--ask", "What comes after 3?", "--max-new-tokens", "5"]
    merge = ["convert", "merge", "model", "gpu_lora", "merged", "--device", "cuda"]
    merged, apart, whole, drawn, seen = on_fake_cuda(
        merge,
        ["chat", "gpu_lora", "--device", "cuda", *asked],
        ["chat", "merged", "--device", "cuda", "--prompt-template", "chatml", *asked],
        ["chat", "gpu_qlora", "--device", "cuda", *asked, "--temperature", "1", "--seed", "3"],
        ["chat", "gpu_vision", "--device", "cuda", *asked, "--image", "images/5.png"],
    )
    for found in (merged, apart, whole, drawn, seen):
        assert found["plans"] == 0
        assert found["code"] == 0 and found["text"].strip(), found["text"]
    answers = [found["text"].partition("\n")[2].strip() for found in (apart, whole)]
    assert answers[0] == answers[1] != ""  # below the line on loading


def test_too_little_memory_loses_nothing_and_gives_hints(on_fake_cuda, finished):
    shutil.copytree("gpu_full", "tight")
    most = finished["full"]["most"] / MB
    (found,) = on_fake_cuda(
        {"arguments": train("full", "tight", "--resume", max_steps=8), "mib": 0.8 * most}
    )
    assert found["code"] == 2
    assert "Cheapest changes" in found["text"] and Path("tight/iter_6").is_dir()
