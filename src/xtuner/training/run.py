"""The composition root of training: the only module that knows and connects all parts.

settings ─► tokenizer ─► template ─► data ─► loader ─► model ─► strategy ─► Trainer ─► checkpoints
"""

from __future__ import annotations

import contextlib
import os
import shlex
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from torch import nn

from xtuner.config import recipe
from xtuner.config.load import LoadedSettings
from xtuner.convert import old_checkpoint
from xtuner.data.build import TrainingData
from xtuner.data.loader import Collate
from xtuner.device.select import name_of, pick_device, resolve_dtype
from xtuner.engine import run_lock, strategies
from xtuner.engine.best import BestMetric
from xtuner.engine.checkpoint import CheckpointStore
from xtuner.engine.counting import Counter, counting_of
from xtuner.engine.hooks.base import Run, make_hooks
from xtuner.engine.optimizer import optim
from xtuner.engine.optimizer.loss_scaler import LossScaler
from xtuner.engine.resume import check_shape, identity_of
from xtuner.engine.signals import Interrupted
from xtuner.engine.trainer import Trainer
from xtuner.engine.work_dir import WorkPlace
from xtuner.engine.working import say, working
from xtuner.hub import old_pth
from xtuner.kernels.attention.packed import without_cudnn
from xtuner.memory.plan import plan_memory
from xtuner.models import manifest
from xtuner.models.adapters import notes_on_adapters
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.neftune import EmbeddingNoise
from xtuner.models.prepare import llm_autocast, make_trainable
from xtuner.models.run_info import RunInfo
from xtuner.parallel.processes import Processes
from xtuner.training import graphs, preflight
from xtuner.training.checkpoint_writer import CheckpointWriter
from xtuner.training.computing import choose_attention, prepare_computing
from xtuner.training.data_parts import DataParts
from xtuner.training.evaluate import SampleAnswers, Validation
from xtuner.training.final_check import final_check
from xtuner.training.holdings import holdings
from xtuner.training.languages import FIRST_SAMPLES, loss_note, mean_loss, script_note
from xtuner.training.opening_lines import opening_lines
from xtuner.training.publish import publish
from xtuner.training.recording import Recording, recording
from xtuner.training.result import TrainResult
from xtuner.training.vision import RunVision


def train(
    loaded: LoadedSettings,
    *,
    work_dir: Path | None = None,
    resume: str | None = None,
    overwrite: bool = False,
) -> TrainResult:
    """Train with the settings `loaded`.

    Args:
        loaded: Checked settings with their name.
        work_dir: Overrides the setting.
        resume: 'last' or the name of a checkpoint in the work dir; None starts a new run.
        overwrite: Delete the checkpoints of an earlier run in the work dir.

    Raises:
        XTunerError: A problem that the user can fix.
        Interrupted: After Ctrl-C or SIGTERM; the last completed step is saved.
    """
    settings = loaded.settings
    # If DeepSpeed is installed, transformers imports it, and it would warn that there is no GPU.
    os.environ.setdefault("DS_ACCELERATOR", pick_device(settings.device))
    processes = Processes(
        pick_device(settings.device),
        sequence_parallel_size=settings.sequence_parallel_size,
        hang_timeout=settings.hang_timeout,
    )
    try:
        folder = loaded.work_dir(work_dir)
        with without_cudnn(processes.device), run_lock.hold(folder, needed=processes.is_main):
            run = _TrainingRun(loaded, processes, work_dir)
            try:
                result = run.train(resume, overwrite)
            finally:
                run.close()
    except Interrupted:
        processes.close()
        raise
    # After an error the others may be in the middle of a reduction: leaving the group would block,
    # or stop them before this process has reported the error.
    processes.close()
    return result


