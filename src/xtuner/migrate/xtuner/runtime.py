"""Translate hooks, checkpoints, sample answers and the remaining parts of an old config."""

from __future__ import annotations

from xtuner.errors import shell_command
from xtuner.migrate.report import Draft, shown
from xtuner.migrate.values import Table, use_all
from xtuner.migrate.xtuner.data import asked_system
from xtuner.migrate.xtuner.sources import VERBATIM

NEVER = 1_000_000_000
"""An interval longer than any run."""
_NO_INFLUENCE = (
    "DatasetInfoHook", "VarlenAttnArgsToMessageHubHook", "ThroughputHook", "IterTimerHook",
    "ParamSchedulerHook", "DistSamplerSeedHook", "RuntimeInfoHook", "NPUProfilerHook",
)  # fmt: skip


def read(config: Table, draft: Draft) -> None:
    """Translate hooks, seed, logging and the initial weights."""
    asked = False
    for number, hook in enumerate(config.listed("custom_hooks")):
        if not isinstance(hook, Table):
            draft.lose(config.line_of("custom_hooks"), shown("custom_hooks", hook), "is not a dict")
        elif hook.last() == "EvaluateChatHook" and not asked:
            asked = True
            _answers(hook, config, draft)
        else:
            _hook(hook, f"custom_hooks[{number}]", draft)
    if not asked:
        draft.set("evaluation_inputs", [], config.line_of("custom_hooks"))
    _default_hooks(config.table("default_hooks"), draft)
    _start(config, draft)
    _seed(config, draft)
    _visualizer(config, draft)
    draft.carry(config, "work_dir", "work_dir")


def _hook(hook: Table, where: str, draft: Draft) -> None:
    kind = hook.last()
    if kind == "HFCheckpointHook":
        draft.note(hook.line, kind, "every checkpoint is in Hugging Face format")
    elif kind not in _NO_INFLUENCE:
        draft.lose(
            hook.line,
            f"{where} = {hook.name()}",
            "is not supported; port it as custom_hooks = ['my_file.py:MyHook']",
        )
    use_all(hook)


def _answers(hook: Table, config: Table, draft: Draft) -> None:
    hook.pass_over("type", "tokenizer", "image_processor", "prompt_template")
    use_all(hook.get("prompt_template"))
    use_all(hook.get("image_processor"))
    inputs = hook.take("evaluation_inputs", ())
    questions = [inputs] if isinstance(inputs, str) else list(inputs)
    verbatim = draft.values.get("prompt_template") == VERBATIM
    if verbatim:
        questions = [f"<|Human|>: {question}<eoh>\n" for question in questions]
    draft.set("evaluation_inputs", questions, hook.line_of("evaluation_inputs"))
    images = hook.take("evaluation_images")
    if images:
        names = [images] if isinstance(images, str) else list(images)
        draft.set("evaluation_images", names, hook.line_of("evaluation_images"))
    every = hook.take("every_n_iters")
    draft.set("evaluation_freq", every or NEVER, hook.line_of("every_n_iters"))
    draft.carry(hook, "max_new_tokens", "evaluation_max_new_tokens", 600)
    asked = asked_system(hook, draft)
    if asked is not None and verbatim and asked.text:
        text = asked.text.replace("{bot_name}", str(config.get("bot_name", "{bot_name}")))
        draft.set("evaluation_system", f"{text}\n", asked.line)
    elif asked is not None and asked.text != draft.values.get("SYSTEM", ""):
        draft.set("evaluation_system", asked.text, asked.line)
    words = [*(hook.take("stop_words") or ()), hook.take("stop_word") or ""]
    words += ["<eom>"] if verbatim else []
    if any(words):
        kept = [str(word) for word in words if word]
        draft.set("evaluation_stop_words", kept, hook.line_of("stop_words"))
    if value := hook.take("generation_kwargs"):
        line = hook.line_of("generation_kwargs")
        draft.lose(line, shown("generation_kwargs", value), "sample answers use greedy decoding")


def _default_hooks(hooks: Table, draft: Draft) -> None:
    logger = hooks.table("logger")
    logger.pass_over("type", "log_metric_by_epoch", "ignore_last", "interval_exp_name")
    draft.carry(logger, "interval", "logging_steps", 10)
    for name in ("timer", "param_scheduler", "sampler_seed", "runtime_info"):
        use_all(hooks.take(name))
    _checkpoints(hooks.table("checkpoint"), draft)
    for name in [name for name in hooks if name not in hooks.used]:
        hook = hooks.take(name)
        if isinstance(hook, Table):
            _hook(hook, f"default_hooks.{name}", draft)


def _checkpoints(hook: Table, draft: Draft) -> None:
    hook.pass_over("type", "save_last", "save_param_scheduler", "filename_tmpl", "backend_args")
    interval, keep = hook.take("interval", -1), hook.take("max_keep_ckpts", -1)
    if hook.take("by_epoch", True) and interval != -1:
        draft.lose(
            hook.line_of("interval"),
            f"interval = {interval} (epochs)",
            "save_steps counts steps; the last step is always saved",
        )
        interval = -1
    draft.set("save_steps", NEVER if interval == -1 else interval, hook.line_of("interval"))
    draft.set("save_total_limit", keep, hook.line_of("max_keep_ckpts"))
    if hook.get("save_last") is False:
        draft.note(hook.line_of("save_last"), "save_last = False", "the last step is always saved")
    if hook.take("save_optimizer", True) is False:
        draft.note(
            hook.line_of("save_optimizer"),
            "save_optimizer = False",
            "checkpoints always contain the optimizer state; delete training_state.pt if you do "
            "not want to resume",
        )
    for key in ("save_best", "rule", "published_keys", "out_dir"):
        if value := hook.take(key):
            draft.lose(hook.line_of(key), shown(key, value), "has no counterpart")


def _start(config: Table, draft: Draft) -> None:
    resume = config.take("resume", False)
    if weights := config.take("load_from"):
        line = config.line_of("load_from")
        if resume:
            draft.lose(
                line,
                shown("load_from", weights),
                f"`{shell_command('xtuner', 'train', '--resume', weights)}` takes its weights "
                "alone: step 0 and a new optimizer",
            )
        else:
            draft.refuse(
                line,
                shown("load_from", weights),
                "a settings file names no initial weights: take the line out, and add "
                f"`{shell_command('--resume', weights)}` to `xtuner train`",
            )
    elif resume:
        draft.note(config.line_of("resume"), "resume = True", "use `xtuner train --resume`")
    if strategy := config.take("strategy"):
        use_all(strategy)
        kind = strategy.last() if isinstance(strategy, Table) else strategy
        draft.lose(
            config.line_of("strategy"),
            f"strategy = {kind}",
            "each process holds the entire model, with the same results; `--deepspeed "
            "deepspeed_zero2` or `--strategy fsdp2` shards it",
        )


def _visualizer(config: Table, draft: Draft) -> None:
    for backend in config.table("visualizer").listed("vis_backends"):
        kind = backend.last() if isinstance(backend, Table) else str(backend)
        if kind not in ("TensorboardVisBackend", "LocalVisBackend"):
            draft.lose(
                config.line_of("visualizer"), kind, "TensorBoard event files are written instead"
            )


def _seed(config: Table, draft: Draft) -> None:
    randomness = config.table("randomness")
    seed = randomness.take("seed")
    if seed is not None:
        draft.set("seed", seed, randomness.line_of("seed"))
    randomness.pass_over("deterministic", "diff_rank_seed")
