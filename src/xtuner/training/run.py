"""The composition root of training: the one module that knows every part and joins them.

settings ─► tokenizer ─► template ─► data ─► loader ─► model ─► Trainer ─► checkpoints
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from xtuner.config.load import LoadedSettings
from xtuner.data.build import TrainingData
from xtuner.data.loader import Collate, Loader
from xtuner.data.packing.pack import PackedDataset
from xtuner.device import host
from xtuner.device.select import name_of, pick_device, resolve_dtype
from xtuner.engine import checkpoint as checkpoints
from xtuner.engine.checked_loss import checked_loss
from xtuner.engine.checkpoint import CheckpointStore
from xtuner.engine.counting import Counter
from xtuner.engine.hooks.base import Run, make_hooks
from xtuner.engine.optimizer import flat_check, optim
from xtuner.engine.optimizer.flat import FlatOptimizer
from xtuner.engine.optimizer.loss_scaler import LossScaler
from xtuner.engine.resume import check_shape, identity_of
from xtuner.engine.trainer import Interrupted, Trainer
from xtuner.engine.work_dir import WorkPlace
from xtuner.errors import CheckpointError, LaunchError
from xtuner.generation.generate import GenerationOptions, stream
from xtuner.kernels import compiled, threads
from xtuner.kernels.attention.packed import without_cudnn
from xtuner.kernels.attention.summary import attention_line
from xtuner.kernels.fused import liger
from xtuner.memory.plan import plan_memory
from xtuner.models.can_pack import resolve_packing
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.load import located_config
from xtuner.models.prepare import llm_autocast, make_trainable
from xtuner.models.run_info import RunInfo, installed_versions
from xtuner.models.save import save_model
from xtuner.parallel.processes import Processes
from xtuner.training.data_parts import DataParts
from xtuner.training.opening_lines import lines_of_model, opening_lines
from xtuner.training.vision import RunVision
from xtuner.types import Algorithm, Message


def train(
    loaded: LoadedSettings,
    *,
    work_dir: Path | None = None,
    resume: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Train as `loaded` says and return the work dir.

    Args:
        loaded: checked settings with their name.
        work_dir: overrides the setting.
        resume: 'last' or the name of a checkpoint in the work dir; None starts anew.
        overwrite: delete the checkpoints of an earlier run in the work dir.

    Raises:
        XTunerError: a fault that the user can hint.
        Interrupted: after Ctrl-C or SIGTERM; the last finished step is saved.
    """
    settings = loaded.settings
    processes = Processes(pick_device(settings.device))
    try:
        with without_cudnn(processes.device):
            path = _TrainingRun(loaded, processes, work_dir).train(resume, overwrite)
    except Interrupted:
        processes.close()
        raise
    # After a fault the others may be in the middle of a sum, where leaving would wait for them or
    # reach them before this process has told why.
    processes.close()
    return path


def dry_run(loaded: LoadedSettings, *, memory: int | None = None, processes: int = 1) -> bool:
    """Print what training would take, without reading weights or data; whether it fits.

    Args:
        loaded: checked settings with their name.
        memory: bytes to plan for; None takes what is free on the device.
        processes: how many would train; those on a CPU share `memory`.

    Raises:
        XTunerError: the model cannot be found, the forecast failed, or nobody says how much memory
            a GPU has that is not here.
    """
    settings = loaded.settings
    device = "cuda" if settings.device == "cuda" else pick_device(settings.device)
    settings, packing = resolve_packing(settings)
    plan = plan_memory(settings, device, memory=memory, processes=processes)
    console = Console(highlight=False, soft_wrap=True)
    for line in lines_of_model(settings, plan, resolve_dtype(settings.dtype, device)):
        console.print(line, markup=False)
    if packing:
        console.print(f"Samples      {packing}", markup=False)
    if plan.forecast.failure:
        raise LaunchError("nothing can be said of the memory of this run; training may work")
    console.print(
        f"{'Fits' if plan.fits else 'Does not fit'} in {plan.memory / 2**20:,.0f} MiB"
        f"{f' for each of {processes} processes' if processes > 1 else ''}; rows of "
        f"{settings.max_length:,} tokens{' plus one image' if settings.has_vision else ''}, "
        f"{settings.batch_size} per micro-batch. Nothing was trained.",
        markup=False,
    )
    return plan.fits