class _TrainingRun:
    """The parts of one training run, created in the order of their dependencies."""

    def __init__(self, loaded: LoadedSettings, processes: Processes, work_dir: Path | None):
        self.loaded, self.settings, self.processes = loaded, loaded.settings, processes
        self.console = Console(quiet=not processes.is_main, highlight=False, soft_wrap=True)
        self.work_dir = loaded.work_dir(work_dir)
        self.device = processes.device.type
        self.dtype = resolve_dtype(self.settings.dtype, self.device)
        self.loss_scaler = LossScaler.for_dtype(self.dtype)
        self.store = CheckpointStore(
            self.work_dir,
            self.settings.save_total_limit,
            alias=self.settings.steps_are == "micro_batches",
        )
        self.old_weights: TemporaryDirectory[str] | None = None
        self.vision: RunVision | None = None
        self.chosen: tuple[str, ...] = ()
        with working(self.console, "Measuring the threads, compiling kernels at the first start"):
            self.computing = prepare_computing(self.settings, processes, self.dtype)

    def train(self, resume: str | None, overwrite: bool) -> TrainResult:
        """Create all parts, then run the training loop."""
        source = self._resumable(resume) if resume else None
        with working(self.console, "Loading the tokenizer"):
            self.parts = DataParts.open(self._loaded(source))
        self.settings = settings = self.parts.settings
        preflight.check_run(settings)
        self.strategy = strategies.of_run(settings, self.processes, folder=self.loaded.folder)
        if settings.has_vision:
            self.vision = RunVision.of(settings, self.parts.tokenizer, folder=self.loaded.folder)
        folders = self._prepare_folders(
            resuming=source is not None and self.old_weights is None, overwrite=overwrite
        )
        data, where = self.parts.build_once(
            self.processes, report_dir=folders.log_dir if self.processes.is_main else None
        )
        data.report.refuse_lost(settings.max_lost_rows)
        if where:
            self.console.print(f"Tokenizing   {where}", markup=False)
        self._settle(data)
        settings = self.settings
        loader = self.parts.loader(data.train, collate=self._collate(), processes=self.processes)
        counter, total = counting_of(settings, loader)
        with working(self.console, "Forecasting memory"):
            self.plan = plan_memory(
                settings,
                self.device,
                processes=self.processes.world_size,
                folder=self.loaded.folder,
            )
        lines = self._tell(data, counter, total)
        with working(self.console, "Loading the model"):
            model = self._make_model(source)
            self._prepare(model)
            graphs.use(model, settings, self.strategy, fits=self.plan.graphs, console=self.console)
        run = self._run(folders, model, data, counter, total)
        writer = self._writer(model, data)
        if source is not None and self.old_weights is None:
            writer.restore(source, run)
        if run.step >= total:
            self.console.print(
                f"Nothing to do: {source} is at step {run.step} of {total}. To continue, raise "
                f"max_epochs or max_steps.",
                markup=False,
            )
            return self._result(run)
        trainer = Trainer(
            strategy=self.strategy,
            algorithm=self.parts.algorithm,
            loader=loader,
            run=run,
            hooks=[
                *make_hooks(run, custom=settings.custom_hooks, folder=self.loaded.folder),
                *final_check(settings, data, self.asked),
            ],
            save=writer.save,
            memory_advice=lambda: "\n".join(self.plan.hints()),
            loss_scaler=self.loss_scaler,
            best=self._best(resuming=source is not None),
            mark_best=self._mark_best,
        )
        if source is None:
            self._note_language(data)
        if overwrite and self.processes.is_main:
            self.store.clear(keep=Path(settings.pretrained_model_name_or_path))
        recorded = self._recording(run, lines) if self.processes.is_main else None
        with recorded.running() if recorded else contextlib.nullcontext():
            trainer.fit()
        result = self._result(run)
        self.console.print(
            f"Done. The result is in {result.checkpoint}\n"
            f"Talk to it:  {shlex.join(['xtuner', 'chat', str(self.work_dir)])}",
            markup=False,
        )
        if recorded:
            recorded.tell()
        if settings.push_to_hub and result.checkpoint and self.processes.is_main:
            self.console.print(f"Uploading to {settings.push_to_hub} ...", markup=False)
            address = publish(
                result.checkpoint, settings.push_to_hub, private=settings.hub_private_repo
            )
            self.console.print(f"Uploaded to {address}", markup=False)
        return result

    def _loaded(self, source: Path | None) -> LoadedSettings:
        """The settings; where they leave something to xtuner, a resume takes what the run had."""
        info = RunInfo.read(source) if source else None
        before = recipe.as_before(self.settings, info.settings if info else {})
        return replace(self.loaded, settings=before)

    def _settle(self, data: TrainingData) -> None:
        """Decide the settings that depend on the amount of data."""
        self.chosen = recipe.chosen(self.settings)
        self.settings = recipe.resolved(
            self.settings,
            rows=data.train.num_samples,
            packs=len(data.train),
            length=data.pack_length,
            ranks=self.processes.data_world_size,
        )
        self.parts = replace(self.parts, settings=self.settings)

    def _best(self, *, resuming: bool) -> BestMetric:
        best = BestMetric(self.settings, self.work_dir, self.processes)
        if resuming:
            best.resume()
        return best

    def _mark_best(self, run: Run, told: str) -> None:
        if self.processes.is_main:
            self.store.mark_best(run.count, told)
            self.console.print(f"Best so far: {told}", markup=False)

    def _recording(self, run: Run, lines: list[str]) -> Recording:
        return recording(
            self.loaded,
            self.settings,
            self.plan,
            dtype=name_of(self.dtype),
            processes=self.processes.world_size,
            steps=(run.step, run.total_steps),
            lines=lines,
            folders=(run.log_dir, self.work_dir),
            console=self.console,
        )

    def _note_language(self, data: TrainingData) -> None:
        """Say so if the model cannot predict the answers that it will be trained on."""
        alone = self.processes.world_size == 1 and not self.vision
        samples = data.train[0][:FIRST_SAMPLES] if alone else []
        if not samples or any(sample.lengths for sample in samples):
            return
        batch = self.parts.algorithm.collate(samples).to(self.processes.device)
        loss = mean_loss(self.strategy.model, batch)
        if note := loss_note(loss, samples, self.parts.tokenizer.decode):
            say(self.console, f"Note         {note}")

    def _result(self, run: Run) -> TrainResult:
        saved = self.store.find() if self.store.all() else None
        return TrainResult(self.work_dir, saved, run.step, dict(run.scalars))

    def _run(
        self,
        folders: WorkPlace,
        model: PackedCausalLM,
        data: TrainingData,
        counter: Counter,
        total: int,
    ) -> Run:
        """The state that hooks see, and the functions that they can call."""
        self.asked = asked = SampleAnswers(
            settings=self.settings,
            model=model,
            tokenizer=self.parts.tokenizer,
            template=self.parts.template,
            processes=self.processes,
            sharded=self.strategy.sharded,
            vision=self.vision,
            entrance=self.strategy.model if self.strategy.sharded else None,
        )
        validate = None
        if data.validation is not None:
            split, algorithm = data.validation, self.parts.algorithm
            validate = Validation(self.strategy, split, algorithm, self._collate()).measure
        return Run(
            settings=self.settings,
            work_dir=self.work_dir,
            log_dir=folders.log_dir,
            console=self.console,
            answer=asked.answer,
            ask_all=asked.answers,
            validate=validate,
            total_steps=total,
            counter=counter,
            is_main=self.processes.is_main,
        )

    def _writer(self, model: PackedCausalLM, data: TrainingData) -> CheckpointWriter:
        identity = identity_of(
            self.settings,
            data.train.fingerprint(),
            processes=self.processes.data_world_size,
            dtype=name_of(self.dtype),
        )
        return CheckpointWriter(
            settings=self.settings,
            store=self.store,
            strategy=self.strategy,
            model=model.model,
            tokenizer=self.parts.tokenizer,
            template=self.parts.template,
            identity=identity,
            dtype=self.dtype,
            loss_scaler=self.loss_scaler,
            vision=self.vision,
            console=self.console,
        )

    def _prepare_folders(self, *, resuming: bool, overwrite: bool) -> WorkPlace:
        """Only the main process creates the folders and reads them."""
        if not self.processes.is_main:
            return WorkPlace(self.work_dir, self.work_dir)
        folders = WorkPlace.prepare(self.work_dir, resuming=resuming, overwrite=overwrite)
        folders.keep_settings(self.loaded)
        return folders

    def _collate(self) -> Collate:
        algorithm = self.parts.algorithm
        return self.vision.collate(algorithm) if self.vision else algorithm.collate

    def _make_model(self, source: Path | None) -> PackedCausalLM:
        """Load and prepare the model, with weights from `source` if given, and verify its
        shortcuts."""
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
        if note := wrapped.verify(packed=self.loaded.settings.pack_to_max_length is True):
            self.console.print(f"Note: {note}.")
        if self.processes.sequence is not None:
            wrapped.split_rows(self.processes.sequence)
        for note in notes_on_adapters(llm) if s.uses_adapter else ():
            self.console.print(f"Note: {note}.", markup=False)
        for line in self.vision.trained() if self.vision else ():
            self.console.print(line, markup=False)
        if s.neftune_noise_alpha is not None:
            embedding = wrapped.causal.get_input_embeddings()
            wrapped.noise = EmbeddingNoise(embedding, s.neftune_noise_alpha)
        return wrapped

    def _prepare(self, model: PackedCausalLM) -> None:
        """Hand the model to the strategy, and print its notes."""
        s = self.settings

        def make(prepared: nn.Module) -> torch.optim.Optimizer:
            return optim.make_optimizer(
                self.strategy.optimizer_for(s.optim_type),
                prepared,
                lr=s.lr,
                betas=s.betas,
                weight_decay=s.weight_decay,
                loraplus_lr_ratio=s.loraplus_lr_ratio,
                paged=self.plan.paged,
            )

        with_images = model.embedder is not None
        together = self.strategy.lockstep and self.processes.world_size > 1
        model.always_embeds = with_images and together
        everything = sum(p.numel() * p.element_size() for p in model.parameters())
        trained = sum(p.numel() * p.element_size() for p in optim.trainable(model))
        self.strategy.prepare(model, make)
        for line in holdings(
            self.strategy,
            weights=everything,
            gradients=trained,
            optimizer=self.plan.forecast.optimizer,
        ):
            self.console.print(line, markup=False)
        for note in self.strategy.notes:
            self.console.print(f"Note: {note}", markup=False)

    def _tell(self, data: TrainingData, counter: Counter, total: int) -> list[str]:
        """Print a few lines on what will be done, and return them."""
        self.work_dir.mkdir(parents=True, exist_ok=True)
        lines = [
            *opening_lines(
                self.settings,
                self.plan,
                dtype=self.dtype,
                computing=(
                    self.computing,
                    choose_attention(self.settings, self.processes, self.dtype),
                ),
                layout=self.processes.layout,
                steps=(total, counter),
                data=data.report.lines(),
                chosen=self.chosen,
                language=script_note(data.train[0], self.parts.tokenizer.decode),
                images=self.vision.line() if self.vision else None,
                packing=self.parts.packing,
                positions=preflight.note_on_positions(self.settings, data.train),
                work_dir=self.work_dir,
            )
        ]
        for line in lines:
            say(self.console, line)
        return lines

    def _resumable(self, resume: str) -> Path:
        if old_pth.is_old(old := Path(resume).expanduser()):
            return self._old_weights(old)
        source = self.store.find(None if resume == "last" else resume)
        if self.processes.is_main:
            manifest.check(source, resuming=True)
        check_shape(source, self.settings)
        return source

    def close(self) -> None:
        """Delete temporary files."""
        if self.old_weights is not None:
            self.old_weights.cleanup()

    def _old_weights(self, path: Path) -> Path:
        """The weights of an XTuner 0.x checkpoint, as a folder."""
        self.old_weights = TemporaryDirectory(prefix="xtuner-")
        folder = Path(self.old_weights.name) / path.stem
        old_checkpoint.write_folder(path, self.settings, folder)
        self.console.print(
            f"Note: {path} is an XTuner 0.x checkpoint: the run starts from its weights, at step "
            f"0 with a new optimizer.",
            markup=False,
        )
        return folder
