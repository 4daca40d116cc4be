"""The composition root of training: the only module that knows and connects all parts.

settings ─► tokenizer ─► template ─► data ─► loader ─► model ─► strategy ─► Trainer ─► checkpoints
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from xtuner.config import recipe
from xtuner.config.load import LoadedSettings
from xtuner.data.build import TrainingData
from xtuner.data.loader import Collate, Loader
from xtuner.device import host
from xtuner.device.select import name_of, pick_device, resolve_dtype
from xtuner.engine import strategies
from xtuner.engine.best import BestMetric
from xtuner.engine.checkpoint import BEST_FILE, CheckpointStore
from xtuner.engine.counting import Counter, counting_of
from xtuner.engine.hooks.base import Run, make_hooks
from xtuner.engine.kept_settings import keep_settings
from xtuner.engine.optimizer.loss_scaler import LossScaler
from xtuner.engine.resume import identity_of
from xtuner.engine.signals import Interrupted
from xtuner.engine.trainer import Trainer
from xtuner.engine.work_dir import RunDirs
from xtuner.engine.working import say, working
from xtuner.errors import shell_command
from xtuner.kernels.attention.packed import without_cudnn
from xtuner.memory.plan import plan_memory
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.run_info import RunInfo
from xtuner.parallel.processes import Processes
from xtuner.training import graphs, preflight
from xtuner.training.checkpoint_writer import CheckpointWriter
from xtuner.training.computing import choose_attention, prepare_computing
from xtuner.training.data_parts import DataParts
from xtuner.training.evaluate import SampleAnswers, Validation
from xtuner.training.final_check import final_check
from xtuner.training.languages import FIRST_SAMPLES, loss_note, mean_loss, script_note
from xtuner.training.model_setup import hand_over, make_model
from xtuner.training.opening_lines import opening_lines
from xtuner.training.origin import Origin, claimed_work_dir, nothing_to_do, open_origin
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
    wait: bool = False,
) -> TrainResult:
    """Train with the settings `loaded`.

    Args:
        loaded: Checked settings with their name.
        work_dir: Overrides the setting.
        resume: 'last' or the name of a checkpoint in the work dir; 'auto' is the last if there is
            one, otherwise a new run, and so is 'last' for a run that ended before its first save;
            None starts a new run.
        overwrite: Delete the checkpoints of an earlier run in the work dir.
        wait: Wait while another run holds the work dir; False is an error then.

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
        claimed = claimed_work_dir(
            loaded, folder, processes, resume=resume, overwrite=overwrite, wait=wait
        )
        with without_cudnn(processes.device), claimed as origin:
            result = _TrainingRun(loaded, processes, work_dir).train(origin, overwrite)
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
        self.vision: RunVision | None = None
        self.chosen: tuple[str, ...] = ()
        with working(self.console, "Choosing threads (the first start also compiles kernels)"):
            self.computing = prepare_computing(self.settings, processes, self.dtype)

    def train(self, resume: str | None, overwrite: bool) -> TrainResult:
        """Create all parts, then run the training loop."""
        with (
            contextlib.ExitStack() as self._closing,
            open_origin(
                resume,
                self.settings,
                self.store,
                is_main=self.processes.is_main,
                console=self.console,
            ) as origin,
        ):
            return self._train(origin, overwrite)

    def _train(self, origin: Origin, overwrite: bool) -> TrainResult:
        self._open(origin)
        folders = self._prepare_folders()
        data = self._read_data(folders)
        loader = self.parts.loader(data.train, collate=self._collate(), processes=self.processes)
        counter, total = counting_of(self.settings, loader)
        self._forecast()
        lines = self._print_opening(data, counter, total)
        model = self._make_model(origin)
        run = self._run(folders, model, data, counter, total)
        writer = self._writer(model, data)
        if origin.folder and origin.resuming:
            writer.restore(origin.folder, run)
        if ended := nothing_to_do(run, writer.best):
            self._say(f"Nothing to do: {origin.folder} {ended}.")
            return self._result(run)
        trainer = self._trainer(run, loader, data, writer)
        if origin.folder is None:
            self._note_language(data)
        if overwrite and self.processes.is_main:
            self.store.clear(keep=Path(self.settings.pretrained_model_name_or_path))
        recorded = self._recording(run, lines) if self.processes.is_main else None
        with recorded.running() if recorded else contextlib.nullcontext():
            trainer.fit()
        return self._finish(run, recorded)

    def _open(self, origin: Origin) -> None:
        """Tokenizer, template, algorithm, strategy and vision parts; check that they fit."""
        with working(self.console, "Loading the tokenizer"):
            self.parts = DataParts.open(self._loaded(origin.folder))
        self.settings = settings = self.parts.settings
        preflight.check_run(settings, folder=self.loaded.folder)
        self.strategy = strategies.of_run(settings, self.processes, folder=self.loaded.folder)
        self._closing.callback(self.strategy.close)
        if self.device == "cpu" and (size := self.strategy.returns_from) is not None:
            host.return_blocks_from(size)
        if settings.has_vision:
            self.vision = RunVision.of(settings, self.parts.tokenizer, folder=self.loaded.folder)

    def _read_data(self, folders: RunDirs) -> TrainingData:
        """Read the data, and decide the settings that depend on their amount."""
        data, where = self.parts.build_once(
            self.processes, report_dir=folders.log_dir if self.processes.is_main else None
        )
        data.report.refuse_lost(self.settings.max_lost_rows)
        if where:
            self._say(f"Tokenizing   {where}")
        self._settle(data)
        return data

    def _forecast(self) -> None:
        with working(self.console, "Forecasting memory"):
            self.plan = plan_memory(
                self.settings,
                self.device,
                processes=self.processes.world_size,
                folder=self.loaded.folder,
            )

    def _make_model(self, origin: Origin) -> PackedCausalLM:
        with working(self.console, "Loading the model"):
            model = make_model(
                self.settings,
                self.plan,
                self.processes,
                dtype=self.dtype,
                vision=self.vision,
                weights=origin.folder,
                packing_asked=self.loaded.settings.pack_to_max_length is True,
                console=self.console,
            )
            hand_over(model, self.strategy, self.settings, self.plan, console=self.console)
            graphs.use(
                model, self.settings, self.strategy, fits=self.plan.graphs, console=self.console
            )
        return model

    def _trainer(
        self,
        run: Run,
        loader: Loader,
        data: TrainingData,
        writer: CheckpointWriter,
    ) -> Trainer:
        settings = self.settings
        return Trainer(
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
            best=writer.best,
            mark_best=self._mark_best,
        )

    def _finish(self, run: Run, recorded: Recording | None) -> TrainResult:
        """Print where the result is, and upload it if asked to."""
        result = self._result(run)
        best, model = result.best, self.work_dir
        self._say(f"Done. The result is in {result.checkpoint}")
        if best and best != result.checkpoint:
            self._say(f"Best by {self.settings.best_metric}: {best}")
            model = self.work_dir / BEST_FILE
        self._say(f"Talk to it:  {shell_command('xtuner', 'chat', model)}")
        if recorded:
            recorded.print_report()
        target, shared = self.settings.push_to_hub, best or result.checkpoint
        if target and shared and self.processes.is_main:
            self._say(f"Uploading {shared.name} to {target} ...")
            private = self.settings.hub_private_repo
            self._say(f"Uploaded to {publish(shared, target, private=private)}")
        return result

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def _loaded(self, source: Path | None) -> LoadedSettings:
        """The settings; a resumed run keeps the values that it had for 'auto'."""
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
            repetitions=data.repetitions,
        )
        self.parts = replace(self.parts, settings=self.settings)

    def _mark_best(self, run: Run, summary: str) -> None:
        if self.processes.is_main:
            self.store.mark_best(f"iter_{run.count}", summary)
            name = self.settings.best_metric
            self.console.print(f"Best so far: {name} {run.scalars[name]:.4g}", markup=False)

    def _recording(self, run: Run, lines: list[str]) -> Recording:
        dtype, processes = name_of(self.dtype), self.processes.world_size
        return recording(self.loaded, run, self.plan, dtype=dtype, processes=processes, lines=lines)

    def _note_language(self, data: TrainingData) -> None:
        """Print a note if the model cannot predict the answers that it will be trained on."""
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
        best = self.store.best() if self.settings.keep_best else None
        return TrainResult(self.work_dir, saved, run.step, dict(run.scalars), best)

    def _run(
        self,
        folders: RunDirs,
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
            best=BestMetric(self.settings, self.store, self.processes),
            vision=self.vision,
            console=self.console,
        )

    def _prepare_folders(self) -> RunDirs:
        """Only the main process creates the folders and reads them."""
        if not self.processes.is_main:
            return RunDirs(self.work_dir, self.work_dir)
        folders = RunDirs.prepare(self.work_dir)
        keep_settings(self.loaded, self.work_dir)
        return folders

    def _collate(self) -> Collate:
        algorithm = self.parts.algorithm
        return self.vision.collate(algorithm) if self.vision else algorithm.collate

    def _print_opening(self, data: TrainingData, counter: Counter, total: int) -> list[str]:
        """Print the first lines of the run, and return them."""
        self.work_dir.mkdir(parents=True, exist_ok=True)
        attention = choose_attention(self.settings, self.processes, self.dtype)
        language = script_note(data.train[0], self.parts.tokenizer.decode)
        opening = opening_lines(
            self.settings,
            self.plan,
            dtype=self.dtype,
            computing=(self.computing, attention),
            layout=self.processes.layout,
            steps=(total, counter),
            data=data.report.lines(),
            chosen=self.chosen,
            images=self.vision.line() if self.vision else None,
            packing=self.parts.packing,
            notes=(language, preflight.note_on_positions(self.settings, data.train)),
            work_dir=self.work_dir,
        )
        lines = list(opening)
        for line in lines:
            say(self.console, line)
        return lines