class _TrainingRun:
    """The parts of one training run, made in the order in which they need each other."""

    def __init__(self, loaded: LoadedSettings, processes: Processes, work_dir: Path | None):
        self.loaded, self.settings, self.processes = loaded, loaded.settings, processes
        self.console = Console(quiet=not processes.is_main, highlight=False, soft_wrap=True)
        folder = work_dir or Path(self.settings.work_dir or Path("work_dirs") / loaded.name)
        self.work_dir = folder.expanduser()
        self.device = processes.device.type
        self.dtype = resolve_dtype(self.settings.dtype, self.device)
        self.loss_scaler = LossScaler.for_dtype(self.dtype)
        self.store = CheckpointStore(self.work_dir, self.settings.save_total_limit)
        self.vision: RunVision | None = None
        self.means = list(self._means())

    def _means(self) -> Iterator[str]:
        """Get threads and kernels ready, and say which."""
        on_cpu, wanted = self.device == "cpu", self.settings.num_threads
        if on_cpu and host.keep_freed_memory():
            host.ask_for_huge_pages()
        if on_cpu or wanted:  # a GPU's run does not wait for products on the CPU to be measured
            yield threads.choose_threads(wanted, self.dtype, self.processes.world_size)
        yield compiled.state() if on_cpu else liger.state(self.processes.device)

    def _attention(self) -> str:
        """Choose the kernels of attention, and say which."""
        s = self.settings
        config = located_config(
            s.pretrained_model_name_or_path, trust_remote_code=s.trust_remote_code
        )
        return attention_line(
            config, self.processes.device, self.dtype, implementation=s.attn_implementation
        )

    def train(self, resume: str | None, overwrite: bool) -> Path:
        """Make everything, then run the loop."""
        settings, console = self.settings, self.console
        source = self._resumable(resume) if resume else None
        self.parts = DataParts.open(self.loaded)
        self.settings = settings = self.parts.settings
        self.tokenizer, self.template = self.parts.tokenizer, self.parts.template
        algorithm = self.parts.algorithm
        if settings.has_vision:
            self.vision = RunVision.of(settings, self.tokenizer, folder=self.loaded.folder)
        place = self._prepare_place(resuming=source is not None, overwrite=overwrite)
        data = self._build_data(place)
        loader = self._loader(data.train, algorithm)
        counter = Counter(
            unit=settings.steps_are,
            steps_per_epoch=loader.steps_per_epoch,
            micro_batches_per_epoch=loader.micro_batches_per_epoch,
            accumulative_counts=settings.accumulative_counts,
        )
        total = loader.steps_per_epoch * settings.max_epochs
        total = counter.steps_for(settings.max_steps, most=total) if settings.max_steps else total
        self.plan = plan_memory(settings, self.device, processes=self.processes.world_size)
        self._tell(data, counter, total)
        model = self._make_model(source)
        optimizer = self._make_optimizer(model)
        run = Run(
            settings=settings,
            work_dir=self.work_dir,
            log_dir=place.log_dir,
            console=console,
            answer=lambda question, *images: self._answer(model, question, images),
            total_steps=total,
            validate=self._validation(model, data.validation, algorithm),
            counter=counter,
        )
        self.identity = identity_of(
            settings,
            data.train.fingerprint(),
            processes=self.processes.world_size,
            dtype=name_of(self.dtype),
        )
        if source is not None:
            self._restore(source, optimizer, run)
        if run.step >= total:
            console.print(
                f"Nothing to do: {source} is at step {run.step} of {total}. "
                "To go on, raise max_epochs or max_steps.",
                markup=False,
            )
            return self.work_dir
        self.model, self.optimizer = model, optimizer
        trainer = Trainer(
            model=model,
            algorithm=algorithm,
            loader=loader,
            optimizer=optimizer,
            processes=self.processes,
            run=run,
            hooks=(
                make_hooks(run, custom=settings.custom_hooks, folder=self.loaded.folder)
                if self.processes.is_main
                else []
            ),
            save=self._save,
            memory_advice=lambda: "\n".join(self.plan.hints()),
            loss_scaler=self.loss_scaler,
        )
        if overwrite and self.processes.is_main:
            self._clear()
        trainer.fit()
        console.print(
            f"Done. The result is in {self.store.find()}\nTalk to it:  xtuner chat {self.work_dir}",
            markup=False,
        )
        return self.work_dir

    def _prepare_place(self, *, resuming: bool, overwrite: bool) -> WorkPlace:
        """The main process makes the folders; the others look nothing up there."""
        if not self.processes.is_main:
            return WorkPlace(self.work_dir, self.work_dir)
        place = WorkPlace.prepare(self.work_dir, resuming=resuming, overwrite=overwrite)
        place.keep_settings(self.loaded)
        return place

    def _build_data(self, place: WorkPlace) -> TrainingData:
        """Encode in the main process first; the others then find everything in the cache."""

        def once() -> TrainingData:
            return self.parts.build(
                report_dir=place.log_dir if self.processes.is_main else None,
                quiet=not self.processes.is_main,
            )

        if not self.processes.is_main:
            self.processes.wait()
        data = once()
        if self.processes.is_main:
            self.processes.wait()
        return data

    def _loader(self, dataset: PackedDataset, algorithm: Algorithm) -> Loader:
        s = self.settings
        return Loader(
            dataset,
            collate=self._collate(algorithm),
            batch_size=s.batch_size,
            accumulative_counts=s.accumulative_counts,
            seed=s.seed,
            shuffle=s.shuffle,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            num_workers=s.dataloader_num_workers,
            pin_memory=self.device == "cuda",
            grouped=s.has_vision and s.group_by_modality and s.shuffle,
        )

    def _collate(self, algorithm: Algorithm) -> Collate:
        return self.vision.collate(algorithm) if self.vision else algorithm.collate

    def _make_model(self, source: Path | None) -> PackedCausalLM:
        """Load and prepare the model, going on from `source`; verify its shortcuts."""
        s, device = self.settings, str(self.processes.device)
        recompute = self.plan.forecast.recompute
        llm = make_trainable(
            s,
            dtype=self.dtype,
            device=device,
            recompute=recompute,
            embedding_on_cpu=self.plan.embedding_on_cpu,
            source=source,
        )
        if self.vision:
            wrapped: PackedCausalLM = self.vision.join(
                llm, dtype=self.dtype, device=device, source=source
            )
            if recompute and s.visual_encoder_training != "frozen":
                self.vision.recompute()
        else:
            wrapped = PackedCausalLM(llm, autocast=llm_autocast(s, self.dtype))
        if note := wrapped.verify(packed=s.packs):
            self.console.print(f"Note: {note}.")
        for line in self.vision.trained() if self.vision else ():
            self.console.print(line, markup=False)
        return wrapped

    def _make_optimizer(self, model: PackedCausalLM) -> Any:
        """The optimizer, over flat buffers where its steps are many and stay the same."""
        s = self.settings
        made = optim.make_optimizer(
            s.optim_type,
            model,
            lr=s.lr,
            betas=s.betas,
            weight_decay=s.weight_decay,
            paged=self.plan.paged,
        )
        if not flat_check.wants_flat_steps(made):
            return made
        fault = flat_check.fault_in_flat_steps(made)
        if faults := self.processes.gather([fault] if fault else []):
            self.console.print(
                f"Note: {type(made).__name__} steps over one parameter at a time: over flat "
                f"buffers {faults[0]}.",
                markup=False,
            )
            return made
        return FlatOptimizer(made)

    def _tell(self, data: TrainingData, counter: Counter, total: int) -> None:
        """Say in a few lines what will be done."""
        self.work_dir.mkdir(parents=True, exist_ok=True)
        lines = opening_lines(
            self.settings,
            self.plan,
            dtype=self.dtype,
            means=("; ".join(self.means), self._attention()),
            processes=self.processes.world_size,
            steps=(total, counter),
            data=data.report.lines(),
            images=self.vision.line() if self.vision else None,
            packing=self.parts.packing,
            work_dir=self.work_dir,
        )
        for line in lines:
            self.console.print(line, markup=False)

    def _answer(self, model: PackedCausalLM, question: str, images: Sequence[str] = ()) -> str:
        s = self.settings
        options = GenerationOptions(
            max_new_tokens=s.evaluation_max_new_tokens, stop_words=s.evaluation_stop_words
        )
        asked = self.vision.question(question, images) if self.vision else Message("user", question)
        system = s.evaluation_system
        messages = [asked] if system is None else [Message("system", system), asked]
        with torch.autocast(self.device, dtype=model.autocast, enabled=model.autocast is not None):
            pieces = stream(
                model.model,
                self.tokenizer,
                template=self.template,
                messages=messages,
                options=options,
                vision=self.vision.image_input if self.vision else None,
            )
            return "".join(pieces)

    def _validation(
        self, model: PackedCausalLM, dataset: PackedDataset | None, algorithm: Algorithm
    ) -> Any:
        """A function that returns the mean loss a supervised token over the validation split."""
        if dataset is None:
            return None
        device = self.processes.device

        def measure() -> float:
            model.eval()
            total = count = 0.0
            with torch.no_grad():
                for index in range(len(dataset)):
                    batch = self._collate(algorithm)(dataset[index])
                    total += float(checked_loss(algorithm, model, batch.to(device)).loss)
                    count += algorithm.count(batch)
            model.train()
            return total / max(1.0, count)

        return measure

    def _clear(self) -> None:
        """Delete the checkpoints of an earlier run, now that everything else has worked."""
        base = Path(self.settings.pretrained_model_name_or_path).resolve()
        if any(base.is_relative_to(path.resolve()) for path in self.store.all()):
            raise CheckpointError(
                f"--overwrite would delete {base}, the model that this run starts from: "
                "train elsewhere with --work-dir DIR"
            )
        self.store.clear()

    def _resumable(self, resume: str) -> Path:
        source = self.store.find(None if resume == "last" else resume)
        check_shape(source, self.settings)
        return source

    def _restore(self, source: Path, optimizer: Any, run: Run) -> None:
        """Bring back the optimizer and the step."""
        run.step, changed = checkpoints.load_state(
            source, optimizer=optimizer, identity=self.identity, loss_scaler=self.loss_scaler
        )
        run.start_step = run.step
        self.console.print(f"Resuming from {source} at step {run.step}.", markup=False)
        if changed:
            self.console.print(
                "Note: what changed since makes this run differ from a straight one: "
                + "; ".join(changed),
                markup=False,
            )

    def _save(self, run: Run) -> None:
        if self.processes.is_main:
            path = self.store.save(run.count, lambda folder: self._write_checkpoint(folder, run))
            self.console.print(f"Saved {path}", markup=False)
        self.processes.wait()

    def _write_checkpoint(self, folder: Path, run: Run) -> None:
        base = self.settings.pretrained_model_name_or_path
        if self.vision:
            self.vision.save(folder)
        else:
            save_model(self.model.model, folder)
        self.tokenizer.save_pretrained(str(folder))
        RunInfo(
            kind="llava" if self.vision else "adapter" if self.settings.uses_adapter else "model",
            base_model=str(Path(base).resolve()) if Path(base).is_dir() else base,
            prompt_template=self.template.name,
            system=self.settings.SYSTEM,
            step=run.step,
            epoch=round(run.epoch, 6),
            settings=self.settings.model_dump(mode="json"),
            versions=installed_versions(),
            visual_encoder=self.vision.encoder if self.vision else "",
            dtype=name_of(self.dtype),
        ).write(folder)
        checkpoints.save_state(
            folder,
            step=run.step,
            optimizer=self.optimizer,
            identity=self.identity,
            loss_scaler=self.loss_scaler,
        )
